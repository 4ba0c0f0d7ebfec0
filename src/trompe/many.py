"""Many runs: jobs, who runs them, and what became of each.

| crew                              | where a job runs                                           |
|-----------------------------------|------------------------------------------------------------|
| `crew_of()`                       | here, one after the other                                  |
| `crew_of(workers=4)`              | in processes of this machine (processes.py)                |
| `crew_of(scheduler="tcp://...")`  | on the workers of a Dask cluster (cluster.py)              |

The seam is `Seats`: a thread for each job hands it in and waits for its future, the standard
library's or Dask's, which is made after it. What is shared is here: jobs are taken when there is a
seat, each ends in an `Outcome`, none stops another.
"""

import functools
import itertools
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from trompe.cluster import Cluster, Unreachable, require_dask
from trompe.files import write_atomically
from trompe.interfaces import EpochRecord, InputError, TrompeError
from trompe.machine import choose_threads, own_gpu
from trompe.processes import Processes
from trompe.screen import Plan, Screen, Silent

LOOK_AGAIN = 5.0  # seconds after which the remaining time is told anew, and seats are counted
MOST_SEATS = 1000


@dataclass(frozen=True)
class Place:
    """Where a job finds and leaves run folders, and the device it computes on (see machine.py)."""

    root: Path = Path("runs")
    device: str = "auto"


class Job(Protocol):
    """Something that can be run elsewhere: picklable, and so is what it returns.

    Done twice it gives the same, and the second time finds what the first has left in place.root.
    """

    @property
    def name(self) -> str: ...
    def __call__(self, place: Place, screen: Screen) -> Any: ...


class Outcome(NamedTuple):
    """What became of a job: its result, or in one sentence why there is none."""

    job: Job
    result: Any
    error: str  # "" if all went well
    seconds: float
    computed: bool = True  # False: it told of no stage, so all was there already


@dataclass(frozen=True)
class Crew:
    """Who runs jobs; see `crew_of`."""

    workers: int = 1
    scheduler: str | None = None
    threads: int | None = None


def crew_of(workers: int = 1, scheduler: str | None = None, threads: int | None = None) -> Crew:
    """One process (this one), several on this machine, or a Dask cluster that runs already.

    threads: CPU threads of each process; None: an equal share of the cores. A cluster's workers
    have their own, and there are as many as were started. Raises InputError for what cannot be.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    if scheduler is not None:
        if workers > 1:
            raise InputError(
                f"workers = {workers}, scheduler = {scheduler}: a cluster has as many workers as "
                "were started there; give one of the two"
            )
        require_dask(scheduler)
    return Crew(workers, scheduler, threads)


class Seats(Protocol):
    """Where jobs run: `run` may be called by as many threads at once as `count` says."""

    def count(self) -> int: ...
    def run(self, work: Callable[..., "_Done"]) -> "_Done": ...


def run_jobs(
    jobs: Iterable[Job],
    place: Place,
    crew: Crew | None = None,
    screen: Screen | None = None,
    total: int | None = None,
) -> Iterator[Outcome]:
    """Outcomes as they come; a failed job stops no other.

    Jobs are taken from the iterable when there is a seat for them, so that it may learn from
    outcomes that it has been told of. total: how many there are, if len() cannot say.
    A job whose process dies is run again, and goes on from what it kept. Raises TrompeError only
    for a cluster that cannot be reached.
    """
    crew, screen = crew or Crew(), screen or Silent()
    if total is None and isinstance(jobs, Sized):
        total = len(jobs)
    count = _Count(screen, total)
    if crew.workers == 1 and crew.scheduler is None:
        if crew.threads is not None:
            choose_threads(crew.threads)
        for job in jobs:
            count.tell([(job, time.monotonic())], 1)
            outcome = _outcome(job, place, lambda work: work(screen))
            count.note(outcome)
            yield outcome
        count.tell([], 1)
        return
    if crew.scheduler is not None:  # another folder may be the current one there
        place = replace(place, root=place.root.resolve())
    waiting, running = iter(jobs), dict[Future[Outcome], tuple[Job, float]]()
    with ThreadPoolExecutor(MOST_SEATS) as attendants, _seats(crew, place, screen) as seats:
        while True:
            there = seats.count()
            for job in itertools.islice(waiting, max(0, there - len(running))):
                future = attendants.submit(_outcome, job, place, seats.run)
                running[future] = (job, time.monotonic())
            count.tell(list(running.values()), there)
            if not running:
                return
            done, _ = wait(running, LOOK_AGAIN, FIRST_COMPLETED)
            for future in done:
                del running[future]
                outcome = future.result()
                count.note(outcome)
                yield outcome


def _seats(crew: Crew, place: Place, screen: Screen) -> AbstractContextManager[Seats]:
    if crew.scheduler is None:
        return Processes(crew.workers, crew.threads)
    return Cluster(crew.scheduler, "cuda" in place.device, screen)


class _Done(NamedTuple):
    """What comes back from where a job ran."""

    result: Any
    error: str
    seconds: float
    computed: bool


_alone = (
    threading.RLock()
)  # random numbers and threads of torch are the process's: one job at a time


def _outcome(job: Job, place: Place, run: Callable[[Callable[..., _Done]], _Done]) -> Outcome:
    """The job's outcome; `run` calls what it is given, here or elsewhere."""
    started = time.perf_counter()
    try:
        done = run(functools.partial(_do, job, place))
    except Unreachable:  # no job's fault
        raise
    except Exception as problem:  # the process died, or the job or its result does not travel
        seconds = time.perf_counter() - started
        done = _Done(None, _cause(problem, job, place), seconds, True)
    return Outcome(job, *done)


def _do(job: Job, place: Place, screen: Screen | None = None, seat: int | None = None) -> _Done:
    """Runs a job where it is; seat: its number among this machine's, each of which has its GPU."""
    if seat is not None:
        place = replace(place, device=own_gpu(place.device, seat))
    with _alone:
        started, threads = time.perf_counter(), torch.get_num_threads()
        heard = _Heard(screen or Silent())
        try:
            result, error = job(place, heard), ""
        except (Exception, SystemExit) as problem:
            result, error = None, _cause(problem, job, place)
        finally:
            torch.set_num_threads(threads)  # a checkpoint may have brought others
        return _Done(result, error, time.perf_counter() - started, heard.stages > 0)


def _cause(problem: BaseException, job: Job, place: Place) -> str:
    """In one line; what is no TrompeError is a surprise, whose traceback is kept in a file."""
    said = textwrap.shorten(str(problem), 500, placeholder=" ...")
    if isinstance(problem, TrompeError):
        return said
    said = f"{type(problem).__name__}: {said}"
    plain = job.name.replace("/", "-")
    file = place.root / ".failed" / f"{plain}.txt"
    lines = "".join(traceback.format_exception(problem))
    try:
        write_atomically(file, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    except (InputError, OSError):  # a full disk may be the very problem
        return said
    return f"{said} (traceback in {file})"


class _Heard:
    """Passes on what a job tells, and counts its stages."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.stages = screen, 0

    def stage(self, text: str) -> None:
        self.stages += 1
        self.screen.stage(text)

    def note(self, text: str) -> None:
        self.screen.note(text)

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.screen.step(epoch, step, steps, terms)

    def epoch(self, record: EpochRecord) -> None:
        self.screen.epoch(record)

    def plan(self, plan: Plan) -> None:
        """A job's own runs are no part of the plan."""


class _Count:
    """How far all jobs are, told to a screen."""

    def __init__(self, screen: Screen, total: int | None) -> None:
        self.screen, self.total = screen, total
        self.done = self.failed = self.computed = 0
        self.seconds = 0.0  # of those that were computed

    def note(self, outcome: Outcome) -> None:
        self.failed += bool(outcome.error)
        self.done += not outcome.error
        if outcome.computed and not outcome.error:
            self.computed += 1
            self.seconds += outcome.seconds

    def tell(self, running: Sequence[tuple[Job, float]], seats: int) -> None:
        """running: jobs, and since when by time.monotonic()."""
        names = tuple(job.name for job, _ in running)
        spent = [time.monotonic() - since for _, since in running]
        left = self.left(spent, seats)
        self.screen.plan(Plan(self.done, self.failed, self.total, names, left))

    def left(self, spent: list[float], seats: int) -> float | None:
        """Seconds until all are done, if each takes the mean of those that were computed."""
        if self.total is None or not self.computed:
            return None
        mean, jobs = self.seconds / self.computed, self.total - self.done - self.failed
        work = jobs * mean - sum(min(seconds, mean) for seconds in spent)
        return max(0.0, work) / max(1, min(seats, jobs))
