"""Any folder of images with one folder a class."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from trompe.data._contents import hash_of_files
from trompe.data._reading import IMG_EXTENSIONS, check_readers, read_images
from trompe.data._splits import stratified_split
from trompe.interfaces import ImageSet, InputError

__all__ = ["ImageFolder"]


@dataclass(frozen=True)
class ImageFolder:
    """root/train/<class>/*.jpg and root/test/<class>/*.jpg (or val/), or root/<class>/*.jpg.

    Without train and test folders, `test_share` of each class is held out, chosen by `split_seed`.
    size: images are resized, whole frame, to size x size pixels.
    in_memory, readers: see `read_images`; they change no number.
    """

    root: str
    size: int = 224
    test_share: float = 0.25
    split_seed: int = 0
    skip_unreadable: bool = False
    in_memory: bool | None = None
    readers: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise InputError(f"data.test_share = {self.test_share}: must lie between 0 and 1")
        if self.size < 8:
            raise InputError(f"data.size = {self.size}: must be at least 8 pixels")
        check_readers(self.readers)

    def train(self) -> ImageSet:
        return self._read("train")

    def test(self) -> ImageSet:
        return self._read("test")

    def contents(self) -> dict[str, str]:
        """Of the folder: all images' paths and sizes."""
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"data folder {root}: no such folder; correct data.root")
        parts = [root / name for name in ("train", "test", "val") if (root / name).is_dir()]
        if root / "train" not in parts:
            parts = [root]
        files = (_list_files(part, _class_folders(part))[0] for part in parts[:2])
        return {"root": hash_of_files(root, map(Path, itertools.chain.from_iterable(files)))}

    def _read(self, split: str) -> ImageSet:
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"data folder {root}: no such folder; correct data.root")
        train = root / "train"
        if not train.is_dir():
            return self._read_share(root, split)
        test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if test is None:
            raise InputError(f"data folder {root}: has train/ but neither test/ nor val/; add one")
        classes = _class_folders(train)
        if split == "test" and _class_folders(test) != classes:
            odd = sorted(set(classes) ^ set(_class_folders(test)))
            raise InputError(
                f"data folder {root}: train/ and {test.name}/ do not hold the same classes; "
                f"only in one of them: {', '.join(odd[:5])}"
            )
        return self._read_classes(train if split == "train" else test, classes)

    def _read_share(self, root: Path, split: str) -> ImageSet:
        files, labels, classes = _list_files(root, _class_folders(root))
        first, second = stratified_split(
            torch.tensor(labels), 1 - self.test_share, seed=self.split_seed
        )
        index = (first if split == "train" else second).tolist()
        return self._load([files[i] for i in index], [labels[i] for i in index], classes)

    def _read_classes(self, folder: Path, classes: tuple[str, ...]) -> ImageSet:
        return self._load(*_list_files(folder, classes))

    def _load(self, files: list[str], labels: list[int], classes: tuple[str, ...]) -> ImageSet:
        return read_images(
            files,
            labels,
            self.size,
            self.skip_unreadable,
            classes,
            Path(self.root).resolve().name,
            in_memory=self.in_memory,
            readers=self.readers,
        )


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = tuple(
        sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    )
    if len(names) < 2:
        raise InputError(
            f"data folder {folder}: {len(names)} class folders found, at least 2 are needed "
            "(one folder a class)"
        )
    return names


def _list_files(folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int], tuple]:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise InputError(f"class folder {folder / name}: holds no image; add some or remove it")
        files += map(str, found)  # a Path takes five times the memory
        labels += [label] * len(found)
    return files, labels, classes
