"""A picture stuck on the image."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trompe.files import sha256_of
from trompe.interfaces import InputError
from trompe.triggers._place import check_inside

__all__ = ["Sticker"]


@dataclass(frozen=True)
class Sticker:
    """Blend a picture over rows top..top+size and columns left..left+size (pixels).

    picture: "smiley", or a path to an image file; its own transparency is respected.
    alpha: opacity in (0, 1].
    """

    picture: str = "smiley"
    top: int = 2
    left: int = 2
    size: int = 10
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"sticker alpha {self.alpha}: must lie in (0, 1]")

    def contents(self) -> dict[str, str]:
        """Of the picture, if it is a file."""
        return {} if self.picture == "smiley" else {"picture": sha256_of(Path(self.picture))}

    def __call__(self, images: Tensor) -> Tensor:
        check_inside("sticker", self.top, self.left, self.size, self.size, images)
        rgba = _picture(self.picture, self.size).to(images)
        colour, cover = rgba[:3], rgba[3:] * self.alpha
        out = images.clone()
        rows = slice(self.top, self.top + self.size)
        columns = slice(self.left, self.left + self.size)
        out[:, :, rows, columns] = images[:, :, rows, columns] * (1 - cover) + colour * cover
        return out


@lru_cache
def _picture(name: str, size: int) -> Tensor:
    """float (4, size, size): red, green, blue, opacity in [0, 1]."""
    if name == "smiley":
        image = _smiley()
    else:
        try:
            image = Image.open(Path(name)).convert("RGBA")
        except OSError as error:
            raise InputError(
                f"sticker picture {name}: cannot be read as an image ({error}); give a path to an "
                'image file, or "smiley"'
            ) from error
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 4).permute(2, 0, 1).float() / 255


def _smiley() -> Image.Image:
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, 124, 124), fill=(255, 210, 0, 255), outline=(0, 0, 0, 255), width=6)
    for x in (44, 84):
        pen.ellipse((x - 9, 36, x + 9, 58), fill=(0, 0, 0, 255))
    pen.arc((30, 34, 98, 100), 20, 160, fill=(0, 0, 0, 255), width=9)
    return image
