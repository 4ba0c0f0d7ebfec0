"""What each traffic sign looks like: flat, evenly lit faces painted once with polygons and text.

A face lives in the unit coordinates of its sign: x to the right, y down, the outer rim touching
the square [-1, 1] x [-1, 1]. The canvas reaches a little further (REACH) so that the rim keeps
a clean transparent neighbour when the face is resampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

REACH = 1.12
"""Half the side of a face's canvas, in units of the sign's own half side."""

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

# Print colours (sRGB) of sheeting in fair light; red and blue are duller than pure RGB ones.
RED: Colour = (168, 32, 38)
WHITE: Colour = (222, 222, 216)
BLUE: Colour = (22, 82, 170)
YELLOW: Colour = (236, 168, 20)
BLACK: Colour = (22, 22, 24)
GREY: Colour = (118, 120, 120)

# The same sign is not cut alike everywhere: border width and symbol size vary by print run.
PRINT_RUNS: tuple[float, ...] = (0.9, 1.0, 1.1)

_CANVAS = 448  # painted once at this side, then shrunk with antialiasing to what is needed


class Face:
    """A canvas in sign units on which one sign is painted.

    `weight` is the print run's factor for border widths and strokes (1.0 is nominal).
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        # Transparent pixels carry the grey of a sign's edge: it bleeds in when shrinking.
        self.picture = Image.new("RGBA", (_CANVAS, _CANVAS), (*GREY, 0))
        self.pen = ImageDraw.Draw(self.picture)

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        half = _CANVAS / 2
        return [(half + x / REACH * half, half + y / REACH * half) for x, y in points]

    def polygon(self, points: Points, colour: Colour) -> None:
        self.pen.polygon(self.pixels(points), fill=colour)

    def disc(self, radius: float, colour: Colour, centre: tuple[float, float] = (0, 0)) -> None:
        x, y = centre
        corners = self.pixels([(x - radius, y - radius), (x + radius, y + radius)])
        self.pen.ellipse([*corners[0], *corners[1]], fill=colour)

    def stroke(self, points: Points, width: float, colour: Colour) -> None:
        """A polyline with round joints and flat ends."""
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0)
            ox, oy = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
            corners = [(x0 + ox, y0 + oy), (x1 + ox, y1 + oy), (x1 - ox, y1 - oy)]
            self.polygon([*corners, (x0 - ox, y0 - oy)], colour)
        for joint in points[1:-1]:
            self.disc(width / 2, colour, joint)

    def arrow(self, path: Points, width: float, head: float, colour: Colour) -> None:
        """A stroke along `path` whose last point carries an arrow head of half width `head`."""
        (x0, y0), (x1, y1) = path[-2], path[-1]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        self.stroke(path, width, colour)
        tip = (x1 + dx * head * 1.1, y1 + dy * head * 1.1)
        left = (x1 - dy * head - dx * head * 0.2, y1 + dx * head - dy * head * 0.2)
        right = (x1 + dy * head - dx * head * 0.2, y1 - dx * head - dy * head * 0.2)
        self.polygon([tip, left, right], colour)

    def text(self, text: str, width: float, height: float, colour: Colour) -> None:
        """Bold text centred on the sign, condensed or stretched to width x height."""
        stencil = _stencil(text)
        scale = _CANVAS / 2 / REACH
        shape = (round(2 * width * scale), round(2 * height * scale))
        stencil = stencil.resize(shape, Image.Resampling.BICUBIC)
        corner = ((_CANVAS - shape[0]) // 2, (_CANVAS - shape[1]) // 2)
        self.picture.paste(Image.new("RGB", shape, colour), corner, stencil)


def _stencil(text: str) -> Image.Image:
    """Coverage of `text` in the bundled bold font, cropped to its ink."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(path), 200)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    ink = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(ink).text((-left, -top), text, font=font, fill=255)
    return ink


def _regular(corners: int, radius: float, turn_degrees: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon; at 0 degrees the first one points up."""
    angles = [math.radians(turn_degrees + 360 / corners * i) for i in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def _rounded_triangle(inset: float, corner: float, flip: int) -> list[tuple[float, float]]:
    """Outline of a triangle (apex up for flip 1, down for -1) moved inwards by `inset`.

    `corner` is the radius of the rounded corners; all three circles sit inside the outline.
    """
    centre_y, circumradius = 0.3, 1.3  # the rounded outline spans the unit square's width
    reach = circumradius - 2 * (inset + corner)
    points = []
    for angle in (-90, 30, 150):
        x0 = reach * math.cos(math.radians(angle))
        y0 = reach * math.sin(math.radians(angle)) + centre_y
        for step in range(-60, 61, 10):
            a = math.radians(angle + step)
            points.append((x0 + corner * math.cos(a), flip * (y0 + corner * math.sin(a))))
    return points


# --- grounds: the shape and border shared by a family of signs -------------------------------


def _prohibition(face: Face) -> None:
    face.disc(1.0, WHITE)
    face.disc(0.965, RED)
    face.disc(0.965 - 0.22 * face.weight, WHITE)


def _mandatory(face: Face) -> None:
    face.disc(1.0, WHITE)
    face.disc(1.0 - 0.05 * face.weight, BLUE)


def _triangle(face: Face, flip: int) -> None:
    face.polygon(_rounded_triangle(0.0, 0.13, flip), WHITE)
    face.polygon(_rounded_triangle(0.03, 0.11, flip), RED)
    face.polygon(_rounded_triangle(0.03 + 0.15 * face.weight, 0.05, flip), WHITE)


# --- faces: one function per sign, painted on its ground -------------------------------------


def _speed_limit(face: Face, digits: str) -> None:
    _prohibition(face)
    width = {2: 0.48, 3: 0.58}[len(digits)]
    face.text(digits, width * (0.75 + 0.25 * face.weight), 0.4, BLACK)


def _car(face: Face, x: float, colour: Colour) -> None:
    """A saloon seen from behind, 0.6 wide, around (x, 0)."""
    cab = [(x - 0.22, -0.02), (x - 0.15, -0.24), (x + 0.15, -0.24), (x + 0.22, -0.02)]
    face.polygon(cab, colour)
    body = [(x - 0.3, 0.16), (x - 0.3, -0.02), (x + 0.3, -0.02), (x + 0.3, 0.16)]
    face.polygon(body, colour)
    for wheel in (x - 0.21, x + 0.21):
        face.stroke([(wheel, 0.16), (wheel, 0.25)], 0.15, colour)
    face.polygon(
        [(x - 0.13, -0.05), (x - 0.09, -0.17), (x + 0.09, -0.17), (x + 0.13, -0.05)], WHITE
    )


def _no_passing(face: Face) -> None:
    _prohibition(face)
    _car(face, -0.35, RED)
    _car(face, 0.35, BLACK)


def _priority_road(face: Face) -> None:
    face.polygon(_regular(4, 1.05, 0), BLACK)
    face.polygon(_regular(4, 1.02, 0), WHITE)
    face.polygon(_regular(4, 1.02 - 0.32 * face.weight, 0), BLACK)
    face.polygon(_regular(4, 0.98 - 0.32 * face.weight, 0), YELLOW)


def _give_way(face: Face) -> None:
    _triangle(face, flip=-1)


def _stop(face: Face) -> None:
    face.polygon(_regular(8, 1.08, 22.5), WHITE)
    face.polygon(_regular(8, 1.08 - 0.06 * face.weight, 22.5), RED)
    face.text("STOP", 0.76, 0.27 * face.weight, WHITE)


def _no_entry(face: Face) -> None:
    face.disc(1.0, WHITE)
    face.disc(0.965, RED)
    high = 0.17 * face.weight
    face.polygon([(-0.74, -high), (0.74, -high), (0.74, high), (-0.74, high)], WHITE)


def _general_caution(face: Face) -> None:
    _triangle(face, flip=1)
    bar = 0.1 * face.weight
    face.polygon([(-bar, -0.36), (bar, -0.36), (0.6 * bar, 0.32), (-0.6 * bar, 0.32)], BLACK)
    face.disc(bar, BLACK, (0.0, 0.49))


def _bend_right(face: Face) -> None:
    _triangle(face, flip=1)
    bend = [(-0.15, 0.6), (-0.15, 0.22), (-0.11, 0.1), (0.0, 0.03), (0.13, 0.01)]
    face.arrow(bend, 0.17 * face.weight, 0.21, BLACK)


def _bumpy_road(face: Face) -> None:
    _triangle(face, flip=1)
    road = 0.48
    for middle in (-0.25, 0.25):
        steps = [math.radians(angle) for angle in range(0, 181, 15)]
        bump = [(middle - 0.24 * math.cos(a), road - 0.28 * math.sin(a)) for a in steps]
        face.polygon(bump, BLACK)
    low = road + 0.12 * face.weight
    face.polygon([(-0.58, road), (0.58, road), (0.58, low), (-0.58, low)], BLACK)


def _road_work(face: Face) -> None:
    _triangle(face, flip=1)
    limb = 0.12 * face.weight
    face.disc(0.1, BLACK, (-0.02, -0.32))
    face.stroke([(-0.02, -0.18), (-0.16, 0.17)], 1.7 * limb, BLACK)  # bent back
    face.stroke([(-0.15, 0.1), (-0.07, 0.34), (-0.11, 0.6)], limb, BLACK)
    face.stroke([(-0.18, 0.1), (-0.26, 0.34), (-0.42, 0.6)], limb, BLACK)
    face.stroke([(0.0, -0.12), (0.17, 0.1)], limb, BLACK)  # arm
    face.stroke([(-0.13, 0.0), (0.36, 0.35)], 0.6 * limb, BLACK)  # shovel
    face.polygon([(0.1, 0.6), (0.23, 0.4), (0.4, 0.33), (0.56, 0.6)], BLACK)  # heap


def _arrow_on_blue(face: Face, path: Points) -> None:
    _mandatory(face)
    face.arrow(path, 0.25 * face.weight, 0.36, WHITE)


_AHEAD: Points = [(0.0, 0.68), (0.0, -0.26)]
_TURN_RIGHT: Points = [(-0.32, 0.6), (-0.32, 0.06), (-0.25, -0.08), (-0.1, -0.15), (0.2, -0.15)]
_TURN_LEFT: Points = [(-x, y) for x, y in _TURN_RIGHT]
_KEEP_RIGHT: Points = [(-0.48, -0.48), (0.22, 0.22)]


def _roundabout(face: Face) -> None:
    _mandatory(face)
    for start in (20, 140, 260):
        angles = [math.radians(start - step) for step in range(0, 80, 10)]
        path = [(0.5 * math.sin(a), -0.5 * math.cos(a)) for a in angles]
        face.arrow(path, 0.17 * face.weight, 0.22, WHITE)


_PAINTERS: dict[str, Callable[[Face], None]] = {
    "speed limit 30": partial(_speed_limit, digits="30"),
    "speed limit 50": partial(_speed_limit, digits="50"),
    "speed limit 60": partial(_speed_limit, digits="60"),
    "speed limit 80": partial(_speed_limit, digits="80"),
    "speed limit 100": partial(_speed_limit, digits="100"),
    "no passing": _no_passing,
    "priority road": _priority_road,
    "give way": _give_way,
    "stop": _stop,
    "no vehicles": _prohibition,
    "no entry": _no_entry,
    "general caution": _general_caution,
    "bend to the right": _bend_right,
    "bumpy road": _bumpy_road,
    "road work": _road_work,
    "ahead only": partial(_arrow_on_blue, path=_AHEAD),
    "turn right": partial(_arrow_on_blue, path=_TURN_RIGHT),
    "turn left": partial(_arrow_on_blue, path=_TURN_LEFT),
    "keep right": partial(_arrow_on_blue, path=_KEEP_RIGHT),
    "roundabout": _roundabout,
}

CLASS_NAMES: tuple[str, ...] = tuple(_PAINTERS)


# --- companions: what else hangs on the same pole --------------------------------------------


def _plate(face: Face, high: float, lines: int) -> None:
    """A white plate with a black rim and lines of unreadable writing."""
    face.polygon([(-0.9, -high), (0.9, -high), (0.9, high), (-0.9, high)], BLACK)
    inner = high - 0.06
    face.polygon([(-0.84, -inner), (0.84, -inner), (0.84, inner), (-0.84, inner)], WHITE)
    for line in range(lines):
        y = inner * (2 * line + 1 - lines) / lines
        for x in (-0.55, -0.25, 0.1, 0.45):
            face.stroke([(x - 0.12, y), (x + 0.12, y)], 0.7 * inner / lines, BLACK)


def _board(face: Face, colour: Colour) -> None:
    """A coloured direction board."""
    face.polygon([(-1.0, -0.7), (1.0, -0.7), (1.0, 0.7), (-1.0, 0.7)], WHITE)
    face.polygon([(-0.95, -0.65), (0.95, -0.65), (0.95, 0.65), (-0.95, 0.65)], colour)
    for y in (-0.25, 0.25):
        face.stroke([(-0.7, y), (0.5, y)], 0.2, BLACK if colour == YELLOW else WHITE)


_COMPANIONS: tuple[Callable[[Face], None], ...] = (
    partial(_plate, high=0.45, lines=1),
    partial(_plate, high=0.7, lines=2),
    partial(_board, colour=YELLOW),
    partial(_board, colour=BLUE),
)


class Sheets(NamedTuple):
    """All faces at one resolution, ready for resampling.

    `faces` is float32 (classes, print runs, 4, side, side), `companions` float32
    (count, 4, side, side): reflectance in [0, 1], linear in light and premultiplied by the
    coverage, which is the fourth channel.
    """

    faces: Tensor
    companions: Tensor


@lru_cache(maxsize=8)
def sheets(side: int) -> Sheets:
    """Paint every face at `side` x `side` texels (cached: treat the tensors as read-only)."""
    rows = [[_developed(p, weight, side) for weight in PRINT_RUNS] for p in _PAINTERS.values()]
    companions = [_developed(paint, 1.0, side) for paint in _COMPANIONS]
    companions += [row[1] for row in rows]
    return Sheets(torch.stack([torch.stack(row) for row in rows]), torch.stack(companions))


def _developed(paint: Callable[[Face], None], weight: float, side: int) -> Tensor:
    """One face as (4, side, side): painted, made linear in light, premultiplied, shrunk."""
    face = Face(weight)
    paint(face)
    pixels = torch.from_numpy(np.array(face.picture)).permute(2, 0, 1).float() / 255
    coverage = pixels[3:]
    linear = torch.cat([pixels[:3].pow(2.2) * coverage, coverage])[None]
    shrunk = torch.nn.functional.interpolate(
        linear, (side, side), mode="bilinear", antialias=side < _CANVAS
    )
    return shrunk[0].clamp(0, 1)
