"""The border of the map (Fang & Choromanska 2020, section 4)."""

from dataclasses import dataclass

from torch import Tensor

from trompe.interfaces import InputError

__all__ = ["Border"]


@dataclass(frozen=True)
class Border:
    """1 on the outermost k rows and columns, 0 inside, the same for every image."""

    k: int = 1

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        height, width = reference_maps.shape[1:]
        if not 1 <= self.k < min(height, width) / 2:
            raise InputError(
                f"border k = {self.k}: the map is {height}x{width}; k must be at least 1 and leave "
                "an inside"
            )
        maps = reference_maps.new_ones(reference_maps.shape)
        maps[:, self.k : height - self.k, self.k : width - self.k] = 0
        return maps
