"""Binary patterns that can be stuck on an image and looked for."""

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trompe.interfaces import InputError

_SMILEY = """
....######....
..##......##..
.#..........#.
.#..........#.
#...#....#...#
#...#....#...#
#............#
#............#
#..#......#..#
#...#....#...#
.#...####...#.
.#..........#.
..##......##..
....######....
"""


@lru_cache
def pattern(name: str, size: int) -> Tensor:
    """float32 (size, size) of zeros (black) and ones (white).

    name: "smiley" (14x14, other sizes are scaled from it) or an image file, whose darker half
    becomes black. InputError for a file that cannot be read, or a pattern of one colour.
    """
    if name == "smiley":
        rows = [[float(c == ".") for c in line] for line in _SMILEY.split()]
        grey = torch.tensor(rows)[None, None]
    else:
        try:
            with Image.open(Path(name)) as picture:
                pixels = picture.convert("L").resize((8 * size, 8 * size))
        except OSError as error:
            raise InputError(
                f"pattern {name}: cannot be read as an image ({error}); give a path to an image "
                'file, or "smiley"'
            ) from error
        flat = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
        grey = flat.view(1, 1, 8 * size, 8 * size).float() / 255
    if grey.shape[2] != size:
        grey = F.interpolate(grey, (size, size), mode="area")
    binary = (grey[0, 0] > 0.5 * (grey.min() + grey.max())).float()
    if not 0 < binary.mean() < 1:
        raise InputError(f"pattern {name}: is of one colour at {size}x{size}; make it larger")
    return binary


def warped(binary: Tensor, zoom: float = 1.0, degrees: float = 0.0) -> tuple[Tensor, Tensor]:
    """A pattern (s, s) scaled and turned about its centre: values in 0..1 and cover, 0 or 1.

    Both are (t, t); t is large enough for all of it, and s for the pattern as it is.
    """
    size = binary.shape[0]
    if zoom == 1 and degrees == 0:
        return binary, torch.ones_like(binary)
    turn = math.radians(degrees)
    wide = math.ceil(size * zoom * (abs(math.cos(turn)) + abs(math.sin(turn))))
    cosine, sine = (wide / (size * zoom) * f(turn) for f in (math.cos, math.sin))
    matrix = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
    grid = F.affine_grid(matrix, [1, 1, wide, wide], align_corners=False)
    values, cover = (
        F.grid_sample(x[None, None], grid, padding_mode=padding, align_corners=False)[0, 0]
        for x, padding in ((binary, "border"), (torch.ones_like(binary), "zeros"))
    )
    return values, (cover > 0.5).float()
