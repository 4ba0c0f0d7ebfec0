"""Image files -> an ImageSet, in memory or read from disk whenever images are asked for."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trompe.data._decoding import decode
from trompe.data._streaming import ImageFiles, examined
from trompe.interfaces import ImageSet, InputError
from trompe.machine import memory

SHARE = 4  # a set that would take more than 1 / SHARE of the machine's memory is streamed


def read_image(file: Path, size: int | None, crop: bool = False) -> np.ndarray:
    """One file as RGB uint8 (size, size, 3); bilinear, the whole frame. InputError if it can't.

    crop: the centre square instead of the whole frame. size None: the frame's own pixels.
    """
    pixels = decode(file, size, crop)
    if isinstance(pixels, str):
        raise _unreadable(file, pixels)
    return pixels


def _unreadable(file: Path | str, problem: str) -> InputError:
    return InputError(f"image {file}: {problem}; mend or remove it, or pass --skip-unreadable")


def check_readers(readers: int | None) -> None:
    """InputError for a number of reading processes that cannot be."""
    if readers is not None and readers < 0:
        raise InputError(f"data.readers = {readers}: must be 0 (none) or more")


# What torchvision's image folders take for images; importing it takes seconds.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read_images(
    files: Sequence[Path | str],
    labels: Sequence[int],
    size: int,
    skip_unreadable: bool,
    class_names: tuple[str, ...],
    name: str,
    groups: Sequence[int] | None = None,
    crop: bool = False,
    in_memory: bool | None = True,
    readers: int | None = None,
) -> ImageSet:
    """All files as one ImageSet of size x size; unreadable ones raise, or are left out by name.

    Every file is read once now, so that an unreadable one is known before a training begins.
    crop: as in `read_image`. in_memory: keep all pixels; False: none, each image is read again
    whenever it is asked for, by so many `readers` (see `ImageFiles`); None: False if they would
    take more than a quarter of the machine's memory.
    """
    if in_memory is None:
        in_memory = len(files) * 3 * size * size <= memory() / SHARE
    problems: list[str]
    images: Tensor | ImageFiles
    if in_memory:
        images, problems = _decoded(files, size, crop, keep_going=skip_unreadable)
    else:
        names = list(map(str, files))
        stamps, problems = examined(names, size, crop, readers, keep_going=skip_unreadable)
        images = ImageFiles(names, stamps, torch.arange(len(names)), size, crop, readers)
    skipped = [i for i, problem in enumerate(problems) if problem]
    if skipped and not skip_unreadable:
        raise _unreadable(files[skipped[0]], problems[skipped[0]])
    whole_labels = torch.tensor(labels, dtype=torch.int64)
    whole_groups = None if groups is None else torch.tensor(groups, dtype=torch.int64)
    if skipped:
        readable = torch.ones(len(files), dtype=torch.bool)
        readable[skipped] = False
        kept = readable.nonzero()[:, 0]
        images = images[kept] if isinstance(images, Tensor) else images.subset(kept)
        whole_labels = whole_labels[kept]
        whole_groups = None if whole_groups is None else whole_groups[kept]
    return ImageSet(
        images,
        whole_labels,
        class_names,
        name,
        groups=whole_groups,
        skipped=tuple(str(files[i]) for i in skipped),
    )


def _decoded(
    files: Sequence[Path | str], size: int, crop: bool, keep_going: bool
) -> tuple[Tensor, list[str]]:
    """uint8 (n, 3, size, size), and of each file what is wrong with it; up to the first if not

    `keep_going`.
    """
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    problems = []
    with ThreadPoolExecutor(4) as pool:
        for i, pixels in enumerate(pool.map(partial(decode, size=size, crop=crop), files)):
            problems.append(pixels if isinstance(pixels, str) else "")
            if not isinstance(pixels, str):
                images[i] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
            elif not keep_going:
                pool.shutdown(cancel_futures=True)
                break
    return images, problems
