"""Jobs for the tests of many runs: importable wherever a job is run."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trompe.experiment import AttackJob
from trompe.files import write_atomically
from trompe.interfaces import EpochRecord, InputError
from trompe.many import Place
from trompe.screen import Screen


@dataclass(frozen=True)
class Steps:
    """Writes the numbers 1, 2, ..., each time with its process, and goes on after the last one."""

    name: str
    steps: int = 3
    pause: float = 0.0
    dies_after: tuple[int, ...] = ()  # once it has written these, killed with -9
    waits_after: int = 0  # once it has written this, until the file "go" is there

    def __call__(self, place: Place, screen: Screen) -> list[int]:
        place.root.mkdir(parents=True, exist_ok=True)
        file = place.root / f"{self.name}.steps"
        done = len(written(file))
        if done < self.steps:
            screen.stage("counting")
        for step in range(done + 1, self.steps + 1):
            time.sleep(self.pause)
            with open(file, "a") as opened:
                opened.write(f"{step} {os.getpid()}\n")
            screen.epoch(EpochRecord(step, {}, {}, self.pause))
            if step in self.dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            while step == self.waits_after and not (place.root / "go").exists():
                time.sleep(0.01)
        return [step for step, _ in written(file)]


def written(file: Path) -> list[tuple[int, int]]:
    """(step, process) of each line that Steps has written."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(step), int(process)) for step, process in map(str.split, lines)]


@dataclass(frozen=True)
class DiesAtOnce:
    """Notes each time that it is begun, and is killed."""

    name: str

    def __call__(self, place: Place, screen: Screen) -> None:
        with open(place.root / f"{self.name}.begun", "a") as opened:
            opened.write("x")
        os.kill(os.getpid(), signal.SIGKILL)


class Poison:
    """Who packs it to send it somewhere dies."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DiesWithItsResult:
    """Ends, but its result is lost with its process; done again, it is killed."""

    name: str

    def __call__(self, place: Place, screen: Screen) -> Poison:
        begun = place.root / f"{self.name}.begun"
        if begun.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        begun.touch()
        return Poison()


@dataclass(frozen=True)
class Raises:
    name: str
    problem: type[BaseException] = ZeroDivisionError

    def __call__(self, place: Place, screen: Screen) -> None:
        raise self.problem("nothing\ncan be divided by [0]")


@dataclass(frozen=True)
class Unfit:
    name: str

    def __call__(self, place: Place, screen: Screen) -> None:
        raise InputError("weight = 7: must lie in 0..1")


@dataclass(frozen=True)
class Where:
    """Says in which process it is, with which threads, once so many processes are there."""

    name: str
    processes: int = 2

    def __call__(self, place: Place, screen: Screen) -> dict[str, Any]:
        (place.root / f"{os.getpid()}.here").touch()
        deadline = time.monotonic() + 120
        while len(list(place.root.glob("*.here"))) < self.processes:
            assert time.monotonic() < deadline, "no other process has come"
            time.sleep(0.02)
        found = {
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
            "told": os.environ.get("OMP_NUM_THREADS"),
        }
        torch.set_num_threads(5)  # as a checkpoint of a run with other threads does
        return found


@dataclass(frozen=True)
class Untravelled:
    """Its result cannot be sent."""

    name: str

    def __call__(self, place: Place, screen: Screen) -> Callable[[], int]:
        return lambda: 1


@dataclass(frozen=True)
class Marked:
    """An attack that says in which process it is begun, and ends when it was killed often enough.

    Files in place.root: PROCESS.begun holds its name, NAME.killed an x for each time.
    """

    job: AttackJob
    kills: int

    @property
    def name(self) -> str:
        return self.job.name

    def __call__(self, place: Place, screen: Screen) -> str:
        write_atomically(place.root / f"{os.getpid()}.begun", lambda f: f.write_text(self.name))
        result = self.job(place, screen)
        killed = place.root / f"{self.name}.killed"
        deadline = time.monotonic() + 300
        while not killed.exists() or len(killed.read_text()) < self.kills:
            if time.monotonic() > deadline:
                raise TimeoutError("nobody kills this run")
            time.sleep(0.01)
        return result
