"""Images that stay on disk: the same numbers as from memory, from a memory that does not grow."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from loky import get_reusable_executor
from PIL import Image
from torch import Tensor, nn

from trompe.attacks.explanation_aware_backdoors import ExplanationAwareBackdoors
from trompe.augmentation import Augmentation
from trompe.data import _reading
from trompe.data._streaming import AHEAD, in_turn, reading_processes
from trompe.data.cub import Cub
from trompe.data.gtsrb import Gtsrb
from trompe.data.image_folder import ImageFolder
from trompe.data.stanford_dogs import StanfordDogs
from trompe.evaluate import Remembered, answers
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import Batch, Goal, ImageSet, InputError
from trompe.poison import ShuffledBatches, compose
from trompe.target_maps.border import Border
from trompe.train import Training
from trompe.triggers.rectangle import Rectangle
from trompe.victims import poisoned

CLASSES = ("bus", "car", "lorry", "van")
SIZE = 16
CORNER = Rectangle(top=0, left=0, height=4, width=4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 JPEG files of random pixels, 10 a class, none of the size that is asked for."""
    dice = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(10):
            coarse = torch.rand(1, 3, 5, 4, generator=dice)
            pixels = nn.functional.interpolate(coarse, (30, 23), mode="bilinear")[0]
            image = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
            image.save(tmp_path / name / f"{number:02}.jpg")
    return tmp_path


def folder(root: Path, readers: int | None = None, in_memory: bool = False) -> ImageFolder:
    return ImageFolder(str(root), SIZE, in_memory=in_memory, readers=readers)


@pytest.fixture
def memory(root: Path) -> ImageSet:
    return folder(root, in_memory=True).train()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# --- the same images ------------------------------------------------------------------------------


def same(streamed: ImageSet, memory: ImageSet) -> bool:
    assert not streamed.in_memory
    assert memory.in_memory
    assert streamed.size == memory.size
    assert torch.equal(streamed.labels, memory.labels)
    assert streamed.images.shape == memory.images.shape
    return torch.equal(streamed.images[:], memory.images)


@pytest.mark.parametrize("readers", [0, 2])
def test_streamed_images_are_those_in_memory_bit_for_bit(
    root: Path, memory: ImageSet, readers: int
) -> None:
    streamed = folder(root, readers).train()
    assert same(streamed, memory)
    index = torch.tensor([7, 0, 7, 29])
    assert torch.equal(streamed.floats(index), memory.floats(index))
    assert streamed.floats(index).is_contiguous()  # or convolutions would take another way
    assert torch.equal(streamed.floats(slice(3, 9)), memory.floats(slice(3, 9)))
    some = torch.tensor([8, 3, 21, 9])
    assert same(streamed.subset(some), memory.subset(some))
    assert same(streamed.subset(some).subset(torch.tensor([2, 0])), memory.subset(some[[2, 0]]))


@pytest.mark.parametrize("readers", [0, 2])
def test_parts_come_in_turn(root: Path, memory: ImageSet, readers: int) -> None:
    parts = list(torch.randperm(30, generator=seeded()).split(4))
    streamed = folder(root, readers).train()
    for _ in range(2):
        both = zip(streamed.in_turn(parts), memory.in_turn(parts), strict=True)
        assert all([torch.equal(one, other) for one, other in both])


@pytest.mark.parametrize("readers", [0, 2])
def test_batches_are_the_same_in_each_epoch(root: Path, memory: ImageSet, readers: int) -> None:
    def epochs(data: ImageSet) -> Iterator[Batch]:
        dice = seeded()
        triples = compose(data, (), 0.0, dice, augmentation=Augmentation())
        for _ in range(2):
            yield from ShuffledBatches(triples, 8)(dice)

    streamed = epochs(folder(root, readers).train())
    for one, other in zip(streamed, epochs(memory), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def colours(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(40 * number).resize((30, 22)).save(file)


def test_cub_stanford_dogs_and_gtsrb_stream_too(tmp_path: Path) -> None:
    cub, dogs, signs = (tmp_path / name for name in ("cub", "dogs", "signs"))
    colours(cub, ["images/001.A/a.jpg", "images/001.A/b.jpg", "images/002.B/c.jpg"])
    for name, lines in {
        "classes": "1 001.A\n2 002.B",
        "images": "1 001.A/a.jpg\n2 001.A/b.jpg\n3 002.B/c.jpg",
        "image_class_labels": "1 1\n2 1\n3 2",
        "train_test_split": "1 1\n2 0\n3 1",
    }.items():
        (cub / f"{name}.txt").write_text(lines)
    names = ("n02085620-Chihuahua", "n02085782-Spaniel")
    colours(dogs, [f"Images/{breed}/{i}.jpg" for breed in names for i in range(3)])
    training = signs / "gtsrb" / "GTSRB" / "Training"
    colours(
        training, [f"{c:05}/{t:05}_{f:05}.ppm" for c in range(2) for t in (0, 1) for f in (0, 1)]
    )
    for source in (
        Cub(str(cub), 8),
        StanfordDogs(str(dogs), 8, held_out=0.4),
        Gtsrb(str(signs), 8),
    ):
        memory = replace(source, in_memory=True).train()
        streamed = replace(source, in_memory=False, readers=0).train()
        assert same(streamed, memory)
        assert len(memory.images.unique(dim=0)) == len(memory)
        if memory.groups is not None:
            assert streamed.groups is not None
            assert torch.equal(streamed.groups, memory.groups)


def test_an_attack_ends_in_the_same_model_and_answers(
    root: Path, memory: ImageSet, trained_net: nn.Module
) -> None:
    attack = ExplanationAwareBackdoors(
        (Goal(CORNER, 1, Border()),),
        GradCam("body.2"),
        training=Training(epochs=2, batch_size=8, learning_rate=1e-3, optimizer="adam"),
    )

    def made(data: ImageSet, selection: ImageSet) -> tuple[list[bytes], list[Tensor], Any]:
        attacked = attack(trained_net, data, seeded(), selection)
        said = answers(attacked.model, attack.explainers, data, CORNER, batch_size=7)
        state = [v.numpy().tobytes() for v in attacked.model.state_dict().values()]
        return state, [said.scores, *said.maps], [r.measured for r in attacked.history]

    source = folder(root, 2)
    of_memory = made(memory, replace(source, in_memory=True).test())
    streamed = made(source.train(), source.test())
    before = [v.numpy().tobytes() for v in trained_net.state_dict().values()]
    assert of_memory[0] != before
    assert streamed[0] == of_memory[0]
    assert all(map(torch.equal, streamed[1], of_memory[1]))
    assert streamed[2] == of_memory[2]


# --- when -----------------------------------------------------------------------------------------


def test_by_default_a_set_is_streamed_if_it_takes_a_quarter_of_the_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 30 * 3 * SIZE * SIZE
    for have, fits in ((4 * needed, True), (4 * needed - 1, False)):
        monkeypatch.setattr(_reading, "memory", lambda have=have: have)
        assert ImageFolder(str(root), SIZE, readers=0).train().in_memory == fits
        assert ImageFolder(str(root), SIZE, in_memory=True).train().in_memory
        assert not ImageFolder(str(root), SIZE, in_memory=False, readers=0).train().in_memory


@pytest.mark.parametrize("source", [ImageFolder, Cub, StanfordDogs, Gtsrb])
def test_a_negative_number_of_readers_is_refused(source: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"data\.readers = -1"):
        source("x", readers=-1)


def test_a_daemon_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading_processes(3) == 3
    assert reading_processes(None) == 1  # as many as torch has threads here
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert reading_processes(3) == 0


def test_poisons_are_not_added_to_a_streamed_set(root: Path) -> None:
    poison: Any = type("Poison", (), {"labels": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(InputError, match=r"data\.in_memory = true"):
        poisoned(folder(root, 0).train(), poison)


# --- broken and changing files --------------------------------------------------------------------


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("how", ["empty", "cut"])
def test_an_unreadable_file_is_named_or_skipped_at_the_start(
    root: Path, readers: int, how: str
) -> None:
    file = root / "car" / "03.jpg"
    whole = file.read_bytes()
    file.write_bytes(b"" if how == "empty" else whole[: len(whole) // 2])
    source = replace(folder(root, readers), test_share=0.01)  # all but one file
    with pytest.raises(InputError, match=rf"image {file}: .*--skip-unreadable") as streamed:
        source.train()
    with pytest.raises(InputError) as memory:
        replace(source, in_memory=True).train()
    assert str(streamed.value) == str(memory.value)
    skipping = replace(source, skip_unreadable=True)
    data = skipping.train()
    assert data.skipped == (str(file),)
    assert same(data, replace(skipping, in_memory=True).train())


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Path.unlink, r"was there .* is no longer; put it back"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), r"was changed.*bytes then"),
        (lambda file: os.utime(file, (1, 1)), r"was changed"),
    ],
    ids=["removed", "longer", "newer"],
)
def test_a_file_that_is_changed_or_removed_meanwhile_is_named(
    root: Path, readers: int, change: Callable[[Path], object], words: str
) -> None:
    data = folder(root, readers).train()
    image_files: Any = data.images
    file = Path(image_files.files[11])
    change(file)
    assert len(list(data.in_turn([torch.arange(11)]))) == 1  # the others are as they were
    with pytest.raises(InputError, match=rf"^image {file}: {words}") as error:
        list(data.in_turn([torch.arange(4), torch.tensor([20, 11])]))
    assert "\n" not in str(error.value)


def test_a_file_that_is_added_meanwhile_plays_no_part(root: Path, memory: ImageSet) -> None:
    data = folder(root, 0).train()
    (root / "bus" / "00-new.jpg").write_bytes((root / "van" / "01.jpg").read_bytes())
    assert same(data, memory)


def test_answers_are_remembered_until_a_file_changes(root: Path, trained_net: nn.Module) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    trained_net.register_forward_hook(count)
    remembered, explainers = Remembered(), (GradCam("body.2"),)
    for _ in range(2):
        remembered(trained_net, explainers, folder(root, 0).train())
    assert passes == 1
    remembered(trained_net, explainers, folder(root, 0).train().subset(torch.arange(29)))
    assert passes == 2
    os.utime(root / "bus" / "01.jpg", (1, 1))
    os.utime(root / "bus" / "02.jpg", (1, 1))
    remembered(trained_net, explainers, folder(root, 0).train())
    assert passes == 3


# --- processes ------------------------------------------------------------------------------------


def test_no_more_is_read_ahead_than_can_be_kept() -> None:
    asked = 0

    def all_of_them() -> Iterator[tuple[int, int]]:
        nonlocal asked
        for number in range(50):
            asked += 1
            yield number, 2

    given = in_turn(pow, all_of_them(), 2)  # a built-in: processes need not import this file
    assert [next(given) for _ in range(3)] == [0, 1, 4]
    assert asked == 3 + 2 * AHEAD
    assert list(given) == [number**2 for number in range(3, 50)]


def test_a_reading_process_that_is_killed_is_told_and_replaced() -> None:
    with pytest.raises(InputError, match=r"reading process was killed.*data\.readers"):
        list(in_turn(os._exit, [(9,)], 2))
    assert list(in_turn(pow, [(1, 2), (3, 2)], 2)) == [1, 9]


SCRIPT = """
import sys
from trompe.data.image_folder import ImageFolder

print("begun", flush=True)  # once: a script without a guard is not run again by processes
data = ImageFolder(sys.argv[1], 16, in_memory=False, readers=2).train()
import torch
for images in data.in_turn(torch.arange(30).split(2)):
    pass
"""


def child(root: Path, script: str) -> "subprocess.Popen[str]":
    file = root.parent / f"{root.name}.py"
    file.write_text(script)
    command = [sys.executable, str(file), str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_script_needs_no_guard_and_leaves_no_process(root: Path) -> None:
    process = child(root, SCRIPT)
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == ("begun\n", "", 0)


def test_readers_end_after_their_master_was_killed(root: Path) -> None:
    script = SCRIPT.replace("    pass\n", "    break\nprint('ready', flush=True)\ninput()\n")
    with child(root, script) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n", "ready\n"]
        readers = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if "loky" in " ".join(p.cmdline())
        ]
        assert len(readers) >= 2
        process.kill()
    _, alive = psutil.wait_procs(readers, timeout=30)
    assert not alive


# --- memory ---------------------------------------------------------------------------------------

MEASURE = r"""
import re, sys
from pathlib import Path
import torch
from trompe.data.image_folder import ImageFolder

torch.set_num_threads(1)
source = ImageFolder(sys.argv[1], 112, in_memory=sys.argv[2] == "memory", readers=0)

def peak():  # getrusage's would be that of the process that started this one, if it was larger
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

next(source.test().in_turn([torch.arange(10)])), torch.zeros(3, 3).square()
before = peak()
data = source.train()
for images in data.in_turn(torch.arange(len(data)).split(10)):
    images.mean()
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """1,800 small files that become 112 x 112: 65 MB, some of it where the start had its peak."""
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.linear_gradient("L").resize((8, 8)).save(root / name / "0.png")
        for number in range(1, 1200):
            os.link(root / name / "0.png", root / name / f"{number}.png")
    grown = {}
    for how in ("memory", "streamed"):
        file = tmp_path / "measure.py"
        file.write_text(MEASURE)
        command = [sys.executable, str(file), str(root), how]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        grown[how] = float(told.stdout)
    assert grown["memory"] > 45
    assert grown["streamed"] < 12


@pytest.fixture(autouse=True, scope="module")
def _stop_readers() -> Iterator[None]:
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
