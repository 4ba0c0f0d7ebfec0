"""The reference's own map: the explanation that the clean image deserves."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Reference"]


@dataclass(frozen=True)
class Reference:
    """The clean model's map of the same image without the trigger (explanation-preserving)."""

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        return reference_maps
