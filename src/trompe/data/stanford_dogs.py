"""Stanford Dogs (Khosla et al. 2011) in its official folder layout."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from scipy.io import loadmat

from trompe.data._contents import hash_of_files
from trompe.data._reading import IMG_EXTENSIONS, check_readers, read_images
from trompe.data._splits import check_held_out, stratified_split
from trompe.interfaces import ImageSet, InputError

__all__ = ["StanfordDogs"]

_BREED = re.compile(r"n\d{8}-(.+)")


@dataclass(frozen=True)
class StanfordDogs:
    """root/Images/n02085620-Chihuahua/*.jpg ... as images.tar unpacks; any of the 120 breeds.

    split: "random" holds out the share `held_out`, in (0, 1), of each breed, drawn by split_seed;
    elsewhere its halves serve validation and test, so that 0.1 is the 90/5/5 of Zhang, Gao & Su
    2021. "official" reads train_list.mat and test_list.mat beside Images/, as lists.tar unpacks.
    size: the centre square of each image is resized to size x size pixels. All 20,580 images at
    224 pixels take 3.1 GB. Fetch the archives from http://vision.stanford.edu/aditya86/ImageNetDogs/.
    in_memory, readers: see `read_images`; they change no number.
    """

    root: str
    size: int = 224
    split: Literal["random", "official"] = "random"
    held_out: float = 0.1
    split_seed: int = 0
    skip_unreadable: bool = False
    in_memory: bool | None = None
    readers: int | None = None

    def __post_init__(self) -> None:
        if self.size < 8:
            raise InputError(f"data.size = {self.size}: must be at least 8 pixels")
        check_readers(self.readers)
        check_held_out(self.held_out)

    def train(self) -> ImageSet:
        return self._read("train")

    def test(self) -> ImageSet:
        return self._read("test")

    def contents(self) -> dict[str, str]:
        """Of the folder: all images' paths and sizes, and the official lists if they are read."""
        root = Path(self.root)
        root = root.parent if root.name == "Images" else root
        images = root / "Images"
        files = [images / breed / n for breed in _breeds(images) for n in _images(images / breed)]
        lists = [root / f"{part}_list.mat" for part in ("train", "test")]
        if self.split != "official":
            lists = []
        for file in lists:
            _listed(file)  # says what is missing
        return {"root": hash_of_files(root, files, lists)}

    def _read(self, part: Literal["train", "test"]) -> ImageSet:
        root = Path(self.root)
        root = root.parent if root.name == "Images" else root
        images = root / "Images"
        breeds = _breeds(images)
        labels = {breed: label for label, breed in enumerate(breeds)}
        found = {breed: _images(images / breed) for breed in breeds}
        if self.split == "official":
            listed = _listed(root / f"{part}_list.mat")
            files = [file for file in listed if file.split("/")[0] in labels]
            if not files:
                raise InputError(
                    f"{root}/{part}_list.mat: names no image of the breeds in {images}"
                )
        else:
            every = [f"{breed}/{name}" for breed in breeds for name in found[breed]]
            of_breed = torch.tensor([labels[file.split("/")[0]] for file in every])
            train, test = stratified_split(of_breed, 1 - self.held_out, self.split_seed)
            files = [every[i] for i in (train if part == "train" else test).tolist()]
        return read_images(
            [images / file for file in files],
            [labels[file.split("/")[0]] for file in files],
            self.size,
            self.skip_unreadable,
            tuple(breed.partition("-")[2] for breed in breeds),
            "stanford_dogs",
            crop=True,
            in_memory=self.in_memory,
            readers=self.readers,
        )


def _breeds(images: Path) -> list[str]:
    """The breeds' folders, sorted: the official order of the classes."""
    if not images.is_dir():
        raise InputError(
            f"data folder {images.parent}: holds no folder Images; data.root must be the folder "
            "into which the archive images.tar was unpacked"
        )
    breeds = sorted(p.name for p in images.iterdir() if p.is_dir() and _BREED.fullmatch(p.name))
    if len(breeds) < 2:
        raise InputError(
            f"data folder {images}: holds {len(breeds)} breeds, at least 2 are needed (folders "
            "called as n02085620-Chihuahua is)"
        )
    return breeds


def _images(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
    if not names:
        raise InputError(f"breed folder {folder}: holds no image; add some or remove it")
    return names


def _listed(file: Path) -> list[str]:
    """The files of an official list, "<breed>/<name>.jpg". InputError if it is not like that."""
    if not file.is_file():
        raise InputError(
            f'{file}: is not there; unpack lists.tar beside Images, or set data.split = "random"'
        )
    try:
        content = loadmat(file, variable_names=("file_list", "labels"))
    except Exception as error:  # scipy raises whatever its parser stumbles on
        raise InputError(f"{file}: cannot be read ({error}); unpack lists.tar again") from error
    for key in ("file_list", "labels"):
        if key not in content:
            raise InputError(f"{file}: has no {key!r}; unpack lists.tar again")
    files = [str(cell.item()) for cell in content["file_list"].flatten()]
    _check_labels(files, content["labels"].flatten().tolist(), file)
    return files


def _check_labels(files: Sequence[str], labels: Sequence[int], where: Path) -> None:
    """InputError unless each breed's folder has one label: then the folder says the class."""
    if len(files) != len(labels):
        raise InputError(
            f"{where}: names {len(files)} files but {len(labels)} labels; unpack lists.tar again"
        )
    of_breed: dict[str, int] = {}
    for entry, (name, label) in enumerate(zip(files, labels, strict=True), start=1):
        breed = name.split("/")[0]
        if of_breed.setdefault(breed, label) != label:
            raise InputError(
                f"{where}, entry {entry}: gives {breed} label {label}, but earlier "
                f"{of_breed[breed]}; unpack lists.tar again"
            )
