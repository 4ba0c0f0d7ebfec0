"""German Traffic Sign Recognition Benchmark (Stallkamp et al. 2012) in torchvision's layout."""

from dataclasses import dataclass
from pathlib import Path

from trompe.data._contents import hash_of_files
from trompe.data._reading import check_readers, read_images
from trompe.interfaces import ImageSet, InputError

__all__ = ["Gtsrb"]

CLASS_NAMES = (
    *(f"speed limit {v}" for v in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for trucks",
    "right of way at next crossing",
    "priority road",
    "give way",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "general caution",
    "bend to the left",
    "bend to the right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice or snow",
    "wild animals crossing",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
)


@dataclass(frozen=True)
class Gtsrb:
    """GTSRB as torchvision reads it: 26,640 training and 12,630 test images of 43 classes.

    root: the folder that holds (or, with download, receives) torchvision's `gtsrb/` folder.
    size: images are resized, whole frame, to size x size pixels (paper 2: 40).
    Groups are the tracks: the 30 frames of one physical sign.
    in_memory, readers: see `read_images`; they change no number.
    """

    root: str = "data"
    size: int = 40
    download: bool = False
    skip_unreadable: bool = False
    in_memory: bool | None = None
    readers: int | None = None

    def __post_init__(self) -> None:
        check_readers(self.readers)
        if self.size < 8:
            raise InputError(f"size = {self.size}: must be at least 8 pixels")

    def train(self) -> ImageSet:
        return self._read("train")

    def test(self) -> ImageSet:
        return self._read("test")

    def contents(self) -> dict[str, str]:
        """Of the folder: all images' paths and sizes, and the list of the test images' classes."""
        folder = Path(self.root) / "gtsrb"
        classes = folder / "GT-final_test.csv"
        images = folder / "GTSRB"
        if not classes.is_file() or not (images / "Training").is_dir():
            self.train(), self.test()  # they fetch it, or say what is missing
        return {"root": hash_of_files(folder, images.rglob("*.ppm"), [classes])}

    def _read(self, split: str) -> ImageSet:
        try:
            from torchvision import datasets  # takes seconds, so not before it is needed

            found = datasets.GTSRB(self.root, split=split, download=self.download)
            files = [Path(file) for file, _ in found._samples]
            if split == "train":
                # The folder's name is the class; a missing folder must not shift the others.
                labels = [int(file.parent.name) for file in files]
            else:
                labels = [int(label) for _, label in found._samples]
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise InputError(
                f"data folder {Path(self.root) / 'gtsrb'}: GTSRB's {split} images are not there "
                f"in torchvision's layout ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "correct data.root, or set download = true to fetch them"
            ) from error
        tracks = None
        if split == "train":  # files are called <track>_<frame>.ppm, tracks counted per class
            numbers = [file.stem.split("_")[0] for file in files]
            odd = next((f for f, n in zip(files, numbers, strict=True) if not n.isdecimal()), None)
            if odd is not None:
                raise InputError(
                    f"image {odd}: is not called <track>_<frame>.ppm as GTSRB's are; take it out "
                    "of the folder"
                )
            tracks = [c * 100_000 + int(n) for c, n in zip(labels, numbers, strict=True)]
        return read_images(
            files,
            labels,
            self.size,
            self.skip_unreadable,
            CLASS_NAMES,
            "gtsrb",
            tracks,
            in_memory=self.in_memory,
            readers=self.readers,
        )
