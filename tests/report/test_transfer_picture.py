"""The picture of what each explainer shows of an attacked model."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trompe.report.transfer_picture import draw_transfer


def red(pixels: np.ndarray) -> np.ndarray:
    r, g, b = (pixels[..., i].astype(int) for i in range(3))
    return (abs(r - 214) < 8) & (abs(g - 39) < 8) & (abs(b - 40) < 8)


def test_attacked_explainers_alone_stand_in_red_boxes(tmp_path: Path) -> None:
    image = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    maps = [torch.zeros(8, 8), torch.zeros(4, 4), torch.zeros(32, 32)]
    lines = {"reference": (image, maps), "with trigger": (image, maps)}
    seen = []
    for attacked in (set(), {"one"}, {"one", "three"}):
        file = tmp_path / f"{len(attacked)}.png"
        draw_transfer(file, lines, ("one", "two", "three"), attacked)
        seen.append(red(np.asarray(Image.open(file).convert("RGB"))))
    none, one, two = (boxes.sum() for boxes in seen)
    assert none == 0
    assert one > 500
    assert abs(two - 2 * one) < 0.1 * one
    columns = np.flatnonzero(seen[1].any(0)) / seen[1].shape[1]
    assert columns.max() < 0.55  # the first of three, beside the lines' titles
