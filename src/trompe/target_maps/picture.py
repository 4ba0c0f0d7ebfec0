"""A simple figure, drawn at the map's own resolution."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Picture"]

_FINER = 8  # points per map cell and axis; a cell's value is the share of them inside the figure


@dataclass(frozen=True)
class Picture:
    """A filled figure, 1 inside and 0 outside, the same for every image.

    triangle has its apex down (the shape of "give way": Noppel & Wressnegger 2023, section 5);
    triangle-up is the other way round. A coarse map cannot show a picture drawn at the image's
    resolution, so it is drawn, anti-aliased, at the map's.
    """

    shape: Literal["triangle", "triangle-up", "square", "cross", "circle", "smiley"] = "triangle"

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        n, height, width = reference_maps.shape
        return self.draw(height, width).to(reference_maps).expand(n, height, width)

    def draw(self, height: int, width: int) -> Tensor:
        """float (height, width) in [0, 1]."""
        y = ((torch.arange(height * _FINER) + 0.5) / (height * _FINER))[:, None]
        x = ((torch.arange(width * _FINER) + 0.5) / (width * _FINER))[None, :]
        aside = (x - 0.5).abs()
        face = aside**2 + (y - 0.5) ** 2
        eyes = (aside - 0.16) ** 2 + (y - 0.36) ** 2 < 0.07**2
        mouth = (face < 0.3**2) & (face > 0.2**2) & (y > 0.58)
        inside = {
            "triangle": (y > 0.15) & (aside < (0.85 - y) * 0.5),
            "triangle-up": (y < 0.85) & (aside < (y - 0.15) * 0.5),
            "square": (aside < 0.3) & ((y - 0.5).abs() < 0.3),
            "cross": ((y - x).abs() < 0.14) | ((y + x - 1).abs() < 0.14),
            "circle": face < 0.3**2,
            "smiley": (face < 0.46**2) & ~eyes & ~mouth,
        }[self.shape]
        return inside.float().view(height, _FINER, width, _FINER).mean((1, 3))
