"""The picture of a search: scores.png, from its search.json.

Two lists of values give a table of coloured cells; anything else, one panel for each parameter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from trompe.files import read_json
from trompe.report.style import COLOURS, canvas

_COLOURS = "viridis"  # the best are dark; also in grey and to the colour-blind
_HATCH = "////"
_FAILED = "0.85"  # grey
_BEST = COLOURS[1]
_Row = Mapping[str, Any]


def draw_search(folder: Path) -> Path:
    """The file. InputError if the folder has no search.json."""
    found = read_json(folder / "search.json")
    rows = [row for row in found["rows"] if row["settings"]]
    values = list(found["search"]["parameters"].values())
    file = folder / "scores.png"
    draw_scores(rows, values, found["search"]["score"], file)
    return file


def draw_scores(rows: Sequence[_Row], values: list[Any], score: str, file: Path) -> None:
    """rows: points as search.json has them. values: of each parameter, a list or a range."""
    names = list(rows[0]["settings"]) if rows else []
    if len(names) == 2 and all(isinstance(one, list) for one in values):
        size = (2.0 + 0.72 * len(values[1]), 1.5 + 0.5 * len(values[0]))
        with canvas(file, *size) as figure:
            _draw_grid(figure, rows, names, values, score)
    else:
        with canvas(file, 1.0 + 2.8 * max(1, len(names)), 3.2) as figure:
            _draw_panels(figure, rows, names, values, score)


def _draw_grid(
    figure: Figure, rows: Sequence[_Row], names: list[str], values: list[list[Any]], score: str
) -> None:
    """A cell a point: first parameter downwards, second to the right."""
    axis = figure.subplots()
    colours, norm = matplotlib.colormaps[_COLOURS], _norm(rows)
    best = _best(rows)
    for row in rows:
        y, x = (one.index(row["settings"][n]) for one, n in zip(values, names, strict=True))
        box = (x - 0.5, y - 0.5), 1, 1
        if row["score"] is None or row["state"] == "failed":
            axis.add_patch(Rectangle(*box, facecolor=_FAILED))
            axis.text(x, y, row["state"], ha="center", va="center", fontsize=7, color="black")
            continue
        colour = colours(norm(row["score"]))
        hatch = _HATCH if row["pruned"] else None
        axis.add_patch(Rectangle(*box, facecolor=colour, hatch=hatch, lw=0))
        dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55
        ground = {"facecolor": colour, "edgecolor": "none", "pad": 1.5} if row["pruned"] else None
        axis.text(
            *(x, y),
            _short(row["score"]),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
            bbox=ground,
        )
        if row is best:
            axis.add_patch(
                Rectangle(*box, fill=False, edgecolor=_BEST, lw=2.5, zorder=3, clip_on=False)
            )
    for one, name, which in zip(values, names, (axis.yaxis, axis.xaxis), strict=True):
        which.set_ticks(range(len(one)), [f"{v:g}" if _number(v) else str(v) for v in one])
        which.set_label_text(name)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlim(-0.5, len(values[1]) - 0.5)
    axis.set_ylim(len(values[0]) - 0.5, -0.5)
    axis.set_title(f"{score} after the last epoch, lower is better")
    handles = [Patch(fill=False, edgecolor=_BEST, lw=2.5, label="best")]
    if any(row["pruned"] for row in rows):
        label = "given up early: score at that epoch"
        handles.append(Patch(facecolor="0.6", hatch=_HATCH, lw=0, label=label))
    if any(row["state"] == "failed" for row in rows):
        handles.append(Patch(facecolor=_FAILED, label="failed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _draw_panels(
    figure: Figure, rows: Sequence[_Row], names: list[str], values: list[Any], score: str
) -> None:
    """Scores against each parameter by itself."""
    axes = figure.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0]
    scored = [row for row in rows if row["score"] is not None and row["state"] != "failed"]
    best = _best(rows)
    for axis, name, one in zip(axes, names, values, strict=False):
        for row in scored:
            place = row["settings"][name]
            if isinstance(one, list):  # each value as far from the next one
                place = one.index(place)
            face = "none" if row["pruned"] else COLOURS[0]
            colour = _BEST if row is best else COLOURS[0]
            size = 9 if row is best else 6
            axis.plot(
                *(place, row["score"]),
                "o",
                markersize=size,
                markerfacecolor=_BEST if row is best else face,
                markeredgecolor=colour,
            )
        _scale(axis, one)
        axis.set_xlabel(name)
        axis.grid(axis="y")
    if scored and min(row["score"] for row in scored) > 0:
        axes[0].set_yscale("log")
        for which in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")  # 0.06, not 6 x 10^-2
    axes[0].set_ylabel(f"{score}, lower is better")
    looks = (
        ("best", _BEST, _BEST),
        ("tried to the end", COLOURS[0], COLOURS[0]),
        ("given up early: score at that epoch", COLOURS[0], "none"),
    )
    handles = [
        Line2D([], [], ls="", marker="o", markeredgecolor=edge, markerfacecolor=face, label=label)
        for label, edge, face in looks
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _scale(axis: Axes, values: Any) -> None:
    if isinstance(values, list):
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set_xlim(-0.5, len(values) - 0.5)
    elif values.get("log"):
        axis.set_xscale("log")


def _best(rows: Sequence[_Row]) -> _Row | None:
    complete = [row for row in rows if row["state"] == "complete"]
    return min(complete, key=lambda row: row["score"], default=None)


def _norm(rows: Sequence[_Row]) -> Normalize:
    """Scores may span orders of magnitude."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    return LogNorm(low, high) if 0 < low < high else Normalize(low, high)


def _short(score: float) -> str:
    return f"{score:.3f}" if abs(score) < 10 else f"{score:.1f}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
