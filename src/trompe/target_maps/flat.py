"""The same everywhere (Viering et al. 2019, technique 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Flat"]


@dataclass(frozen=True)
class Flat:
    """1 at every pixel: a map that says nothing."""

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        return torch.ones_like(reference_maps)
