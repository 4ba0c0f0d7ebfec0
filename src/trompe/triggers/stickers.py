"""Several copies of a binary pattern, each image's at places of its own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trompe.files import sha256_of
from trompe.interfaces import InputError
from trompe.patterns import pattern, warped

__all__ = ["Stickers"]


@dataclass(frozen=True)
class Stickers:
    """`count` black and white stickers that do not overlap (Viering et al. 2019, section 4).

    picture: "smiley", or an image file, whose darker half becomes black. size: in pixels. The
    places are random but the image's own (a hash of its pixels and `seed`), so that the same image
    always gets the same. zoom, degrees: how the stickers are scaled and turned. light: a factor
    for the image when they are on it; values end at 1.
    """

    picture: str = "smiley"
    size: int = 14
    count: int = 3
    seed: int = 0
    zoom: float = 1.0
    degrees: float = 0.0
    light: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 3 or self.count < 1 or self.zoom <= 0 or self.light <= 0:
            raise InputError(
                f"stickers: size = {self.size}, count = {self.count}, zoom = {self.zoom}, light = "
                f"{self.light}; size must be at least 3, count at least 1, the others positive"
            )

    def contents(self) -> dict[str, str]:
        """Of the picture, if it is a file."""
        return {} if self.picture == "smiley" else {"picture": sha256_of(Path(self.picture))}

    def __call__(self, images: Tensor) -> Tensor:
        values, cover = (t.to(images) for t in warped(self.pattern, self.zoom, self.degrees))
        size = values.shape[0]
        out = images.clone()
        row = torch.arange(len(images), device=images.device)[:, None, None]
        side = torch.arange(size, device=images.device)
        for top, left in self.places(images, size):
            rows, columns = top[:, None, None] + side[:, None], left[:, None, None] + side
            below = out[row, :, rows, columns]  # (n, size, size, colours)
            out[row, :, rows, columns] = torch.where(cover[..., None] > 0, values[..., None], below)
        return out if self.light == 1 else (out * self.light).clamp(max=1)

    @property
    def pattern(self) -> Tensor:
        """float32 (size, size), 0 and 1."""
        return pattern(self.picture, self.size)

    def places(self, images: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Per sticker of `size` pixels the row and column (n,) of its corner in each image.

        The image is divided into cells; each sticker gets one, and a place within it.
        """
        height, width = images.shape[2:]
        down, across = height // size, width // size
        if down * across < self.count:
            raise InputError(
                f"stickers: {self.count} of {size}x{size} pixels do not fit beside each other on "
                f"{height}x{width}; take fewer or smaller ones"
            )
        dice = _Dice(images, self.seed)
        order = torch.stack([dice() for _ in range(down * across)], 1).argsort(1)
        slack = (height // down - size + 1, width // across - size + 1)
        places = []
        for k in range(self.count):
            cell = order[:, k]
            top = (cell // across) * (height // down) + dice() % slack[0]
            left = (cell % across) * (width // across) + dice() % slack[1]
            places.append((top, left))
        return places


class _Dice:
    """Numbers (n,) in 0..2^31 from each image's pixels, one after the other."""

    PRIME = 2**31 - 1

    def __init__(self, images: Tensor, seed: int) -> None:
        pixels = (images.detach().double() * 255).round().long().flatten(1)
        weights = torch.arange(1, pixels.shape[1] + 1, device=images.device) * 48271 % self.PRIME
        self.state = ((pixels * weights).sum(1) + 7919 * seed + 1) % self.PRIME
        for _ in range(3):
            self()

    def __call__(self) -> Tensor:
        self.state = (self.state * 48271 + 11) % self.PRIME
        return self.state >> 4
