"""GTSRB in torchvision's layout, made by hand."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from trompe.data.gtsrb import CLASS_NAMES, Gtsrb
from trompe.interfaces import InputError

TRACKS, FRAMES = 2, 3


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 43 classes, two tracks of three frames each, and 43 test images in another order."""
    root = tmp_path_factory.mktemp("data")
    for label in range(43):
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for track in range(TRACKS):
            for frame in range(FRAMES):
                image = Image.new("RGB", (9, 11), (label, track, frame))
                image.save(folder / f"{track:05d}_{frame:05d}.ppm")
    folder = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(43):
        label = (i * 7) % 43
        Image.new("RGB", (9, 11), (label, 100, i)).save(folder / f"{i:05d}.ppm")
        rows.append(f"{i:05d}.ppm;9;11;1;1;7;9;{label}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


def test_training_images_labels_and_tracks(whole: Path) -> None:
    data = Gtsrb(str(whole), size=8).train()
    assert len(data) == 43 * TRACKS * FRAMES
    assert data.images.shape[1:] == (3, 8, 8)
    assert torch.equal(data.images[:, 0, 0, 0].long(), data.labels)
    assert data.groups is not None
    assert len(data.groups.unique()) == 43 * TRACKS
    for group in data.groups.unique():
        members = data.images[data.groups == group, :, 0, 0].tolist()
        assert len({(label, track) for label, track, _ in members}) == 1
        assert sorted(frame for _, _, frame in members) == list(range(FRAMES))


def test_test_images_take_their_labels_from_the_table(whole: Path) -> None:
    data = Gtsrb(str(whole), size=8).test()
    assert len(data) == 43
    assert data.labels.tolist() == [(i * 7) % 43 for i in range(43)]
    assert torch.equal(data.images[:, 0, 0, 0].long(), data.labels)
    assert data.groups is None


def test_there_is_a_name_for_each_of_the_43_classes() -> None:
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 43
    assert CLASS_NAMES[13] == "give way"
    assert CLASS_NAMES[14] == "stop"
    assert CLASS_NAMES[1] == "speed limit 30"
    assert CLASS_NAMES[40] == "roundabout"


def test_a_missing_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    for read in (Gtsrb(str(tmp_path)).train, Gtsrb(str(tmp_path)).test):
        with pytest.raises(InputError, match=rf"{tmp_path}/gtsrb: .*data\.root.*download"):
            read()


@pytest.mark.parametrize(
    ("split", "missing"),
    [("train", "GTSRB/Training"), ("test", "GT-final_test.csv"), ("test", "GTSRB/Final_Test")],
)
def test_a_missing_part_is_told(root: Path, split: str, missing: str) -> None:
    path = root / "gtsrb" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="gtsrb"):
        getattr(Gtsrb(str(root), size=8), split)()


def test_an_empty_training_folder_is_told(root: Path) -> None:
    shutil.rmtree(root / "gtsrb" / "GTSRB" / "Training")
    (root / "gtsrb" / "GTSRB" / "Training").mkdir()
    with pytest.raises(InputError, match="gtsrb"):
        Gtsrb(str(root), size=8).train()


def test_missing_classes_do_not_shift_the_labels(root: Path) -> None:
    """Refused, or read under the right names; never read under wrong ones."""
    for label in (0, 5, 30):
        shutil.rmtree(root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}")
    try:
        data = Gtsrb(str(root), size=8).train()
    except InputError:
        return
    assert torch.equal(data.images[:, 0, 0, 0].long(), data.labels)


@pytest.mark.parametrize("rows", [["ClassId"], ["Filename;ClassId", "00000.ppm;x"], ["a;b", "1;2"]])
def test_a_damaged_table_is_told(root: Path, rows: Sequence[str]) -> None:
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows))
    with pytest.raises(InputError):
        Gtsrb(str(root), size=8).test()


def test_a_label_beyond_the_classes_is_told(root: Path) -> None:
    table = root / "gtsrb" / "GT-final_test.csv"
    table.write_text(table.read_text().replace(";42\n", ";43\n"))
    with pytest.raises(InputError, match=r"0 to 43.* 43 class names"):
        Gtsrb(str(root), size=8).test()


@pytest.mark.parametrize(("how", "words"), [("empty", "is empty"), ("cut", "cannot be read")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_image_is_named_or_skipped(root: Path, how: str, words: str, split: str) -> None:
    base = root / "gtsrb" / "GTSRB"
    of_split = {"train": "Training/00007/00001_00002.ppm", "test": "Final_Test/Images/00011.ppm"}
    file = base / of_split[split]
    file.write_bytes(b"" if how == "empty" else file.read_bytes()[:60])
    with pytest.raises(InputError, match=rf"{file}: {words}"):
        getattr(Gtsrb(str(root), size=8), split)()
    data = getattr(Gtsrb(str(root), size=8, skip_unreadable=True), split)()
    assert data.skipped == (str(file),)
    assert len(data) == {"train": 43 * TRACKS * FRAMES - 1, "test": 42}[split]
    assert torch.equal(data.images[:, 0, 0, 0].long(), data.labels)
    if data.groups is not None:
        assert len(data.groups) == len(data)
        assert int((torch.bincount(data.groups) == FRAMES - 1).sum()) == 1


def test_an_image_that_the_table_names_and_is_not_there_is_named(root: Path) -> None:
    (root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00020.ppm").unlink()
    with pytest.raises(InputError, match=r"00020\.ppm: does not exist"):
        Gtsrb(str(root), size=8).test()


def test_a_stray_file_and_a_size_that_cannot_be_are_refused(root: Path) -> None:
    folder = root / "gtsrb" / "GTSRB" / "Training" / "00003"
    shutil.copy(next(folder.iterdir()), folder / "copy.ppm")
    with pytest.raises(InputError, match=r"copy\.ppm: is not called <track>_<frame>\.ppm"):
        Gtsrb(str(root), size=8).train()
    with pytest.raises(InputError, match="size = -3: must be at least 8 pixels"):
        Gtsrb(str(root), size=-3)
