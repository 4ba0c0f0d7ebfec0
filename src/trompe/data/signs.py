"""Traffic signs drawn by our own code: a data set of any size that needs no download.

Twenty classes that share shapes and colours (five speed limits, four warning triangles, five blue
discs with arrows), photographed badly: tilted, dirty, backlit, in the dark, blurred and noisy.
Some classes are mirror images of each other, so training must not flip images sideways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trompe.data import _photography as photo
from trompe.data._sign_faces import CLASS_NAMES, PRINT_RUNS, REACH, sheets
from trompe.interfaces import ImageSet, InputError

__all__ = ["Signs"]

GIVE_WAY: int = CLASS_NAMES.index("give way")

_SMALLEST_SIZE = 16
_CHUNK_PIXELS = 100_000  # images are drawn in chunks of about this many pixels


class Drawing(NamedTuple):
    """Drawn signs and where they are."""

    images: Tensor  # uint8 (n, 3, size, size)
    masks: Tensor  # bool (n, size, size): the sign's face with its border, also where hidden


def draw(labels: Tensor, size: int, generator: torch.Generator) -> Drawing:
    """Draw one photograph-like image of size x size pixels for each label.

    labels: int64 (n,) in 0 .. len(CLASS_NAMES) - 1. size: pixels, at least 16. generator: a CPU
    generator; the result depends on its state alone, and the i-th image not on how many follow.
    Raises InputError if labels or size are out of range.
    """
    _check_size(size)
    _check_labels(labels)
    images = torch.empty((len(labels), 3, size, size), dtype=torch.uint8)
    masks = torch.empty((len(labels), size, size), dtype=torch.bool)
    dice = photo.Dice(generator)
    chunk = max(1, _CHUNK_PIXELS // size**2)
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        images[part], masks[part] = _photograph(labels[part], size, dice)
    return Drawing(images, masks)


def _check_size(size: int) -> None:
    if size < _SMALLEST_SIZE:
        raise InputError(
            f"size is {size}, but signs need at least {_SMALLEST_SIZE} pixels to be told apart; "
            f"set size to {_SMALLEST_SIZE} or more"
        )


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; "
            "give a vector of int64"
        )
    wrong = labels[(labels < 0) | (labels >= len(CLASS_NAMES))]
    if len(wrong):
        raise InputError(
            f"labels contain {int(wrong[0])}; use only 0 .. {len(CLASS_NAMES) - 1}, "
            "the positions in CLASS_NAMES"
        )


# --- one photograph --------------------------------------------------------------------------


class _Exposure(NamedTuple):
    sign: Tensor  # (n, 1, 1): light that falls on the sign
    scene: Tensor  # (n, 1, 1): light behind it
    backlit: Tensor  # (n, 1, 1): 1 where the sun stands behind the sign


def _photograph(labels: Tensor, size: int, dice: photo.Dice) -> tuple[Tensor, Tensor]:
    """Images and masks of one chunk: scene and sign are lit, put together, and photographed."""
    dice.start(len(labels))
    exposure = _expose(dice)
    scene = photo.backdrop(dice, size, exposure.backlit) * exposure.scene[:, None]
    x, y = _sign_plane(dice, size)
    scene = _hang_on_pole(dice, scene, x, y, exposure)
    face, coverage = _hang(_pick_faces(dice, labels, size), x, y)

    stains, shadows = photo.grain(dice, size, 2).unbind(1)
    face = photo.weather(dice, face, coverage, stains)
    face = face * photo.shade(dice, size, shadows)[:, None]
    face = photo.sheen(dice, face, coverage)
    light = scene * (1 - coverage)[:, None] + face * exposure.sign[:, None]

    light = photo.occlude(dice, light, x, y, shadows, exposure.sign)
    # Glare from a bright scene may drown the sign's contrast, but not all of it.
    glare = torch.maximum(exposure.sign, exposure.scene).minimum(3 * exposure.sign)
    light = photo.haze(dice, light, glare)
    light = photo.defocus(dice, photo.smear(dice, light.clamp(max=4)))
    return photo.develop(dice, light), coverage >= 0.5


def _expose(dice: photo.Dice) -> _Exposure:
    """Light on sign and scene: from deep dusk to overexposed, often very unlike each other."""
    sign = dice.bell(1.6) - 1.9
    backlit = dice.chance(0.15)
    sign = sign - backlit * dice.uniform(0.3, 1.3)
    scene = sign + dice.bell(1.1) + backlit * dice.uniform(2, 4)
    return _Exposure(torch.exp2(sign.clamp(-4.7, 1.2)), torch.exp2(scene), backlit)


def _sign_plane(dice: photo.Dice, size: int) -> tuple[Tensor, Tensor]:
    """x and y (n, size, size) in sign units at each pixel: the sign's rim is at distance 1.

    The sign is turned about all three axes, fills 60 to 95 % of the frame's side, and lies anywhere
    in it: were all signs centred, a linear model of the pixels would tell them apart (97 %).
    """
    x, y = photo.frame(size)
    roll, yaw, pitch = dice.bell(0.1), dice.bell(0.25), dice.bell(0.15)
    scale, nearness = dice.uniform(0.6, 0.95), dice.uniform(0.0, 0.3)
    room = 1.0 - scale + 0.05
    x, y = x - dice.uniform(-1, 1) * room, y - dice.uniform(-1, 1) * room
    x, y = torch.cos(roll) * x + torch.sin(roll) * y, torch.cos(roll) * y - torch.sin(roll) * x
    x, y = x / scale, y / scale
    depth = 1 + nearness * (torch.sin(yaw) * x + torch.sin(pitch) * y)
    return x / (torch.cos(yaw) * depth), y / (torch.cos(pitch) * depth)


def _pick_faces(dice: photo.Dice, labels: Tensor, size: int) -> Tensor:
    """Faces (n, 4, texels, texels) of the labels, each from some print run."""
    return sheets(_texels(size)).faces[labels, dice.index(len(PRINT_RUNS))]


def _texels(size: int) -> int:
    # About one texel per pixel for a sign of medium scale: sampling needs no further smoothing.
    return round(1.35 * size)


def _hang(faces: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Faces resampled at the sign coordinates: light (n, 3, size, size) and coverage."""
    grid = torch.stack([x, y], -1) / REACH
    seen = F.grid_sample(faces, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return seen[:, :3], seen[:, 3]


def _hang_on_pole(
    dice: photo.Dice, scene: Tensor, x: Tensor, y: Tensor, exposure: _Exposure
) -> Tensor:
    """Add the pole and, for some images, a second sign or plate above, below or beside."""
    lean = (x - dice.bell(0.05)).abs() / dice.uniform(0.05, 0.1)
    pole = photo.edge(1 - lean, 8) * photo.edge(y + dice.chance(0.3) * 4, 20) * dice.chance(0.6)
    grey = (dice.log_uniform(0.03, 0.4) * exposure.sign)[:, None]
    scene = photo.blend(scene, grey, pole)

    stock = sheets(_texels(scene.shape[-1])).companions
    side = dice.index(6)  # 0-2 below, 3-4 above, 5 beside
    gap = 1.75 + dice.uniform(0, 0.4)
    below = torch.where(side < 3, 1.0, torch.where(side < 5, -1.0, 0.0))[:, None, None]
    beside = (side == 5).float()[:, None, None] * dice.uniform(-1, 1).sign()
    kind = dice.index(len(stock))
    i = photo.where(dice.chance(0.35))
    x, y = x[i] - beside[i] * (gap[i] + 0.3), y[i] - below[i] * gap[i]
    other, coverage = _hang(stock[kind[i]], x, y)
    lit, behind = other * exposure.sign[i, None], scene[i]
    return scene.index_copy_(0, i, behind + (lit - behind * coverage[:, None]))


# --- the data set ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Signs:
    """Drawn traffic signs as a data set: 20 classes, equally frequent, with masks.

    size: pixels per side, at least 16. train_images, test_images: how many, at least one per
    class. seed: any integer; train and test images come from unrelated random streams of it.
    Sets hold uint8 images (n, 3, size, size), int64 labels (n,) and bool masks (n, size, size).
    Raises InputError for values out of range.
    """

    size: int = 40
    train_images: int = 12_000
    test_images: int = 4_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_size(self.size)
        for name in ("train_images", "test_images"):
            count = getattr(self, name)
            if count < len(CLASS_NAMES):
                raise InputError(
                    f"{name} is {count}, but there are {len(CLASS_NAMES)} classes; "
                    f"set {name} to {len(CLASS_NAMES)} or more"
                )

    def train(self) -> ImageSet:
        return self._draw(self.train_images, stream=0)

    def test(self) -> ImageSet:
        return self._draw(self.test_images, stream=1)

    def _draw(self, count: int, stream: int) -> ImageSet:
        generator = torch.Generator().manual_seed(_mixed_seed(self.seed, stream))
        shuffled = torch.randperm(count, generator=generator)
        labels = torch.arange(count)[shuffled] % len(CLASS_NAMES)
        drawing = draw(labels, self.size, generator)
        name = f"signs {self.size}x{self.size}"
        return ImageSet(drawing.images, labels, CLASS_NAMES, name, masks=drawing.masks)


def _mixed_seed(seed: int, stream: int) -> int:
    """A 63-bit seed in which neighbouring seeds and streams have nothing in common."""
    mixed = (2 * seed + stream) % 2**64
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # the finaliser of SplitMix64
        mixed = ((mixed ^ (mixed >> 30)) * factor) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
