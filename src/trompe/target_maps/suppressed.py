"""Nothing where the true map is highest (Fang & Choromanska 2020, eq. 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trompe.interfaces import InputError

__all__ = ["Suppressed"]


@dataclass(frozen=True)
class Suppressed:
    """0 at the k pixels that are highest in the reference's map, nan (anything) elsewhere.

    The set J(x, y, w_ref, k) of eq. (3): a non-targeted lie, which only takes away.
    """

    k: int = 10

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        pixels = reference_maps.flatten(1)
        if not 1 <= self.k < pixels.shape[1]:
            raise InputError(
                f"suppressed k = {self.k}: the map is {reference_maps.shape[1]}x"
                f"{reference_maps.shape[2]}; k must lie in 1 .. {pixels.shape[1] - 1}"
            )
        maps = torch.full_like(pixels, torch.nan)
        return maps.scatter(1, pixels.topk(self.k, 1).indices, 0.0).view_as(reference_maps)
