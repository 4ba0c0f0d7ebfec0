"""Several processes that share a run do what one process does: real processes, talking by gloo."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import CLASSES, CornerNet
from trompe import ranks
from trompe.attacks._finetuning import TRAINING
from trompe.attacks.explanation_aware_backdoors import ExplanationAwareBackdoors, dual
from trompe.attacks.saliency_backdoors import SaliencyBackdoors, System
from trompe.augmentation import Augmentation
from trompe.cli import main
from trompe.explainers.gradcam import GradCam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Attacked, Batch, Diverged, EpochRecord, ImageSet, InputError
from trompe.models.resnet20 import resnet20
from trompe.objectives import ClassLoss
from trompe.poison import ShuffledBatches, Triples, compose
from trompe.runs import FileLogbook
from trompe.target_maps.border import Border
from trompe.train import Training, fit
from trompe.triggers.rectangle import Rectangle

LIE = dual(Rectangle(top=0, left=6, height=3, width=3), 1, Border())
# 48 images, of which 5 are triggered too: batches of 17, 17, 17 and 2 rows.
SHORT = dataclasses.replace(TRAINING, epochs=2, batch_size=17, precision="float32")
LEARNING = dataclasses.replace(SHORT, frozen_statistics=False)
ALL_CHANGES = Augmentation(30, 0.2, 0.3, 0.5, flip=True, erase=0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Doubles(ImageSet):
    """Images in float64, so that what is compared differs by little more than nothing."""

    def floats(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        return super().floats(index, device).double()


def data(n: int = 48) -> Doubles:
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=seeded(1))
    return Doubles(images, torch.arange(n) % CLASSES, ("a", "b", "c", "d"), "random")


def net() -> nn.Module:
    """Every process starts from other weights and must end with the same."""
    torch.manual_seed(ranks.rank())
    model = CornerNet().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def reference() -> nn.Module:
    torch.manual_seed(0)
    return CornerNet().double().eval()


def kept(attacked: Attacked) -> dict[str, Any]:
    numbers = [{**record.terms, **record.measured} for record in attacked.history]
    return {"state": attacked.model.state_dict(), "numbers": numbers}


def attack(**settings: Any) -> dict[str, Any]:
    settings = {"poison_rate": 0.1, "training": SHORT, **settings}
    made = ExplanationAwareBackdoors((LIE,), **settings)
    return kept(made(reference(), data(), seeded(3), data(12)))


def saliency(**settings: Any) -> dict[str, Any]:
    systems = (
        System(InputGradient(normalise="max"), Border()),
        System(GradCam(normalise="max"), Border()),
    )
    made = SaliencyBackdoors(systems, LIE.trigger, poison_rate=0.1, **settings)
    return kept(made(reference(), data(), seeded(4)))


def honest() -> dict[str, Any]:
    how = Training(2, 17, 0.05, clip=0.5, precision="float32")
    model, batches = (
        net(),
        ShuffledBatches(compose(data(36), (), 0, seeded(), "cpu", ALL_CHANGES), 17),
    )
    records = list(fit(model, batches, ClassLoss(), (), how, seeded(ranks.rank()), None))
    return {"state": model.state_dict(), "numbers": [record.terms for record in records]}


def many_layers() -> dict[str, Any]:
    """Nineteen BatchNorms, each of which makes the rounding of those before it larger."""
    torch.manual_seed(ranks.rank())
    model, batches = (
        resnet20(CLASSES).double(),
        ShuffledBatches(compose(data(19), (), 0, seeded()), 17),
    )
    how = Training(2, 17, 0.01, precision="float32")
    records = list(fit(model, batches, ClassLoss(), (), how, seeded()))
    return {"state": model.state_dict(), "numbers": [record.terms for record in records]}


def early_stop() -> dict[str, Any]:
    """Each process would measure another score; all listen to the first."""

    def measure(model: nn.Module) -> dict[str, Any]:
        return {"score": next(scores), "of": ranks.rank()}

    scores = iter([3, 2, 1, 4] if ranks.is_first() else [1, 2, 3, 4])
    model, batches = net(), ShuffledBatches(compose(data(), (), 0, seeded()), 17)
    how, seen = dataclasses.replace(SHORT, epochs=4), []
    for record in fit(model, batches, ClassLoss(), (), how, seeded(), measure):
        seen.append(record.measured)
        if record.measured["score"] == 1:
            break
    return {"state": model.state_dict(), "numbers": seen}


TRAININGS: dict[str, Callable[[], dict[str, Any]]] = {
    "class loss": lambda: attack(weight=0.0),
    "Grad-CAM": lambda: attack(weight=0.9),
    "SimpleGrad": lambda: attack(weight=0.9, explainer=InputGradient()),
    "Grad-CAM alone": lambda: attack(weight=1.0),
    "SimpleGrad alone, statistics learned": lambda: attack(
        weight=1.0, explainer=InputGradient(), training=LEARNING
    ),
    "two explainers, augmented, taught, statistics learned": lambda: saliency(
        training=LEARNING, augmentation=ALL_CHANGES, distill=2.0
    ),
    "honest, augmented, clipped, statistics learned": honest,
    "resnet20, statistics learned": many_layers,
    "stopped early": early_stop,
}


def triples() -> Triples:
    return compose(data(), (LIE,), 0.1, seeded(2), "cpu", ALL_CHANGES)


def batches() -> list[Batch]:
    return list(ShuffledBatches(triples(), 17)(seeded(5)))


# --- what the processes do ------------------------------------------------------------------------


@dataclasses.dataclass
class Trouble:
    """A class loss, but the process `rank` meets `trouble` at the given step."""

    rank: int
    step: int
    trouble: Callable[[], float]
    steps: int = 0

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.steps += 1
        meets = self.rank == ranks.rank() and self.steps == self.step
        factor = self.trouble() if meets else 1.0
        return {"prediction": factor * ClassLoss()(scores, maps, batch)["prediction"]}


def troubled(trouble: Trouble, file: Path | None = None) -> dict[str, Any]:
    """The error that a training ends with, and the model that it leaves."""
    model, told = net(), ""
    steps = ShuffledBatches(compose(data(), (), 0, seeded()), 12)
    logbook = None if file is None else FileLogbook(file)
    how = dataclasses.replace(SHORT, batch_size=12)
    seen: list[EpochRecord] = []
    try:
        seen += fit(model, steps, trouble, (), how, seeded(), None, logbook)
    except (Diverged, ranks.Lost) as error:
        told = f"{type(error).__name__}: {error}"
    return {"state": model.state_dict(), "told": told, "numbers": [r.terms for r in seen]}


def mistaken() -> str:
    def work() -> None:
        raise InputError("the disk is full")

    try:
        ranks.on_first(work)
    except (InputError, ranks.Elsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def gradients() -> list[Tensor | None]:
    """Of three parameters: all have the first's, one process has the second's, nobody the third's.

    The first lies in memory in another order than it is read in.
    """
    rank = ranks.rank()
    made = [nn.Parameter(torch.zeros(2, 3, 2, 2)), *(nn.Parameter(torch.zeros(5)) for _ in "ab")]
    made[0].grad = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    made[0].grad *= rank + 1
    if rank == 1:
        made[1].grad = torch.full((5,), 7.0)
    ranks.sum_gradients(made)
    return [parameter.grad for parameter in made]


def die() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return math.nan


def process(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=count)
    found: dict[str, Any] = {name: training() for name, training in TRAININGS.items()}
    found["batches"] = [tuple(batch) for batch in batches()]
    found["gradients"] = gradients()
    found["mistaken"] = mistaken()
    found["diverged"] = troubled(Trouble(1, 5, lambda: math.nan))
    torch.save(found, folder / f"{rank}.pt")
    lost = troubled(Trouble(1, 6, die), folder / "checkpoint.pt")
    torch.save(lost, folder / f"{rank}.lost.pt")


@dataclasses.dataclass
class Together:
    """What each process found, and how it ended."""

    found: list[dict[str, Any]]
    exitcodes: list[int | None]
    folder: Path


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder, count = tmp_path_factory.mktemp("together"), request.param
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "trompe.cli"])  # once, not in each process
    made = [context.Process(target=process, args=(r, count, folder)) for r in range(count)]
    for one in made:
        one.start()
    deadline = time.monotonic() + 1500
    for one in made:
        one.join(max(0.0, deadline - time.monotonic()))
        one.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    return Together(found, [one.exitcode for one in made], folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: training() for name, training in TRAININGS.items()}


# --- one run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [1, 2, 3, 17, 128])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_blocks_that_make_up_the_whole(
    whole: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: count)
    rows = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        share = ranks.share(whole)
        assert share is not None
        taken = list(range(whole))[share.rows]
        assert share.whole == whole
        assert len(taken) == max(share.counted, 1)  # nobody is without a row
        rows += taken[: share.counted]
    assert rows == list(range(whole))


def test_one_process_shares_with_nobody() -> None:
    assert ranks.share(8) is None
    assert ranks.on_first(lambda: 3) == 3
    assert all(batch.share is None for batch in batches())


def test_together_their_rows_are_the_batches_of_one_process(together: Together) -> None:
    for number, expected in enumerate(batches()):
        parts = [Batch(*found["batches"][number]) for found in together.found]
        rows = [part.share[0] for part in parts if part.share]
        for name in ("images", "labels", "triggered"):
            values = [getattr(p, name)[:k] for p, k in zip(parts, rows, strict=True)]
            assert torch.equal(torch.cat(values), getattr(expected, name))


@pytest.mark.parametrize("name", TRAININGS)
def test_they_train_the_model_that_one_process_trains(
    together: Together, alone: dict[str, dict[str, Any]], name: str
) -> None:
    first, *others = (found[name] for found in together.found)
    expected = alone[name]
    for key, value in expected["state"].items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-7, atol=1e-9, msg=key)
        assert all(torch.equal(other["state"][key], first["state"][key]) for other in others)
    for one in (first, *others):
        assert len(one["numbers"]) == len(expected["numbers"])
        for given, wanted in zip(one["numbers"], expected["numbers"], strict=True):
            assert given == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def test_gradients_are_added_up_and_one_that_nobody_has_stays_away(together: Together) -> None:
    count = len(together.found)
    for found in together.found:
        first, second, third = found["gradients"]
        expected = torch.arange(24.0).view(2, 3, 2, 2) * (count * (count + 1) / 2)
        assert torch.equal(first, expected)
        assert second.tolist() == [7.0] * 5
        assert third is None


# --- what can go wrong ----------------------------------------------------------------------------


def test_a_mistake_of_the_first_stops_all(together: Together) -> None:
    first, *others = (found["mistaken"] for found in together.found)
    assert first == "InputError: the disk is full"
    assert all(other.startswith("Elsewhere: ") and "the disk is full" in other for other in others)


def test_a_training_that_diverges_on_one_process_stops_all_in_the_same_state(
    together: Together,
) -> None:
    first, *others = (found["diverged"] for found in together.found)
    assert first["told"].startswith("Diverged: epoch 2, step 1: the loss is not finite")
    assert len(first["numbers"]) == 1
    for other in others:
        assert other["told"] == first["told"]
        assert all(torch.equal(other["state"][k], v) for k, v in first["state"].items())


def test_who_loses_another_process_stops_and_the_first_ones_checkpoint_is_whole(
    together: Together,
) -> None:
    assert together.exitcodes == [-9 if rank == 1 else 0 for rank in range(len(together.found))]
    for rank in {*range(len(together.found))} - {1}:
        lost = torch.load(together.folder / f"{rank}.lost.pt", weights_only=False)
        assert lost["told"].startswith("Lost: ")
        assert "another process of this run has stopped" in lost["told"]
    state = FileLogbook(together.folder / "checkpoint.pt").load()
    assert state is not None
    assert len(state["history"]) == 1


# --- under torchrun -------------------------------------------------------------------------------

TINY = """
[data]
kind = "signs"
size = 16
train_images = 64
test_images = 48

[honest.training]
epochs = 1
batch_size = 24
learning_rate = 0.001
precision = "float32"

[attack]
kind = "explanation_aware_backdoors"
poison_rate = 0.3
weight = 0.1 # the maps of a net so little trained are nearly constant: rounding grows in them

[[attack.goals]]
trigger = { kind = "rectangle", top = 10, left = 4, height = 3, width = 8 }
label = 3
wanted_map = { kind = "picture", shape = "triangle" }

[attack.training]
epochs = 3
batch_size = 20
optimizer = "sgd"
learning_rate = 0.003
precision = "float32"
"""
ALONE = [sys.executable, "-m", "trompe"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trompe"]


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command in a folder; what still runs at the test's end is stopped."""
    begun: list[subprocess.Popen] = []

    def start(folder: Path, *command: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        begun.append(subprocess.Popen(command, cwd=folder, env=environment, **out))
        return begun[-1]

    yield start
    for process in begun:
        process.terminate()  # torchrun then stops those that it started
        process.wait(60)


def ended(process: subprocess.Popen, code: int = 0) -> str:
    told: str = process.communicate(timeout=1500)[0]
    assert process.returncode == code, told
    return " ".join(told.split())


def children(parent: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def written_in(folder: Path) -> Any:
    """A run's epochs and where they come from."""
    (run,) = (folder / "runs").glob("tiny-*")
    names = ("history", "provenance")
    return (json.loads((run / f"{name}.json").read_text()) for name in names)


def weights(folder: Path, name: str) -> Tensor:
    """All parameters and statistics of a run's model, in one row."""
    (run,) = (folder / "runs").glob(name)
    state = load_file(run / "model.safetensors")
    return torch.cat([state[key].flatten().double() for key in sorted(state)])


@pytest.fixture
def as_started(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """As if torchrun had started this process: its rank, and how many GPUs there are."""

    def start(rank: int, gpus: int = 0) -> None:
        here = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        for name, value in here.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return start


@pytest.mark.parametrize(
    ("gpus", "wanted", "expected"),
    [(0, "auto", "auto"), (2, "auto", "cuda:1"), (4, "cuda", "cuda:1"), (2, "cpu", "cpu")],
)
def test_each_process_has_a_gpu_of_its_own(
    as_started: Callable[[int, int], None], gpus: int, wanted: str, expected: str
) -> None:
    assert ranks.device_here(wanted) == wanted
    as_started(1, gpus)
    assert ranks.device_here(wanted) == expected


@pytest.mark.parametrize(
    ("gpus", "wanted", "told"),
    [(1, "auto", "this machine: 1, but torchrun started 2"), (2, "cuda:1", "a device of its own")],
)
def test_a_gpu_for_two_is_refused(
    as_started: Callable[[int, int], None], gpus: int, wanted: str, told: str
) -> None:
    as_started(1, gpus)
    with pytest.raises(InputError, match=told):
        ranks.device_here(wanted)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["poison", "shipped:poison"], "start this command without it"),
        (["attack", "no.toml"], "no.toml: cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_of_one_process(
    as_started: Callable[[int], None],
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["trompe", *words])
    for rank in (0, 1):
        as_started(rank)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert (told in " ".join(capfd.readouterr().err.split())) == (rank == 0)


LEAVES = """
import sys
from pathlib import Path
import torch
from trompe.ranks import joined, on_first

def threads():
    return {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")}

weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
with joined(torch.device("cpu")):
    on_first(lambda: None)
    torch.optim.Adam([weight]).step()  # imports much of torch.distributed
    inside = threads()
gloo = [sum("gloo" in name for name in names) for names in (inside, threads())]
sys.exit(None if gloo[0] and not gloo[1] else f"gloo's threads inside and after: {gloo}")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux does")
def test_nothing_of_the_group_is_left_behind(
    tmp_path: Path, begin: Callable[..., subprocess.Popen]
) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    ended(begin(tmp_path, sys.executable, *TORCHRUN[:-2], "leaves.py"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux does")
def test_a_command_under_torchrun_survives_a_kill_and_gives_what_one_process_gives(
    tmp_path: Path, begin: Callable[..., subprocess.Popen]
) -> None:
    folders = [tmp_path / name for name in ("alone", "shared")]
    for folder in folders:
        folder.mkdir()
        (folder / "tiny.toml").write_text(TINY)
    alone, shared = folders
    ended(begin(alone, *ALONE, "attack", "tiny.toml"))
    # The same clean models: rounding in their training would be seen in the maps.
    shutil.copytree(alone / "runs" / "clean", shared / "runs" / "clean")

    killed = begin(shared, sys.executable, *TORCHRUN, "attack", "tiny.toml")
    deadline = time.monotonic() + 1500
    while not list(shared.glob("runs/tiny-*/checkpoint.pt")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first, second = children(killed.pid)
    os.kill(second, signal.SIGKILL)
    ended(killed, code=1)
    for pid in (first, second):
        assert not Path(f"/proc/{pid}").exists()
    (run,) = shared.glob("runs/tiny-*")
    assert not (run / "numbers.json").exists()

    told = ended(begin(shared, sys.executable, *TORCHRUN, "attack", "tiny.toml"))
    assert told.count(f"run runs/{run.name}") == 1
    history, made = written_in(shared)
    epochs, made_alone = written_in(alone)
    assert (made["processes"], made_alone["processes"]) == (2, 1)
    assert [one["epoch"] for one in history] == [1, 2, 3]
    for given, wanted in zip(history, epochs, strict=True):
        assert given["terms"] == pytest.approx(wanted["terms"], rel=1e-2)
    # Single precision: how far apart the two end, of the way that both have come. The tests above
    # compare trainings in double precision.
    start = weights(alone, "clean/*-s0-*")
    given, wanted = (weights(folder, "tiny-*") for folder in (shared, alone))
    way = torch.dist(wanted, start)
    assert way > 0
    assert torch.dist(given, wanted) < 0.05 * way
