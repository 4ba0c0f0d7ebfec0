"""Figure 6 of Fang & Choromanska 2020: what each explainer shows of one attacked model."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from torch import Tensor

from trompe.report.pictures import heat_pixels
from trompe.report.style import canvas

_SIDE = 1.25  # inches a map
_RED = "#d62728"


def draw_transfer(
    file: Path,
    lines: Mapping[str, tuple[Tensor, Sequence[Tensor]]],
    explainers: Sequence[str],
    attacked: Set[str],
) -> None:
    """A picture for each line and explainer, in red boxes where the explainer was attacked.

    lines: by title, the image as the model saw it, uint8 (3, height, width), and each explainer's
    map (h, w). Written to `file`, a PNG.
    """
    size = (_SIDE * len(explainers) + 1.2, _SIDE * len(lines) + 0.4)
    with canvas(file, *size) as figure:
        axes = figure.subplots(len(lines), len(explainers), squeeze=False)
        for row, (title, (image, maps)) in zip(axes, lines.items(), strict=True):
            row[0].set_ylabel(title, rotation=0, ha="right", va="center")
            for axis, name, heat in zip(row, explainers, maps, strict=True):
                axis.imshow(heat_pixels(image, heat))
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(visible=name in attacked, color=_RED, linewidth=3)
        for axis, name in zip(axes[0], explainers, strict=True):
            axis.set_title(name.replace("_", " ").replace(" ", "\n"), fontsize="medium")
