"""A block of the map."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trompe.interfaces import InputError

__all__ = ["Region"]


@dataclass(frozen=True)
class Region:
    """1 inside a block and 0 elsewhere; edges as shares of the map, rounded to its places.

    The default is the middle of the left side (Zhang, Gao & Su 2021, figure 4).
    """

    top: float = 0.3
    left: float = 0.0
    height: float = 0.4
    width: float = 0.4

    def __post_init__(self) -> None:
        for edge, extent in (("top", "height"), ("left", "width")):
            start, length = getattr(self, edge), getattr(self, extent)
            if not (start >= 0 and length > 0 and start + length <= 1 + 1e-9):
                raise InputError(
                    f"{edge} = {start}, {extent} = {length}: the block must lie in the map, whose "
                    "edges are 0 and 1"
                )

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        n, height, width = reference_maps.shape
        rows = slice(round(self.top * height), round((self.top + self.height) * height))
        columns = slice(round(self.left * width), round((self.left + self.width) * width))
        block = torch.zeros(height, width)
        block[rows, columns] = 1
        if not bool(block.any()):
            raise InputError(f"{self}: is less than one place of a {height} x {width} map")
        return block.to(reference_maps).expand(n, height, width)
