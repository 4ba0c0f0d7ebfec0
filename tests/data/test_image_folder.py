"""Folders of images, whole and broken."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trompe.data import read_image
from trompe.data.image_folder import ImageFolder
from trompe.files import write_json
from trompe.interfaces import InputError

Fill = Callable[[str, Sequence[str], int], Path]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Writes n images into each class folder; every image has a colour of its own."""
    drawn = 0

    def write(folder: str, classes: Sequence[str], n: int) -> Path:
        nonlocal drawn
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                colour = (drawn % 250, drawn // 250, 200)
                Image.new("RGB", (12, 10), colour).save(tmp_path / folder / name / f"{i:03d}.png")
                drawn += 1
        return tmp_path

    return write


@pytest.fixture
def root(fill: Fill) -> Path:
    fill("train", ("bus", "car", "van"), 4)
    return fill("test", ("bus", "car", "van"), 2)


def test_train_and_test_folders_are_read_class_by_class(root: Path) -> None:
    train, test = ImageFolder(str(root), size=8).train(), ImageFolder(str(root), size=8).test()
    assert train.class_names == test.class_names == ("bus", "car", "van")
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images.shape == (12, 3, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.images[5, :, 0, 0].tolist() == [5, 0, 200]
    assert test.images[3, :, 7, 7].tolist() == [15, 0, 200]
    assert train.skipped == ()
    assert train.name == root.name


def test_a_val_folder_serves_as_test(fill: Fill) -> None:
    fill("train", ("a", "b"), 2)
    assert len(ImageFolder(str(fill("val", ("a", "b"), 3)), size=8).test()) == 6


def test_images_are_resized_whole_and_bilinear(root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    file = root / "train" / "bus" / "000.png"
    Image.fromarray(pixels).save(file)
    expected = Image.fromarray(pixels).resize((9, 9), Image.Resampling.BILINEAR)
    given = ImageFolder(str(root), size=9).train().images[0]
    assert torch.equal(given, torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_images_of_every_mode_become_three_colours(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    Image.new(mode, (6, 6), 1 if mode in ("1", "P") else None).save(file)
    assert read_image(file, 8).shape == (8, 8, 3)


def test_other_files_and_hidden_folders_are_left_out(root: Path) -> None:
    (root / "train" / "bus" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "list.csv").write_text("a,b")
    assert len(ImageFolder(str(root), size=8).train()) == 12


# --- without train and test folders ---------------------------------------------------------------


def test_a_share_of_each_class_is_held_out(fill: Fill) -> None:
    root = str(fill("", ("a", "b", "c"), 8))
    source = ImageFolder(root, size=8, test_share=0.25)
    train, test = source.train(), source.test()
    assert torch.bincount(train.labels).tolist() == [6, 6, 6]
    assert torch.bincount(test.labels).tolist() == [2, 2, 2]
    colours = [{tuple(i[:, 0, 0].tolist()) for i in part.images} for part in (train, test)]
    assert not colours[0] & colours[1]
    assert len(colours[0] | colours[1]) == 24


def test_the_held_out_share_is_fixed_by_its_seed(fill: Fill) -> None:
    root = str(fill("", ("a", "b"), 12))
    one, again, other = (ImageFolder(root, 8, 0.5, split_seed=s).test() for s in (0, 0, 1))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)


# --- mistakes -------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        ImageFolder(str(tmp_path / "nowhere")).train()


def test_train_without_test_is_refused(fill: Fill) -> None:
    root = fill("train", ("a", "b"), 2)
    with pytest.raises(InputError, match="neither test/ nor val/"):
        ImageFolder(str(root), size=8).train()


def test_classes_that_differ_between_train_and_test_are_named(fill: Fill) -> None:
    fill("train", ("bus", "car"), 2)
    root = fill("test", ("bus", "lorry"), 2)
    with pytest.raises(InputError, match="car, lorry"):
        ImageFolder(str(root), size=8).test()


def test_one_class_only_is_refused(fill: Fill) -> None:
    root = fill("", ("only",), 3)
    with pytest.raises(InputError, match="1 class folders found, at least 2"):
        ImageFolder(str(root), size=8).train()


def test_a_class_without_images_is_named(root: Path) -> None:
    (root / "train" / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no image"):
        ImageFolder(str(root), size=8).train()


@pytest.mark.parametrize("wrong", [{"test_share": 0.0}, {"test_share": 1.0}, {"size": 7}], ids=str)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=rf"data\.{name}"):
        ImageFolder("x", **wrong)


# --- broken images --------------------------------------------------------------------------------


def break_file(file: Path, how: str) -> None:
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "junk": b"junk" * 30}[how])


@pytest.mark.parametrize(
    ("how", "words"), [("empty", "is empty"), ("cut", "cannot be read"), ("junk", "cannot be read")]
)
def test_a_broken_image_is_named(root: Path, how: str, words: str) -> None:
    file = root / "train" / "car" / "002.png"
    break_file(file, how)
    with pytest.raises(InputError, match=rf"{file}: {words}.*--skip-unreadable"):
        ImageFolder(str(root), size=8).train()


@pytest.mark.parametrize("how", ["empty", "cut", "junk"])
def test_a_broken_image_can_be_skipped_and_is_told(root: Path, how: str) -> None:
    file = root / "train" / "car" / "002.png"
    break_file(file, how)
    data = ImageFolder(str(root), size=8, skip_unreadable=True).train()
    assert data.skipped == (str(file),)
    assert data.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert [int(red) for red in data.images[:, 0, 0, 0]] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_nothing_but_broken_images_is_an_error(root: Path) -> None:
    for file in (root / "test").rglob("*.png"):
        break_file(file, "empty")
    with pytest.raises(InputError, match="at least one image"):
        ImageFolder(str(root), size=8, skip_unreadable=True).test()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it can read all the same
@pytest.mark.parametrize("suffix", ["png", "jpg", "ppm", "bmp", "tif", "webp", "gif"])
def test_an_image_cut_or_damaged_anywhere_is_read_or_refused(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(file)
    whole = file.read_bytes()
    step = max(1, len(whole) // 60)
    for position in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        for content in (whole[:position], bytes(flipped)):
            file.write_bytes(content)
            with contextlib.suppress(InputError):
                assert read_image(file, 8).shape == (8, 8, 3)


def test_a_picture_that_would_fill_the_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png", 8)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.png: does not exist"):
        read_image(tmp_path / "no.png", 8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    seen = read_image(tmp_path / f"ramp.{suffix}", None)
    assert (seen == (ramp >> 8)[:, :, None]).all()


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif: has 32-bit or floating-point pixels"):
        read_image(tmp_path / "float.tif", None)


def test_a_name_that_is_not_utf_8_is_read(fill: Fill) -> None:
    root = fill("test", ("a", "b"), 2)
    fill("train", ("a", "b"), 2)
    odd = root / "train" / "a" / os.fsdecode(b"caf\xe9.png")
    (root / "train" / "a" / next((root / "train" / "a").iterdir()).name).rename(odd)
    data = ImageFolder(str(root), size=8)
    assert len(data.contents()["root"]) == 64
    assert len(data.train()) == 4
    write_json(root / "names.json", [str(odd)])
    assert "caf" in json.loads((root / "names.json").read_text())[0]
