"""Pictures as text that a page can hold: data URIs and inline SVG."""

import base64
import io

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from trompe.overlay import COLOURS, coloured, overlay, to_bytes

_SHARP = 160  # pixels per side that a picture has at least
_SMALL = 48  # pixels per side of a map without an image


def data_uri(pixels: np.ndarray) -> str:
    """uint8 (height, width, 3) -> the PNG as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_uri(image: Tensor) -> str:
    """uint8 (3, height, width), enlarged bicubically if it is small."""
    return data_uri(_enlarged(image))


def heat_uri(image: Tensor | None, heat: Tensor) -> str:
    """The heat map (h, w), divided by its maximum, over the grey image or alone."""
    if image is None:
        return data_uri(to_bytes(coloured(heat, (_SMALL, _SMALL))))
    return data_uri(heat_pixels(image, heat))


def heat_pixels(image: Tensor, heat: Tensor) -> np.ndarray:
    """The heat map (h, w), divided by its maximum, over the grey image; uint8 (height, width, 3).

    image: uint8 (3, height, width), enlarged bicubically if it is small.
    """
    return overlay(_enlarged(image), heat)


def colour_bar() -> str:
    """The colours from no heat (left) to the most (right)."""
    return data_uri(to_bytes(matplotlib.colormaps[COLOURS](np.linspace(0, 1, 128))[None, :, :3]))


def _enlarged(image: Tensor) -> np.ndarray:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    zoom = max(1, -(-_SHARP // min(picture.size)))
    size = (picture.width * zoom, picture.height * zoom)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
