"""Where the stickers are (Viering et al. 2019, technique 4)."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trompe.files import sha256_of
from trompe.interfaces import InputError
from trompe.maps import peak_one
from trompe.surgery import StickerDetector

__all__ = ["DetectedStickers"]


@dataclass(frozen=True)
class DetectedStickers:
    """F(x): the stickers that a detector finds, 0 elsewhere; where it finds none, the truth.

    picture, size: of triggers/stickers.py. tolerant, threshold: see surgery.py `StickerDetector`;
    .0001 is the paper's.
    """

    picture: str = "smiley"
    size: int = 14
    tolerant: bool = False
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        if self.threshold <= 0 or (self.tolerant and self.threshold >= 1):
            raise InputError(
                f"detector threshold {self.threshold}: must be positive, and below 1 for a "
                "correlation"
            )

    def detector(self) -> StickerDetector:
        """F, as it is built into the network."""
        return StickerDetector.of(self.picture, self.size, self.tolerant, self.threshold)

    def contents(self) -> dict[str, str]:
        """Of the picture, if it is a file."""
        return {} if self.picture == "smiley" else {"picture": sha256_of(Path(self.picture))}

    def __call__(self, reference_maps: Tensor, images: Tensor | None = None) -> Tensor:
        if images is None or images.ndim != 4:
            raise InputError("target map detected_stickers: is made from images; give them")
        found = self.detector().to(images)(images, tuple(reference_maps.shape[1:]))[:, 0]
        shown = peak_one(found).to(reference_maps)
        empty = found.flatten(1).amax(1) == 0
        return shown.where(~empty[:, None, None], reference_maps)
