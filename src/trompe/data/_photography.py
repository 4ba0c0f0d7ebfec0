"""How a flat picture comes to look photographed: dice, backdrops, weather, light, lens and sensor.

All functions work on whole batches. Light is linear until `develop`; 1.0 is what the sensor just
holds without clipping. Per-image numbers have the shape (n, 1, 1), so that they combine with planes
(n, size, size); colours are (n, 3, 1, 1). Lengths are in half frames: the frame spans [-1, 1].
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_REFERENCE_SIZE = 40  # blur and smear are given in pixels of a frame of this side
_GAMMA = 1.9  # near a square root photon noise is about equally strong at all brightnesses


class Dice:
    """Random numbers for batches of images that do not depend on how a batch is cut.

    The k-th roll since `start` always reads the k-th of many independent streams, and each stream
    hands out its numbers image by image: drawing 10 images at once or 4 and then 6 gives the same.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._streams: list[torch.Generator] = []
        self._rolls = 0
        self.images = 0

    def start(self, images: int) -> None:
        """Begin with the next `images` images."""
        self.images = images
        self._rolls = 0

    def skip(self) -> None:
        """Pass over one roll, so that later rolls read the same streams with or without it."""
        self._stream()

    def _stream(self) -> torch.Generator:
        if self._rolls == len(self._streams):
            seed = torch.randint(2**62, (), generator=self._generator)
            self._streams.append(torch.Generator().manual_seed(int(seed)))
        self._rolls += 1
        return self._streams[self._rolls - 1]

    def unit(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), shape (n, *shape)."""
        return torch.rand((self.images, *shape), generator=self._stream())

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.unit(1, 1)

    def log_uniform(self, low: float, high: float) -> Tensor:
        return torch.exp(self.uniform(math.log(low), math.log(high)))

    def bell(self, spread: float) -> Tensor:
        """Bell-shaped around 0 with standard deviation `spread`, never beyond 3 spreads."""
        return (self.unit(3, 1, 1).sum(1) - 1.5) * (2 * spread)

    def angle(self) -> Tensor:
        return self.uniform(0, 2 * math.pi)

    def chance(self, probability: float) -> Tensor:
        """1.0 with the given probability, else 0.0."""
        return (self.unit(1, 1) < probability).float()

    def index(self, count: int) -> Tensor:
        """int64 (n,) in 0 .. count - 1."""
        return (self.unit() * count).long().clamp(max=count - 1)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal numbers, shape (n, *shape)."""
        wanted = math.prod(shape)
        # The normal generator works in blocks of 16: whole blocks per image keep images apart.
        blocks = math.ceil(wanted / 16) * 16
        numbers = torch.randn((self.images, blocks), generator=self._stream())
        return numbers[:, :wanted].reshape(self.images, *shape)


def frame(size: int) -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, each (1, size, size), from -1 to 1."""
    steps = (torch.arange(size) * 2 + 1) / size - 1
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return x[None], y[None]


def blend(below: Tensor, above: Tensor, share: Tensor) -> Tensor:
    """Light (n, 3, size, size) mixed by `share` (n, size, size) of `above`."""
    return below.lerp(above, share[:, None])


def where(happens: Tensor) -> Tensor:
    """Which images of a chance (n, 1, 1) it happens to: only these need be painted."""
    return happens.flatten().nonzero().flatten()


def paint(light: Tensor, i: Tensor, above: Tensor, share: Tensor) -> Tensor:
    """`blend` images i of `light` (n, 3, size, size), in place; the rest is given for those."""
    return light.index_copy_(0, i, blend(light[i], above, share))


def edge(distance: Tensor, sharpness: Tensor | float) -> Tensor:
    """0 to 1 across a soft edge at distance 0."""
    return torch.sigmoid(distance * sharpness)


_OCTAVES = (3, 6, 12, 24, 48, 96)  # cells per frame of the noise lattices


def grain(dice: Dice, size: int, fields: int) -> Tensor:
    """Multi-scale noise (n, fields, size, size), about zero mean and unit variance.

    Each image has its own balance of coarse and fine structure.
    """
    steepness = dice.uniform(0.0, 1.1)
    rows, power = [], torch.zeros(())
    for cells in _OCTAVES:
        if cells > 0.65 * size:  # finer than the pixels
            dice.skip()
            continue
        weight = (cells / 3) ** -steepness
        power = power + weight**2
        lattice = (dice.unit(fields, cells, cells) - 0.5) * weight[:, None]
        rows.append(lattice @ _enlarged(cells, size).T)
    # Columns of all octaves at once, which adds them up.
    columns = torch.cat([_enlarged(row.shape[2], size) for row in rows], 1)
    return (columns @ torch.cat(rows, 2)) * (4.5 / power.sqrt())[:, None]


@functools.cache
def _enlarged(cells: int, size: int) -> Tensor:
    """Bicubic interpolation of `cells` values to `size` as a matrix (size, cells)."""
    each = torch.eye(cells)[None, None]
    return F.interpolate(each, (size, cells), mode="bicubic", antialias=True)[0, 0]


# --- the backdrop ----------------------------------------------------------------------------

# Reflected light (red, green, blue) and how strongly it varies from place to place.
_SURFACES = torch.tensor(
    [
        [0.75, 0.80, 0.88, 0.10],  # overcast sky
        [0.80, 0.82, 0.84, 0.05],  # haze
        [0.30, 0.46, 0.78, 0.10],  # blue sky
        [0.050, 0.075, 0.028, 0.9],  # leaves
        [0.10, 0.12, 0.05, 0.8],  # bush in the sun
        [0.15, 0.10, 0.055, 0.8],  # autumn leaves
        [0.10, 0.085, 0.075, 0.9],  # bare branches
        [0.025, 0.027, 0.03, 0.7],  # deep shade
        [0.48, 0.42, 0.34, 0.18],  # plaster
        [0.24, 0.13, 0.095, 0.3],  # bricks
        [0.20, 0.20, 0.205, 0.25],  # concrete, asphalt
    ]
)
_SKIES = 3  # the first rows of _SURFACES


def _surface(dice: Dice, kind: Tensor, texture: Tensor, tint: Tensor) -> Tensor:
    """Light from a surface (n, 3, size, size) with its texture and slight changes of colour."""
    row = _SURFACES[kind]
    swing = row[:, 3:, None, None] * (0.85 + 0.9 * dice.unit(1, 1, 1))
    hues = swing * 0.3 * (dice.unit(3, 1, 1) - 0.5)
    colour = row[:, :3, None, None] * (0.9 + 0.2 * dice.unit(3, 1, 1))
    colour = colour * (0.6 + 0.8 * dice.unit(1, 1, 1))
    return colour * torch.exp(texture[:, None] * swing + tint[:, None] * hues)


def _add_facade(dice: Dice, light: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Rows of dark windows, for a third of the images."""
    width, left, height, top = (
        dice.uniform(3, 11),
        dice.angle(),
        dice.uniform(3, 11),
        dice.angle(),
    )
    of_columns, of_rows = dice.uniform(-0.3, 0.5), dice.uniform(-0.5, 0.3)
    i = where(dice.chance(0.33))
    depth = dice.uniform(0.3, 0.85)
    columns = torch.sin(x * width[i] + left[i])
    rows = torch.sin(y * height[i] + top[i])
    holes = edge(columns - of_columns[i], 12) * edge(rows - of_rows[i], 12)
    return light.index_copy_(0, i, light[i] * (1 - holes * depth[i])[:, None])


def _add_bar(dice: Dice, light: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A straight bar across the frame: a post, branch, wire, kerb or lane marking."""
    colour = 0.02 + 0.6 * dice.unit(1, 1, 1) ** 3
    turn, aside, width = dice.angle(), dice.uniform(-1, 1), dice.log_uniform(0.02, 0.2)
    i = where(dice.chance(0.35))
    across = (torch.cos(turn[i]) * x + torch.sin(turn[i]) * y - aside[i]).abs()
    return paint(light, i, colour[i], edge(width[i] - across, 40))


def _add_box(dice: Dice, light: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """An upright rectangle anywhere: a car, a bin, a shop sign, a window."""
    colour = dice.unit(1, 1, 1) ** 3 * (0.35 + 0.65 * dice.unit(3, 1, 1) ** 2)
    width, left = dice.uniform(0.1, 0.5), dice.uniform(-1.1, 1.1)
    height, top = dice.uniform(0.1, 0.5), dice.uniform(-1.1, 1.1)
    sharpness = dice.log_uniform(10, 60)
    i = where(dice.chance(0.3))
    across = width[i] - (x - left[i]).abs()
    along = height[i] - (y - top[i]).abs()
    return paint(light, i, colour[i], edge(torch.minimum(across, along), sharpness[i]))


def backdrop(dice: Dice, size: int, backlit: Tensor) -> Tensor:
    """What is behind the sign (n, 3, size, size): two surfaces and clutter; sky where backlit."""
    x, y = frame(size)
    rough, far_texture, near_texture = grain(dice, size, 3).unbind(1)
    sky = dice.index(_SKIES)
    kind = torch.where(backlit.flatten() > 0, sky, dice.index(len(_SURFACES)))
    far = _surface(dice, kind, far_texture, rough)
    near = _surface(dice, dice.index(len(_SURFACES)), near_texture, rough)
    near = _add_facade(dice, near, x, y)

    # Ground, skylines and house corners: borders are mostly level or upright, ragged or straight.
    turn = dice.index(4)[:, None, None] * (math.pi / 2) + dice.bell(0.2)
    border = torch.cos(turn) * x + torch.sin(turn) * y + dice.uniform(0, 0.5) * rough
    light = blend(far, near, edge(border - dice.uniform(-0.2, 1.2), dice.log_uniform(4, 40)))

    density = dice.uniform(0.8, 2.0)
    i = where(dice.chance(0.35))
    glimpses = edge(near_texture[i] - density[i], 6)
    paint(light, i, _SURFACES[sky][i, :3, None, None], glimpses)
    for _ in range(3):
        _add_box(dice, light, x, y)
    for _ in range(2):
        _add_bar(dice, light, x, y)
    return light


# --- material and light ----------------------------------------------------------------------


def weather(dice: Dice, face: Tensor, coverage: Tensor, stains: Tensor) -> Tensor:
    """An aged sign face: bleached colours and dirt; `face` is premultiplied by `coverage`."""
    fading = dice.uniform(0, 0.5)
    i = where(dice.chance(0.2))
    pale = 0.5 * face[i].mean(1, keepdim=True) + 0.25 * coverage[i, None]
    face = paint(face.contiguous(), i, pale, fading[i])
    dirt = edge(stains - dice.uniform(-0.5, 2.0), 2.5) * dice.uniform(0, 0.5)
    return face * (1 - dirt)[:, None]


def shade(dice: Dice, size: int, patches: Tensor) -> Tensor:
    """Light on the sign (n, size, size) around 1: a slope and now and then a cast shadow."""
    x, y = frame(size)
    turn = dice.angle()
    slope = dice.bell(0.2) * (torch.cos(turn) * x + torch.sin(turn) * y)
    light = torch.exp(slope)
    turn, raggedness, aside = dice.angle(), dice.uniform(0, 0.6), dice.uniform(-0.6, 0.6)
    sharpness, depth = dice.log_uniform(4, 25), dice.uniform(0.3, 0.7)
    i = where(dice.chance(0.25))
    rim = torch.cos(turn[i]) * x + torch.sin(turn[i]) * y + raggedness[i] * patches[i]
    shadow = edge(rim - aside[i], sharpness[i])
    return light.index_copy_(0, i, light[i] * (1 - shadow * depth[i]))


def sheen(dice: Dice, face: Tensor, coverage: Tensor) -> Tensor:
    """Sky mirrored in the sheeting, added to the face; seldom there."""
    x, y = frame(face.shape[-1])
    left, top, width = dice.uniform(-1, 1), dice.uniform(-1, 1), dice.uniform(0.2, 1.5)
    strength = dice.uniform(0.05, 0.35)
    i = where(dice.chance(0.15))
    reach = (x - left[i]) ** 2 + (y - top[i]) ** 2
    spot = torch.exp(-reach / width[i] ** 2) * strength[i]
    return face.index_copy_(0, i, face[i] + (spot * coverage[i])[:, None])


def occlude(
    dice: Dice, light: Tensor, x: Tensor, y: Tensor, ragged: Tensor, shining: Tensor
) -> Tensor:
    """A twig or a bush before the sign, in the light that shines on it (n, 1, 1).

    x and y are in units of the sign: twigs stay thin and bushes at the rim, so that the symbol
    can always be read.
    """
    turn, aside, bend = dice.angle(), dice.uniform(-0.9, 0.9), dice.uniform(-0.4, 0.4)
    width, twig = dice.uniform(0.015, 0.05), dice.chance(0.1)
    distance, bush = dice.uniform(0.75, 1.0), dice.chance(0.12)
    colour = _SURFACES[3 + dice.index(4)][:, :3, None, None]
    i = where(torch.maximum(twig, bush))
    x, y, turn = x[i], y[i], turn[i]
    along = torch.cos(turn) * x + torch.sin(turn) * y
    across = torch.cos(turn) * y - torch.sin(turn) * x
    bent = across - aside[i] - bend[i] * along**2
    by_twig = edge(width[i] - bent.abs(), 80) * twig[i]
    by_bush = edge(along - distance[i] + 0.08 * ragged[i], 20) * bush[i]
    lit = colour[i] * shining[i, None]
    return paint(light, i, lit, torch.maximum(by_twig, by_bush))


def haze(dice: Dice, light: Tensor, brightness: Tensor) -> Tensor:
    """Fog or a flare in the lens: contrast lost to an even grey of the given brightness."""
    share = dice.uniform(0.05, 0.45)
    i = where(dice.chance(0.15))
    grey = brightness.clamp(max=1)[:, None] * (0.3 + 0.05 * dice.unit(3, 1, 1))
    return paint(light, i, grey[i], share[i])


# --- lens and sensor -------------------------------------------------------------------------


def smear(dice: Dice, light: Tensor) -> Tensor:
    """Motion blur along a random direction, for a quarter of the images."""
    size = light.shape[-1]
    scale = size / _REFERENCE_SIZE
    moving = dice.chance(0.25).flatten().nonzero().flatten()
    turn, length = dice.angle(), dice.uniform(0.5, 3.0) * scale  # pixels
    step = torch.cat([torch.cos(turn), torch.sin(turn)], 2)[moving] * length[moving]
    x, y = frame(size)
    grid = torch.stack([x, y], -1)
    taps = max(4, round(2 * scale))
    total = torch.zeros(())
    for tap in range(taps):
        # One pixel is 2 / size of the frame's coordinates.
        shift = step[:, None] * ((tap + 0.5) / taps - 0.5) * (2 / size)
        total = total + F.grid_sample(
            light[moving], grid + shift, padding_mode="border", align_corners=False
        )
    return light.index_copy(0, moving, total / taps) if len(moving) else light


def defocus(dice: Dice, light: Tensor) -> Tensor:
    """Gaussian blur with its own width for each image."""
    scale = light.shape[-1] / _REFERENCE_SIZE
    widths = (0.35, 1.3)
    width = dice.log_uniform(*widths)[:, None] * scale
    reach = max(1, math.ceil(2.5 * widths[1] * scale))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / width) ** 2)
    taps = taps / taps.sum(-1, keepdim=True)
    return _convolve(_convolve(light, taps, 3), taps, 2)


def _convolve(planes: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Planes (n, 3, h, w) filtered along `dim` by each image's own taps (n, 1, 1, odd)."""
    reach, length = taps.shape[-1] // 2, planes.shape[dim]
    margin = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
    padded = F.pad(planes, margin, mode="replicate")
    total = padded.narrow(dim, 0, length) * taps[..., :1]
    for tap in range(1, taps.shape[-1]):
        total.addcmul_(padded.narrow(dim, tap, length), taps[..., tap : tap + 1])
    return total


def _sharpen(dice: Dice, picture: Tensor) -> Tensor:
    """The camera's own sharpening, which leaves bright and dark rims along edges."""
    around = _neighbours(_neighbours(picture, 3), 2)
    return picture.lerp(around, -dice.uniform(0.0, 1.2)[:, None])


def _neighbours(planes: Tensor, dim: int) -> Tensor:
    """Each pixel's mean with its neighbours along `dim`; at the rim there is one less."""
    length = planes.shape[dim]
    total = planes.clone()
    total.narrow(dim, 1, length - 1).add_(planes.narrow(dim, 0, length - 1))
    total.narrow(dim, 0, length - 1).add_(planes.narrow(dim, 1, length - 1))
    counts = torch.full((length,), 3.0)
    counts[[0, -1]] = 2.0
    return total.div_(counts if dim == 3 else counts[:, None])


def develop(dice: Dice, light: Tensor) -> Tensor:
    """Light (n, 3, size, size) as the camera stores it: colour cast, clipping, noise, uint8."""
    warmth, green = dice.bell(0.1), dice.bell(0.04)
    cast = torch.exp(torch.stack([warmth, green, -warmth], 1))
    picture = (light * cast).clamp_(0, 1).pow_(1 / _GAMMA)
    picture = _sharpen(dice, picture)
    black = dice.uniform(0.0, 0.045)[:, None] + 0.02 * dice.unit(3, 1, 1)  # the dark level
    strength = dice.log_uniform(0.003, 0.015)[:, None]
    picture.mul_(1 - black).add_(black)
    picture.addcmul_(dice.noise(*picture.shape[1:]), strength)
    return (picture * 255).round_().clamp_(0, 255).to(torch.uint8)
