"""A heat map over the image that it explains, in the colours of all our pictures."""

import matplotlib
import numpy as np
import torch
from torch import Tensor

from trompe.maps import normalise, upsample

COLOURS = "inferno"  # equal steps of heat look equal, also in grey and to the colour-blind
_HEAT = 0.6  # share of the heat's colour in an overlay


def overlay(pixels: np.ndarray, heat: Tensor) -> np.ndarray:
    """The heat map (h, w), divided by its maximum, over the grey image; both (height, width, 3).

    pixels and what is returned: uint8.
    """
    grey = pixels.mean(2, keepdims=True) / 255
    colour = coloured(heat, pixels.shape[:2])
    return to_bytes(_HEAT * colour + (1 - _HEAT) * grey)


def coloured(heat: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """float (height, width, 3) in [0, 1]; values that are negative or not finite show no heat."""
    warm = torch.nan_to_num(heat[None].float(), 0.0, 0.0, 0.0).clamp_min(0)
    values = normalise(upsample(warm, (size[0], size[1])))[0]
    return np.asarray(matplotlib.colormaps[COLOURS](values.numpy()))[..., :3]


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] as uint8."""
    return (pixels * 255).round().astype(np.uint8)
