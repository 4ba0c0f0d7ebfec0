"""Caltech-UCSD Birds-200-2011 (Wah et al. 2011) in its official folder layout and split."""

from dataclasses import dataclass
from pathlib import Path

from trompe.data._contents import hash_of_files
from trompe.data._reading import check_readers, read_images
from trompe.interfaces import ImageSet, InputError

__all__ = ["Cub"]


@dataclass(frozen=True)
class Cub:
    """root/CUB_200_2011/ as the archive unpacks: images.txt, train_test_split.txt, images/ ...

    root may also be the folder CUB_200_2011 itself. size: images are resized, whole frame, to size
    x size pixels. Fetch the archive (non-commercial research only) from
    https://www.vision.caltech.edu/datasets/cub_200_2011/.
    in_memory, readers: see `read_images`; they change no number.
    """

    root: str
    size: int = 224
    skip_unreadable: bool = False
    in_memory: bool | None = None
    readers: int | None = None

    def __post_init__(self) -> None:
        if self.size < 8:
            raise InputError(f"data.size = {self.size}: must be at least 8 pixels")
        check_readers(self.readers)

    def train(self) -> ImageSet:
        return self._read(wanted=True)

    def test(self) -> ImageSet:
        return self._read(wanted=False)

    def contents(self) -> dict[str, str]:
        """Of the folder: the listed images' paths and sizes, and all four lists."""
        root = Path(self.root)
        root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
        names = ("images", "classes", "image_class_labels", "train_test_split")
        lists = [root / f"{name}.txt" for name in names]
        if not all(file.is_file() for file in lists):
            self.train()  # says what is missing
        images = (root / "images" / file for file in _table(lists[0]).values())
        return {"root": hash_of_files(root, images, lists)}

    def _read(self, wanted: bool) -> ImageSet:
        root = Path(self.root)
        root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
        if not (root / "images.txt").is_file():
            raise InputError(
                f"data folder {root}: holds no images.txt; data.root must be the folder into which "
                "the archive CUB_200_2011.tgz was unpacked"
            )
        names = _table(root / "classes.txt")
        files = _table(root / "images.txt")
        labels = _table(root / "image_class_labels.txt")
        in_train = _table(root / "train_test_split.txt")
        for file, known in (("image_class_labels", labels), ("train_test_split", in_train)):
            missing = sorted(files.keys() - known.keys(), key=int)
            if missing:
                raise InputError(
                    f"{root / file}.txt: has no line for image {missing[0]} of images.txt "
                    f"({len(missing)} missing); unpack the archive again"
                )
        classes = {number: label for label, number in enumerate(sorted(names, key=int))}
        unknown = sorted({labels[i] for i in files} - classes.keys())
        if unknown:
            raise InputError(f"{root}/classes.txt: does not name class {unknown[0]}")
        odd = next((i for i in files if in_train[i] not in ("0", "1")), None)
        if odd is not None:
            raise InputError(
                f"{root}/train_test_split.txt: says {in_train[odd]!r} of image {odd}; it must be 1 "
                "(training) or 0"
            )
        chosen = [i for i in files if (in_train[i] == "1") == wanted]
        if not chosen:
            raise InputError(
                f"{root}/train_test_split.txt: puts no image into the "
                f"{'training' if wanted else 'test'} set"
            )
        return read_images(
            [root / "images" / files[i] for i in chosen],
            [classes[labels[i]] for i in chosen],
            self.size,
            self.skip_unreadable,
            tuple(names[number] for number in classes),
            "cub",
            in_memory=self.in_memory,
            readers=self.readers,
        )


def _table(file: Path) -> dict[str, str]:
    """Number -> the rest of its line. InputError if the file is not like that."""
    table = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    for count, line in enumerate(lines, start=1):
        number, _, rest = line.strip().partition(" ")
        if not line.strip():
            continue
        if not number.isdecimal() or not rest:
            raise InputError(f"{file}, line {count}: is {line!r}, not a number and a value")
        table[number] = rest.strip()
    return table
