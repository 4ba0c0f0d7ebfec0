"""CUB-200-2011's official layout, made by hand."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from trompe.data.cub import Cub
from trompe.interfaces import InputError

# number, class, in the training set, colour
IMAGES = [(1, 2, 1, 10), (2, 1, 0, 20), (3, 1, 1, 30), (4, 2, 0, 40), (5, 10, 1, 50)]
NAMES = {1: "001.Albatross", 2: "002.Auklet", 10: "010.Blackbird"}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "CUB_200_2011"
    folder.mkdir()
    for number, label, _, colour in IMAGES:
        file = folder / "images" / NAMES[label] / f"bird {number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (13, 11), (colour, 0, 0)).save(file)
    write = {
        "classes": [f"{i} {name}" for i, name in NAMES.items()],
        "images": [f"{n} {NAMES[label]}/bird {n}.jpg" for n, label, _, _ in IMAGES],
        "image_class_labels": [f"{n} {label}" for n, label, _, _ in IMAGES],
        "train_test_split": [f"{n} {train}" for n, _, train, _ in IMAGES],
    }
    for name, lines in write.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder.parent


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole, tmp_path / "data")) / "CUB_200_2011"


@pytest.mark.parametrize("inside", [False, True])
def test_images_labels_and_names_follow_the_files_and_the_official_split(
    whole: Path, inside: bool
) -> None:
    data = Cub(str(whole / "CUB_200_2011" if inside else whole), size=8)
    for given, train in ((data.train(), 1), (data.test(), 0)):
        expected = [(label, colour) for _, label, in_train, colour in IMAGES if in_train == train]
        labels = [list(NAMES).index(label) for label, _ in expected]
        assert given.labels.tolist() == labels
        assert given.images.shape == (len(expected), 3, 8, 8)
        reds = given.images[:, 0].float().mean((1, 2))
        colours = torch.tensor([colour for _, colour in expected]).float()
        torch.testing.assert_close(reds, colours, rtol=0, atol=3)  # JPEG is not exact
        assert given.class_names == tuple(NAMES.values())


def test_a_folder_without_the_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images\.txt.*CUB_200_2011\.tgz"):
        Cub(str(tmp_path)).train()


@pytest.mark.parametrize("file", ["image_class_labels", "train_test_split"])
def test_a_missing_line_is_named(root: Path, file: str) -> None:
    lines = (root / f"{file}.txt").read_text().splitlines()
    (root / f"{file}.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(InputError, match=rf"{file}\.txt.*image 5"):
        Cub(str(root), size=8).train()


def test_a_damaged_line_is_named(root: Path) -> None:
    (root / "images.txt").write_text("1 a.jpg\nbird\n")
    with pytest.raises(InputError, match=r"images\.txt, line 2: is 'bird'"):
        Cub(str(root), size=8).train()


def test_a_class_without_a_name_is_refused(root: Path) -> None:
    (root / "classes.txt").write_text("1 001.Albatross\n2 002.Auklet\n")
    with pytest.raises(InputError, match=r"classes\.txt.*class 10"):
        Cub(str(root), size=8).train()


def test_an_empty_split_is_refused(root: Path) -> None:
    (root / "train_test_split.txt").write_text("".join(f"{n} 1\n" for n, *_ in IMAGES))
    with pytest.raises(InputError, match="no image into the test set"):
        Cub(str(root), size=8).test()


def test_an_unreadable_image_is_named_or_skipped(root: Path) -> None:
    broken = root / "images" / NAMES[1] / "bird 3.jpg"
    broken.write_bytes(b"")
    with pytest.raises(InputError, match=r"bird 3\.jpg: is empty"):
        Cub(str(root), size=8).train()
    data = Cub(str(root), size=8, skip_unreadable=True).train()
    assert len(data) == 2
    assert data.skipped == (str(broken),)


def test_a_size_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="at least 8"):
        Cub("x", size=4)


def test_a_split_of_other_words_is_refused_and_blank_lines_are_not(root: Path) -> None:
    file = root / "train_test_split.txt"
    text = file.read_text()
    file.write_text("\ufeff" + text + "\n", encoding="utf-8")
    assert len(Cub(str(root.parent), size=8).train()) == 3
    file.write_text(text.replace("2 0", "2 yes"))
    with pytest.raises(InputError, match=r"says 'yes' of image 2; it must be 1 \(training\) or 0"):
        Cub(str(root.parent), size=8).train()
