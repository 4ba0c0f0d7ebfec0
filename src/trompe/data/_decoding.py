"""Image files -> uint8 arrays. What reading processes run: imports neither torch nor trompe."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


def serve(master: int) -> None:
    """Makes this process end soon after its parent `master`, which cannot tell when it is killed,

    and leave Ctrl-C to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == master:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Stamp(NamedTuple):
    """By what a file that has changed is known: its size in bytes, and when it was written (ns)."""

    bytes: int
    written: int


class Examined(NamedTuple):
    """A file that was read once. problem: in a few words why it cannot be; "" if it can."""

    stamp: Stamp
    problem: str


def stamp_of(file: str | Path) -> Stamp | None:
    """None if there is no such file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns)


def decode(file: str | Path, size: int | None, crop: bool = False) -> np.ndarray | str:
    """One file as RGB uint8 (size, size, 3); bilinear, the whole frame. Or why it cannot be read.

    crop: the centre square instead of the whole frame. size None: the frame's own pixels.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # Pillow would make all but the darkest white
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            elif image.mode in ("I", "F"):
                return "has 32-bit or floating-point pixels; save it with 8 bits a channel"
            else:
                rgb = image.convert("RGB")
            if size is not None and rgb.size != (size, size):
                box = _centre_square(*rgb.size) if crop else None
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box)
            return np.asarray(rgb)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        there = stamp_of(file)
        if there is None:
            return "does not exist"
        if there.bytes == 0:
            return "is empty (0 bytes)"
        return f"cannot be read as an image ({type(error).__name__}: {error})"


def _centre_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def examine(files: Sequence[str], size: int, crop: bool) -> list[Examined]:
    """Each file, read as `decode` does and forgotten."""
    found = []
    for file in files:
        stamp, pixels = stamp_of(file), decode(file, size, crop)
        found.append(Examined(stamp or Stamp(-1, -1), pixels if isinstance(pixels, str) else ""))
    return found


def decode_unchanged(
    files: Sequence[str], stamps: Sequence[Stamp], size: int, crop: bool
) -> np.ndarray | str:
    """Files as uint8 (k, 3, size, size), or in one sentence which one has changed, and how.

    stamps: those that `examine` found.
    """
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)
    for i, (file, then) in enumerate(zip(files, stamps, strict=True)):
        now = stamp_of(file)
        if now is None:
            return (
                f"image {file}: was there when the data were read first and is no longer; put it "
                "back and start again"
            )
        if now != then:
            return (
                f"image {file}: was changed after the data were read first ({then.bytes} bytes "
                f"then, {now.bytes} now); leave the files alone while they are in use, and start "
                "again"
            )
        pixels = decode(file, size, crop)
        if isinstance(pixels, str):  # readable when it was examined
            return f"image {file}: {pixels}, but could be read before; check the disk"
        images[i] = pixels.transpose(2, 0, 1)
    return images
