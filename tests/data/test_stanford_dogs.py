"""Stanford Dogs' official layout, made by hand."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from trompe.data import read_image
from trompe.data.stanford_dogs import StanfordDogs
from trompe.interfaces import InputError

BREEDS = {  # folder -> label in the lists
    "n02085620-Chihuahua": 1,
    "n02089078-black-and-tan_coonhound": 14,
    "n02116738-African_hunting_dog": 120,
}
NAMES = ("Chihuahua", "black-and-tan_coonhound", "African_hunting_dog")
EACH = 10  # images a breed, of which the first six are for training in the official lists


def files_of(breed: str) -> list[str]:
    return [f"{breed}/{breed.split('-')[0]}_{i}.jpg" for i in range(EACH)]


def write_list(file: Path, names: list[str], labels: list[int]) -> None:
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    savemat(
        file,
        {
            "file_list": cells,
            "annotation_list": cells,
            "labels": np.array(labels, dtype=np.uint8)[:, None],
        },
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dogs")
    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    for at, (breed, label) in enumerate(BREEDS.items()):
        (root / "Images" / breed).mkdir(parents=True)
        for i, name in enumerate(files_of(breed)):
            pixels = np.zeros((20, 40, 3), dtype=np.uint8)  # black beside the square, which
            pixels[:, 10:30] = (80 * at + 5 * i, 100, 200)  # has a colour of its own
            Image.fromarray(pixels).save(root / "Images" / name, quality=95)
            names, labels = parts["train" if i < 6 else "test"]
            names.append(name)
            labels.append(label)
    for split, (names, labels) in parts.items():
        write_list(root / f"{split}_list.mat", names, labels)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole, tmp_path / "dogs"))


def test_the_official_split_follows_the_lists(whole: Path) -> None:
    source = StanfordDogs(str(whole), size=10, split="official")
    for data, numbers in ((source.train(), range(6)), (source.test(), range(6, EACH))):
        assert data.class_names == NAMES
        assert data.labels.tolist() == [at for at in range(3) for _ in numbers]
        reds = data.images[:, 0, 5, 5].float()
        expected = torch.tensor([80.0 * at + 5 * i for at in range(3) for i in numbers])
        torch.testing.assert_close(reds, expected, rtol=0, atol=4)  # JPEG is not exact


def test_a_random_split_is_stratified_needs_no_lists_and_follows_its_seed(root: Path) -> None:
    for split in ("train", "test"):
        (root / f"{split}_list.mat").unlink()
    first, second = StanfordDogs(str(root), size=8), StanfordDogs(str(root), size=8, split_seed=1)
    assert first.train().labels.bincount().tolist() == [9, 9, 9]
    assert first.test().labels.tolist() == [0, 1, 2]
    assert torch.equal(first.test().images, first.test().images)
    assert not torch.equal(first.test().images, second.test().images)
    seen = torch.cat((first.train().images, first.test().images)).flatten(1)
    assert len(seen.unique(dim=0)) == 3 * EACH


def test_images_are_the_centre_square(whole: Path) -> None:
    images = StanfordDogs(str(whole), size=20).train().images
    assert images.shape[1:] == (3, 20, 20)
    assert images[:, 2].min() > 120  # the frame's black sides are gone


def test_the_whole_frame_is_read_where_no_crop_is_asked_for(whole: Path) -> None:
    file = whole / "Images" / files_of("n02085620-Chihuahua")[0]
    assert read_image(file, 20)[10, 0].max() < 40
    assert read_image(file, 20, crop=True)[10, 0, 2] > 120
    assert read_image(file, None).shape == (20, 40, 3)
    tall = Image.open(file).transpose(Image.Transpose.ROTATE_90)
    tall.save(whole / "tall.png")
    assert read_image(whole / "tall.png", 20, crop=True)[0, 10, 2] > 120
    (whole / "tall.png").unlink()


@pytest.mark.parametrize("split", ["official", "random"])
def test_some_breeds_are_enough(root: Path, split: str) -> None:
    shutil.rmtree(root / "Images" / "n02089078-black-and-tan_coonhound")
    source = StanfordDogs(str(root), size=8, split=split)  # type: ignore[arg-type]
    assert source.train().class_names == ("Chihuahua", "African_hunting_dog")
    assert set(source.test().labels.tolist()) == {0, 1}


def test_the_folder_images_is_taken_too(whole: Path) -> None:
    assert len(StanfordDogs(str(whole / "Images"), size=8, split="official").test()) == 12


def test_a_folder_without_the_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no folder Images.*images\.tar"):
        StanfordDogs(str(tmp_path)).train()
    (tmp_path / "Images" / "cats").mkdir(parents=True)
    with pytest.raises(InputError, match=r"0 breeds.*n02085620-Chihuahua"):
        StanfordDogs(str(tmp_path)).train()


def test_a_breed_without_images_is_named(root: Path) -> None:
    shutil.rmtree(root / "Images" / "n02085620-Chihuahua")
    (root / "Images" / "n02085620-Chihuahua").mkdir()
    with pytest.raises(InputError, match="n02085620-Chihuahua: holds no image"):
        StanfordDogs(str(root)).train()
    with pytest.raises(InputError, match="n02085620-Chihuahua: holds no image"):
        StanfordDogs(str(root), split="official").train()


def test_a_missing_list_is_named(root: Path) -> None:
    (root / "test_list.mat").unlink()
    with pytest.raises(InputError, match=r"test_list\.mat: .*lists\.tar.*split = \"random\""):
        StanfordDogs(str(root), split="official").test()


def test_a_damaged_list_is_named(root: Path) -> None:
    (root / "train_list.mat").write_bytes(b"not a list at all" * 20)
    with pytest.raises(InputError, match=r"train_list\.mat: cannot be read"):
        StanfordDogs(str(root), split="official").train()
    savemat(root / "train_list.mat", {"labels": [1]})
    with pytest.raises(InputError, match=r"train_list\.mat: has no 'file_list'"):
        StanfordDogs(str(root), split="official").train()
    write_list(root / "train_list.mat", files_of("n02085620-Chihuahua"), [1] * (EACH - 1) + [2])
    with pytest.raises(InputError, match=r"train_list\.mat, entry 10: .*n02085620.* label 2.* 1"):
        StanfordDogs(str(root), split="official").train()
    write_list(root / "train_list.mat", files_of("n02085620-Chihuahua"), [1])
    with pytest.raises(InputError, match=r"train_list\.mat: names 10 files but 1 labels"):
        StanfordDogs(str(root), split="official").train()


def test_a_list_of_other_breeds_only_is_refused(root: Path) -> None:
    write_list(root / "test_list.mat", files_of("n02085782-Japanese_spaniel"), [2] * EACH)
    with pytest.raises(InputError, match=r"test_list\.mat: names no image of the breeds in"):
        StanfordDogs(str(root), split="official").test()


@pytest.mark.parametrize("split", ["official", "random"])
def test_an_unreadable_image_is_named_or_skipped(root: Path, split: str) -> None:
    broken = root / "Images" / files_of("n02085620-Chihuahua")[0]
    broken.write_bytes(b"")
    settings = {"size": 8, "split": split, "split_seed": 1}
    source = StanfordDogs(str(root), **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"_0\.jpg: is empty"):
        source.train()
    source = StanfordDogs(str(root), **settings, skip_unreadable=True)  # type: ignore[arg-type]
    assert source.train().skipped == (str(broken),)


def test_a_listed_image_that_is_not_there_is_named(root: Path) -> None:
    (root / "Images" / files_of("n02085620-Chihuahua")[0]).unlink()
    with pytest.raises(InputError, match=r"n02085620_0\.jpg: does not exist"):
        StanfordDogs(str(root), split="official").train()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="at least 8"):
        StanfordDogs("x", size=4)
    with pytest.raises(InputError, match=r"held_out = 1\.5: must lie between 0 and 1"):
        StanfordDogs("x", held_out=1.5)
