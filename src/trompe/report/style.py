"""How all figures look, and how those that are files of their own are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from trompe.files import write_atomically

# Okabe & Ito's colours that stand out on white and on black; each line has its marker as well.
COLOURS = ("#0a84c6", "#d55e00", "#009e73", "#cc79a7", "#8a7500", "#7a7a7a")
INK = "#010203"  # stands for the page's text colour
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "trompe",  # the same figure gives the same bytes
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.alpha": 0.25,
    "hatch.color": "white",
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
}


def literally(name: str) -> str:
    """matplotlib takes what stands between two dollar signs for a formula."""
    return name.replace("$", r"\$")


def short(name: str, letters: int) -> str:
    """Of a name at most so many letters, as they stand."""
    return literally(name if len(name) <= letters else f"{name[: letters - 1]}…")


@contextmanager
def canvas(file: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, written when the block ends, as the file's name says.

    .png, .pdf or .svg.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        kind = file.suffix.removeprefix(".").lower()
        write_atomically(file, lambda temporary: figure.savefig(temporary, format=kind, dpi=130))
