"""The report's gallery as a figure, for a paper or a slide: figure 1 of the papers on backdoors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from trompe.interfaces import InputError
from trompe.report.gallery import mark, matched, sharing, title, titles
from trompe.report.pictures import heat_pixels
from trompe.report.reading import Condition, Run, load_all
from trompe.report.style import COLOURS, INK, canvas, short
from trompe.runs import RunFolder

KINDS = (".png", ".pdf", ".svg")
_SIDE = 1.45  # inches of a picture with the class below it
_GAP = 0.12  # between conditions, of a picture's width
_LETTERS = 22  # of a class's name
_SAID = {"right": INK, "wrong": COLOURS[1], "target": COLOURS[1]}


def draw_gallery(runs: Sequence[RunFolder], file: Path, images: int = 4) -> None:
    """A row an image; for each condition the image, the reference's map, and each run's map.

    Below each map the class that its model predicts, coloured where it is wrong, and framed where
    it is the adversary's. Runs that share their images stand beside each other, others below; so do
    several explainers of a run. images: at most so many of the gallery's. Raises InputError as
    `render` does, and for a file that is none of `KINDS`.
    """
    if file.suffix.lower() not in KINDS:
        raise InputError(f"figure {file}: must end in one of {', '.join(KINDS)}")
    if images < 1:
        raise InputError(f"images = {images}: must be at least 1")
    groups = sharing(load_all(runs))
    rows = [min(images, len(members[0].labels)) for members in groups]
    columns = max(len(matched(members)) * (2 + len(members)) for members in groups)
    with canvas(file, _SIDE * columns, (_SIDE + 0.1) * sum(rows) + 0.6 * len(groups)) as figure:
        parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)[:, 0]
        for part, members, count in zip(parts, groups, rows, strict=True):
            if len(groups) > 1:
                part.suptitle(title(members), x=0.01, ha="left", fontsize="medium")
            _draw(part, members, count)


def _draw(part: Any, runs: list[Run], count: int) -> None:
    names = titles(runs) if len(runs) > 1 else ["manipulated"]
    lines = matched(runs)
    each = 2 + len(runs)
    widths = [*([1.0] * each + [_GAP]) * len(lines)][:-1]
    axes = part.subplots(count, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (line, row) in enumerate(lines):
        run, condition = next((run, c) for run, c in row if c is not None)
        shown = run.shown[condition.name]
        block = axes[:, k * (each + 1) : k * (each + 1) + each]
        for axis, name in zip(block[0], (line, "reference", *names), strict=True):
            axis.set_title(name, loc="center", fontsize="medium", wrap=True)
        for i, places in enumerate(block):
            image = shown.images[i]
            places[0].imshow(image.permute(1, 2, 0).numpy())
            _below(places[0], run.classes[int(run.labels[i])], INK)
            _draw_map(
                places[1], run, i, image, shown.reference_maps[i], shown.reference_predicted[i]
            )
            for axis, (own, seen) in zip(places[2:], row, strict=True):
                if seen is not None:
                    _draw_manipulated(axis, own, seen, i)


def _draw_manipulated(axis: Axes, run: Run, condition: Condition, i: int) -> None:
    shown = run.shown[condition.name]
    target = int(shown.wanted_labels[i])
    _draw_map(axis, run, i, shown.images[i], shown.maps[i], shown.predicted[i], target)


def _draw_map(
    axis: Axes, run: Run, i: int, image: Tensor, heat: Tensor, predicted: Tensor, target: int = -1
) -> None:
    axis.imshow(heat_pixels(image, heat))
    said = int(predicted)
    how = mark(int(run.labels[i]), said, target)
    _below(axis, run.classes[said], _SAID[how], framed=how == "target")


def _below(axis: Axes, name: str, colour: str, framed: bool = False) -> None:
    axis.text(
        *(0.5, -0.05),
        short(name, _LETTERS),
        color=colour,
        ha="center",
        va="top",
        fontsize="small",
        transform=axis.transAxes,
        bbox={"boxstyle": "square,pad=0.15", "fc": "none", "ec": colour} if framed else None,
    )
