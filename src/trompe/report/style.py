"""How all figures look."""

from typing import Any

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
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
}
