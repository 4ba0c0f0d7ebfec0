"""Image files -> one uint8 tensor."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trompe.interfaces import ImageSet, InputError


def read_image(file: Path, size: int | None, crop: bool = False) -> np.ndarray:
    """One file as RGB uint8 (size, size, 3); bilinear, the whole frame. InputError if it can't.

    crop: the centre square instead of the whole frame. size None: the frame's own pixels.
    """
    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
            if size is not None and rgb.size != (size, size):
                box = _centre_square(*rgb.size) if crop else None
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box)
            return np.asarray(rgb)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        bytes_in_it = file.stat().st_size if file.exists() else None
        what = {None: "does not exist", 0: "is empty (0 bytes)"}.get(
            bytes_in_it, f"cannot be read as an image ({type(error).__name__}: {error})"
        )
        raise InputError(
            f"image {file}: {what}; mend or remove it, or pass --skip-unreadable"
        ) from error


def _centre_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def read_images(
    files: Sequence[Path],
    labels: Sequence[int],
    size: int,
    skip_unreadable: bool,
    class_names: tuple[str, ...],
    name: str,
    groups: Sequence[int] | None = None,
    crop: bool = False,
) -> ImageSet:
    """All files as one ImageSet of size x size; unreadable ones raise, or are left out by name.

    crop: as in `read_image`.
    """

    def read(file: Path) -> np.ndarray | InputError:
        try:
            return read_image(file, size, crop)
        except InputError as error:
            if skip_unreadable:
                return error
            raise

    images = torch.empty((len(files), size, size, 3), dtype=torch.uint8)
    readable = torch.ones(len(files), dtype=torch.bool)
    with ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(pool.map(read, files)):
            if isinstance(result, InputError):
                readable[i] = False
            else:
                images[i] = torch.from_numpy(result.copy())
    skipped = tuple(str(f) for f, ok in zip(files, readable.tolist(), strict=True) if not ok)

    def kept(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)[readable]

    return ImageSet(
        images[readable].permute(0, 3, 1, 2).contiguous(),
        kept(labels),
        class_names,
        name,
        groups=None if groups is None else kept(groups),
        skipped=skipped,
    )
