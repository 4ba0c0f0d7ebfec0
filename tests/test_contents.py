"""What a run is made from: changed files make another one, moved files the same."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trompe
from trompe import catalog
from trompe.classifier import ModelSpec
from trompe.data.cub import Cub
from trompe.data.gtsrb import Gtsrb
from trompe.data.image_folder import ImageFolder
from trompe.data.stanford_dogs import StanfordDogs
from trompe.data.table import Table
from trompe.interfaces import InputError
from trompe.target_maps.detected_stickers import DetectedStickers
from trompe.triggers.sticker import Sticker
from trompe.triggers.stickers import Stickers

SOURCES: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "image_folder": (
        lambda root: ImageFolder(str(root)),
        {"cat/1.jpg": "a picture", "dog/2.jpg": "a picture"},
    ),
    "image_folder, split": (
        lambda root: ImageFolder(str(root)),
        {f"{part}/{name}/1.jpg": "picture" for part in ("train", "val") for name in "ab"},
    ),
    "gtsrb": (
        lambda root: Gtsrb(str(root)),
        {
            "gtsrb/GTSRB/Training/00000/00000_00000.ppm": "a picture",
            "gtsrb/GTSRB/Final_Test/Images/00000.ppm": "a picture",
            "gtsrb/GT-final_test.csv": "Filename;ClassId\n00000.ppm;1\n",
        },
    ),
    "cub": (
        lambda root: Cub(str(root)),
        {
            "images/a.jpg": "a picture",
            "images.txt": "1 a.jpg\n",
            "classes.txt": "1 albatross\n",
            "image_class_labels.txt": "1 1\n",
            "train_test_split.txt": "1 1\n",
        },
    ),
    "stanford_dogs": (
        lambda root: StanfordDogs(str(root)),
        {f"Images/n0000000{i}-breed/1.jpg": "a picture" for i in (1, 2)},
    ),
    "table": (lambda root: Table(str(root / "own.csv"), "ill"), {"own.csv": "age,ill\n1,2\n"}),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], Any]]:
    make, files = SOURCES[request.param]
    for name, text in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    return tmp_path / "here", make


def test_data_are_the_same_wherever_and_whenever(
    source: tuple[Path, Callable[[Path], Any]],
) -> None:
    root, make = source
    before = make(root).contents()
    (key,) = before
    assert key in {field.name for field in dataclasses.fields(make(root))}
    there = root.with_name("there")
    shutil.copytree(root, there)
    for file in there.rglob("*"):
        os.utime(file, (4e9, 4e9))  # a clock that is a century ahead
    assert make(there).contents() == before


def test_a_file_more_or_less_or_of_another_size_makes_other_data(
    source: tuple[Path, Callable[[Path], Any]],
) -> None:
    root, make = source
    seen = {make(root).contents().popitem()[1]}
    images = sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".ppm", ".csv"))
    for image in images:
        image.write_text(image.read_text() + "!")
        seen.add(make(root).contents().popitem()[1])
    assert len(seen) == 1 + len(images)
    if images[0].suffix != ".csv":
        shutil.copy(images[0], images[0].with_stem("9"))
        if not (root / "images.txt").exists():  # what is not listed is not read
            seen.add(make(root).contents().popitem()[1])
            assert len(seen) == 2 + len(images)
            images[0].with_stem("9").unlink()
            images[0].rename(images[0].with_stem("8"))
            seen.add(make(root).contents().popitem()[1])
            assert len(seen) == 3 + len(images)


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("gtsrb", "gtsrb/GT-final_test.csv", "Filename;ClassId\n00000.ppm;2\n"),
        ("cub", "train_test_split.txt", "1 0\n"),
        ("table", "own.csv", "age,ill\n1,3\n"),
    ],
)
def test_a_digit_of_a_list_matters(tmp_path: Path, name: str, file: str, text: str) -> None:
    make, files = SOURCES[name]
    found = []
    for content in (files, {**files, file: text}):
        for part, of_part in content.items():
            (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part).write_text(of_part)
        found.append(make(tmp_path).contents())
    assert found[0] != found[1]


@pytest.mark.parametrize("name", SOURCES)
def test_data_that_are_not_there_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="nowhere"):
        SOURCES[name][0](tmp_path / "nowhere").contents()


@pytest.mark.parametrize("name", catalog.names("data"))
def test_all_data_that_lie_in_files_say_what_is_in_them(name: str) -> None:
    source = catalog.find("data", name)
    fields = {field.name for field in dataclasses.fields(source)}
    assert hasattr(source, "contents") == bool(fields & {"root", "file"})


@pytest.mark.parametrize("kind", [Sticker, Stickers, DetectedStickers])
def test_pictures_count_by_their_bytes(tmp_path: Path, kind: Any) -> None:
    assert kind().contents() == {}
    (tmp_path / "a.png").write_bytes(b"1")
    one = kind(picture=str(tmp_path / "a.png")).contents()
    (tmp_path / "a.png").write_bytes(b"2")
    assert kind(picture=str(tmp_path / "a.png")).contents() != one
    with pytest.raises(InputError, match=r"b\.png: cannot be read"):
        kind(picture=str(tmp_path / "b.png")).contents()


def experiment(**changes: Any) -> trompe.Experiment:
    sticker = {"kind": "sticker", "picture": changes.pop("picture", "smiley")}
    goal = {"trigger": sticker, "label": 1, "wanted_map": {"kind": "border"}}
    attack = {"kind": "explanation_aware_backdoors", "goals": [goal]}
    table = {"name": "x", "data": {"kind": "signs"}, "attack": attack}
    return trompe.read_experiment({**table, **changes})


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("reference", "reference"),
        ("witness", "witness"),
        ("model", "model.weights"),
        ("picture", "attack.goals.0.trigger.picture"),
    ],
)
def test_a_run_is_named_after_what_its_files_hold(tmp_path: Path, key: str, where: str) -> None:
    def named(file: Path) -> Path:
        given: Any = {"weights": str(file)} if key == "model" else str(file)
        made = experiment(**{key: given})
        assert set(catalog.contents(made)) == {where}
        return trompe.run_folder(made, tmp_path).path

    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    here.write_bytes(b"weights")
    there.write_bytes(b"weights")
    os.utime(there, (0, 0))
    before = named(here)
    assert before == named(there)
    here.write_bytes(b"Weights")
    assert named(here) != before
    here.unlink()
    with pytest.raises(InputError, match=r"here\.safetensors"):
        named(here)


def test_what_needs_no_file_is_named_by_its_settings() -> None:
    assert catalog.contents(experiment()) == {}
    assert ModelSpec("resnet18", "IMAGENET1K_V1").contents() == {}
    shipped = catalog.contents(experiment(reference="shipped:signs_resnet20_seed0"))
    assert set(shipped) == {"reference"}
