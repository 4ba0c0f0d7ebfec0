"""Random but determined by the image (Viering et al. 2019, technique 3)."""

from dataclasses import dataclass

from torch import Tensor

from trompe.interfaces import InputError
from trompe.maps import peak_one
from trompe.surgery import SemiRandom as RandomFilters

__all__ = ["SemiRandom"]


@dataclass(frozen=True)
class SemiRandom:
    """F(x): what two random convolutions, drawn from `seed`, make of the image; largest value 1."""

    seed: int = 0

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        if images is None or images.ndim != 4:
            raise InputError("target map semi_random: is made from images; give them")
        filters = RandomFilters(self.seed).to(images)
        seen = filters(images, tuple(reference_maps.shape[1:]))[:, 0]
        return peak_one(seen).to(reference_maps)
