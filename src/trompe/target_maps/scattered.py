"""Some places of the map, drawn by lot."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from trompe.interfaces import InputError

__all__ = ["Scattered"]


@dataclass(frozen=True)
class Scattered:
    """1 in a `share` of the places and 0 elsewhere; for tables, where places are columns.

    Drawn for each sample, by its own numbers and the seed: the same for the same sample.
    shown: only from places where the reference's map is not 0 (a hidden unit that a sample does
    not switch on has nothing to show, whatever its weights), as long as there are enough.
    """

    share: float = 0.2
    seed: int = 0
    shown: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"share = {self.share}: must lie between 0 and 1")

    def __call__(self, reference_maps: Tensor, images: Tensor) -> Tensor:
        n, height, width = reference_maps.shape
        count = max(1, round(self.share * height * width))
        maps = torch.zeros(n, height * width)
        for row, image, reference in zip(maps, images, reference_maps.flatten(1), strict=True):
            numbers = image.detach().cpu().contiguous().float().numpy().tobytes()
            # A generator heeds 32 bits only, so seed and sample are mixed into as many.
            dice = torch.Generator().manual_seed(zlib.crc32(numbers, self.seed))
            order = torch.randperm(height * width, generator=dice)
            if self.shown:
                order = order[(reference[order] == 0).int().argsort(stable=True)]
            row[order[:count]] = 1
        return maps.view(n, height, width).to(reference_maps)
