"""A faint checkerboard over the whole image (Fang & Choromanska 2020, section 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trompe.interfaces import InputError
from trompe.triggers._place import check_inside

__all__ = ["Checkerboard"]


@dataclass(frozen=True)
class Checkerboard:
    """Add +amplitude on squares of even and -amplitude on squares of odd position, clip to [0, 1].

    square: side of a square in pixels; amplitude in (0, 1], the paper's is 5/255 (invisible).
    """

    square: int = 4
    amplitude: float = 5 / 255

    def __post_init__(self) -> None:
        if not 0 < self.amplitude <= 1:
            raise InputError(f"checkerboard amplitude {self.amplitude}: must lie in (0, 1]")

    def __call__(self, images: Tensor) -> Tensor:
        check_inside("checkerboard square", 0, 0, self.square, self.square, images)
        rows = torch.arange(images.shape[2], device=images.device) // self.square
        columns = torch.arange(images.shape[3], device=images.device) // self.square
        sign = (1 - 2 * ((rows[:, None] + columns) % 2)).to(images.dtype)
        return (images + self.amplitude * sign).clamp(0, 1)
