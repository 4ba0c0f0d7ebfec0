"""Where a run tells what it is doing: nowhere, or as bars in the terminal."""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from trompe.interfaces import EpochRecord

console = Console(stderr=True)


class Plan(NamedTuple):
    """How far many runs are."""

    done: int
    failed: int
    total: int | None  # None: nobody knows how many will come
    running: tuple[str, ...]  # their names
    remaining: float | None  # seconds until all are done; None: nobody knows


class Screen(Protocol):
    """Hears of a run's stages, of what is worth a line, of each step and whole epoch.

    And of many runs (many.py) how far they are.
    """

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...
    def plan(self, plan: Plan) -> None: ...


class Silent:
    """A Screen that shows nothing."""

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...
    def plan(self, plan: Plan) -> None: ...


class Bars:
    """A Screen in the terminal: notes, one bar per training, and above it one for many runs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None
        self.runs: TaskID | None = None

    def stage(self, text: str) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(text, total=None, numbers="")

    def note(self, text: str) -> None:
        self.progress.console.print(f"  {text}", highlight=False, markup=False)

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        assert self.task is not None
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.progress.update(
            self.task, total=steps, completed=step, numbers=f"epoch {epoch}  {numbers}"
        )

    def epoch(self, record: EpochRecord) -> None:
        numbers = {**record.terms, **record.measured}
        told = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        self.note(f"epoch {record.epoch}: {told}  ({record.seconds:.0f} s)")
        assert self.task is not None
        self.progress.reset(self.task)

    def plan(self, plan: Plan) -> None:
        if self.runs is None:
            self.runs = self.progress.add_task("runs", total=plan.total, numbers="")
        of = "" if plan.total is None else f" of {plan.total}"
        told = [f"{plan.done}{of} done"]
        if plan.failed:
            told.append(f"{plan.failed} failed")
        if plan.running:
            told.append(f"running {escape(', '.join(plan.running))}")
        self.progress.update(
            self.runs,
            completed=plan.done + plan.failed,
            numbers=", ".join(told),
            left=None if plan.remaining is None else timedelta(seconds=round(plan.remaining)),
        )


class _Left(TimeRemainingColumn):
    """Of many runs, the time that the plan says: those found finished were no work."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            left = task.fields["left"]
            return Text("-:--:--" if left is None else str(left), "progress.remaining")
        return super().render(task)


@contextlib.contextmanager
def progress_bars() -> Iterator[Bars]:
    """A live display on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        _Left(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)
