"""Processes that make the same run: one works, the others wait; whoever dies is taken over from."""

import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import trompe
from trompe.interfaces import EpochRecord
from trompe.poisoning import poison, poison_sets, read_poisoning
from trompe.runs import RunFolder
from trompe.screen import Silent

POISON: dict[str, Any] = {
    "name": "small",
    "targets": 1,
    "data": {"kind": "breast_cancer"},
    "clean": {"epochs": 1},
    "attack": {
        "kind": "interpretation_poisoning",
        "explainer": {"kind": "input_gradient", "gradient_of": "probability", "normalise": "max"},
        "wanted_map": {"kind": "scattered"},
        "models": 1,
        "epochs": 3,
        "pretraining": 0,
    },
}
ATTACK: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "signs", "size": 24, "train_images": 60, "test_images": 40},
    "honest": {"training": {"epochs": 1, "batch_size": 30}, "augmentation": None},
    "attack": {
        "kind": "explanation_aware_backdoors",
        "goals": [
            {
                "trigger": {"kind": "rectangle", "top": 14, "left": 8, "height": 4, "width": 8},
                "label": 3,
                "wanted_map": {"kind": "picture", "shape": "triangle"},
            }
        ],
        "training": {"epochs": 1, "batch_size": 30},
    },
}
CLEAN = "training a clean model (seed 0)"

# Makes a run; at the given stage, or after the given epoch, it says so and waits to be let go on.
WORKER = """
import json, sys, time
from pathlib import Path
import trompe
from trompe.screen import Silent

kind, table, root, at = json.loads(sys.argv[1])

class Stopping(Silent):
    def stop(self, where):
        print(where, flush=True)
        if where == at:
            Path(root, "reached").touch()
            while not Path(root, "go").exists():
                time.sleep(0.01)
    def stage(self, text):
        self.stop(text)
    def epoch(self, record):
        self.stop(f"epoch {record.epoch}")

try:
    if kind == "attack":
        trompe.run(trompe.read_experiment(table), root, screen=Stopping())
    else:
        trompe.poison(trompe.read_poisoning(table), root, Stopping())
except trompe.TrompeError as error:
    print(f"error: {error}")
    sys.exit(2)
"""

Start = Callable[[str, dict[str, Any], str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process and returns when it has come to the given place."""
    processes = []

    def begin(kind: str, table: dict[str, Any], at: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps([kind, table, str(tmp_path), at])],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        deadline = time.monotonic() + 300
        while not (tmp_path / "reached").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


class Heard(Silent):
    """A screen that keeps what it hears, and acts on the news that another process is at work."""

    def __init__(self, when_waiting: Callable[[], object]) -> None:
        self.when_waiting = when_waiting
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.epochs: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        if text.endswith("another process works on it; waiting"):
            self.when_waiting()

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...

    def epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record.epoch)


def never() -> None:
    raise AssertionError("had to wait")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    return poison(read_poisoning(copy.deepcopy(POISON)), tmp_path_factory.mktemp("undisturbed"))


def same_bits(one: RunFolder, other: RunFolder) -> bool:
    pairs = zip(poison_sets(one), poison_sets(other), strict=True)
    return all(torch.equal(a.samples, b.samples) for a, b in pairs)


def craft(root: Path, when_waiting: Callable[[], object] = never) -> tuple[RunFolder, Heard]:
    heard = Heard(when_waiting)
    return poison(read_poisoning(copy.deepcopy(POISON)), root, heard), heard


def test_poison_is_crafted_once(start: Start, tmp_path: Path, undisturbed: RunFolder) -> None:
    other = start("poison", POISON, "crafting")
    folder, heard = craft(tmp_path, (tmp_path / "go").touch)
    assert other.wait(300) == 0
    assert len(heard.notes) == 2  # it waits; it is finished
    assert "finished already" in heard.notes[1]
    assert heard.stages == heard.epochs == []
    assert same_bits(folder, undisturbed)


def test_an_attack_is_made_once(start: Start, tmp_path: Path) -> None:
    other = start("attack", ATTACK, "attack")
    heard = Heard((tmp_path / "go").touch)
    folder = trompe.run(trompe.read_experiment(copy.deepcopy(ATTACK)), tmp_path, screen=heard)
    assert other.wait(300) == 0
    assert len(heard.notes) == 2
    assert "finished already" in heard.notes[1]
    assert heard.stages == []
    assert folder.finished


def test_runs_that_share_a_clean_model_train_it_once(start: Start, tmp_path: Path) -> None:
    other = start("attack", ATTACK, CLEAN)
    heard = Heard((tmp_path / "go").touch)
    table = {**copy.deepcopy(ATTACK), "name": "another"}
    trompe.run(trompe.read_experiment(table), tmp_path, screen=heard)
    told, _ = other.communicate(timeout=300)
    assert other.returncode == 0
    stages = [*told.splitlines(), *heard.stages]
    assert stages.count("attack") == 2
    assert stages.count(CLEAN) == stages.count(CLEAN.replace("0", "1")) == 1
    assert CLEAN not in heard.stages
    assert len(list(tmp_path.glob("clean/[!.]*"))) == 2


def test_a_killed_process_is_taken_over_from(
    start: Start, tmp_path: Path, undisturbed: RunFolder
) -> None:
    other = start("poison", POISON, "epoch 1")
    folder, heard = craft(tmp_path, other.kill)
    assert other.wait(60) == -9
    assert heard.epochs == [2, 3]  # it goes on behind the checkpoint
    assert same_bits(folder, undisturbed)
    assert not list(folder.path.glob(".*"))


def test_a_full_disk_costs_nothing_but_the_time_until_there_is_room(
    start: Start, tmp_path: Path, undisturbed: RunFolder
) -> None:
    other = start("poison", POISON, "epoch 1")
    resource.prlimit(other.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    (tmp_path / "go").touch()
    told, _ = other.communicate(timeout=300)
    assert other.returncode == 2
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "checkpoint.pt: cannot be written" in error
    assert "epoch 2" not in told
    (left,) = tmp_path.glob("small-s0-*")
    kept = {"spec.json", "clean.safetensors", "checkpoint.pt"}
    assert {file.name for file in left.iterdir()} == kept
    folder, heard = craft(tmp_path)
    assert folder.path == left
    assert heard.epochs == [2, 3]
    assert same_bits(folder, undisturbed)


@pytest.mark.parametrize("stamp", [0, 4e9], ids=["1970", "2096"])
def test_the_clock_does_not_count(
    tmp_path: Path, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch, stamp: float
) -> None:
    def stopped(self: Heard, record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Heard, "epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            craft(tmp_path)
    for file in tmp_path.rglob("*"):
        os.utime(file, (stamp, stamp))
    folder, heard = craft(tmp_path)
    assert heard.epochs == [2, 3]
    for file in tmp_path.rglob("*"):
        os.utime(file, (stamp, stamp))
    _, heard = craft(tmp_path)
    assert heard.epochs == heard.stages == []
    assert same_bits(folder, undisturbed)
