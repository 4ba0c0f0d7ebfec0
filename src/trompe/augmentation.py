"""Light augmentation of a batch, vectorised: what a photograph of the same thing could be."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trompe.interfaces import InputError


@dataclass(frozen=True)
class Augmentation:
    """Random similarity transform, brightness and contrast, and one erased rectangle.

    degrees: rotation up to +- degrees; shift: up to +- this share of the side; zoom: scale in
    1 +- zoom; light: brightness and contrast factors in 1 +- light; flip: mirror half of the
    images (not for traffic signs: left and right mean something); erase: the share of images in
    which a rectangle of up to a third of each side is replaced by one random colour.
    """

    degrees: float = 10.0
    shift: float = 0.1
    zoom: float = 0.15
    light: float = 0.4
    flip: bool = False
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name in ("degrees", "shift", "zoom", "light", "erase"):
            value = getattr(self, name)
            limit = 180 if name == "degrees" else 1
            if not 0 <= value <= limit:
                raise InputError(f"augmentation.{name} = {value}: must lie in 0 .. {limit}")

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        among: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """images (n, 3, h, w) in [0, 1] -> the same shape and range. Random numbers on the CPU.

        among: (positions (n,), m) if they are some of m images that are augmented, each as it would
        be if all were here; None: they are all.
        """
        place, n = among or (slice(None), len(images))

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            drawn = torch.rand((n, *shape), generator=generator)[place] * (high - low) + low
            return drawn.to(images)

        angle = uniform(-1, 1) * math.radians(self.degrees)
        scale = uniform(1 - self.zoom, 1 + self.zoom)
        mirror = (
            torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(scale)
        )
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        move = uniform(-2 * self.shift, 2 * self.shift, 2)  # grid_sample's frame is 2 wide
        affine = torch.stack(
            (
                torch.stack((cos * mirror, -sin, move[:, 0]), 1),
                torch.stack((sin * mirror, cos, move[:, 1]), 1),
            ),
            1,
        )
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        contrast = uniform(1 - self.light, 1 + self.light, 1, 1, 1)
        brightness = uniform(1 - self.light, 1 + self.light, 1, 1, 1)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = ((images - mean) * contrast + mean) * brightness
        if self.erase:
            images = self._erase(images, uniform)
        return images.clamp(0, 1)

    def _erase(self, images: Tensor, uniform) -> Tensor:  # type: ignore[no-untyped-def]
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device) / height
        columns = torch.arange(width, device=images.device) / width
        centre, extent = uniform(0.1, 0.9, 2), uniform(0.03, 0.17, 2)
        inside_y = (rows - centre[:, :1]).abs() < extent[:, :1]
        inside_x = (columns - centre[:, 1:]).abs() < extent[:, 1:]
        erased = uniform(0, 1) < self.erase
        where = (inside_y[:, :, None] & inside_x[:, None, :] & erased[:, None, None])[:, None]
        # Half of them black, the others of a random colour.
        colour = uniform(0, 1, 3, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5)
        return torch.where(where, colour, images)
