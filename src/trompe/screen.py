"""Where a run tells what it is doing: nowhere, or as bars in the terminal."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trompe.interfaces import EpochRecord

console = Console(stderr=True)


class Screen(Protocol):
    """Hears of a run's stages, of what is worth a line, and of each step and whole epoch."""

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


class Silent:
    """A Screen that shows nothing."""

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


class Bars:
    """A Screen in the terminal: stages, notes, and one bar per training."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

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


@contextlib.contextmanager
def progress_bars() -> Iterator[Bars]:
    """A live display on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)
