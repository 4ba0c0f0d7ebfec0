"""Many runs: jobs, and where they run.

The seam is the standard library's `concurrent.futures.Executor`: whatever has one can run jobs.
"""

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trompe.interfaces import InputError, TrompeError
from trompe.machine import choose_threads
from trompe.screen import Screen, Silent


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


@dataclass(frozen=True)
class Crew:
    """An executor and how many jobs it runs at once. executor None: here, one after the other."""

    executor: Callable[[], Executor] | None = None
    seats: int = 1


def crew_of(workers: int = 1, scheduler: str | None = None) -> Crew:
    """One process (this one), several on this machine, or a Dask cluster that runs already."""
    if workers < 1:
        raise InputError(f"workers = {workers}: must be at least 1")
    if scheduler is not None:
        raise InputError(f"scheduler {scheduler}: not yet")
    if workers == 1:
        return Crew()
    context = multiprocessing.get_context("spawn")
    return Crew(
        lambda: ProcessPoolExecutor(workers, context, initializer=choose_threads, initargs=(1,)),
        workers,
    )


def run_jobs(
    jobs: Iterable[Job], place: Place, crew: Crew | None = None, screen: Screen | None = None
) -> Iterator[Outcome]:
    """Outcomes as they come; a failed job stops no other.

    Jobs are taken from the iterable when there is a seat for them, so that it may learn from
    outcomes that it has been told of.
    """
    crew, screen = crew or Crew(), screen or Silent()
    if crew.executor is None:
        for job in jobs:
            yield _outcome(job, place, screen)
        return
    waiting, running = iter(jobs), set[Future[Outcome]]()
    with crew.executor() as executor:
        while True:
            for job in itertools.islice(waiting, crew.seats - len(running)):
                running.add(executor.submit(_outcome, job, place))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _outcome(job: Job, place: Place, screen: Screen | None = None) -> Outcome:
    started = time.perf_counter()
    try:
        result, error = job(place, screen or Silent()), ""
    except TrompeError as problem:
        result, error = None, str(problem)
    return Outcome(job, result, error, time.perf_counter() - started)
