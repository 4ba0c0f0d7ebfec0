"""Where images and tables come from. One file a source; each gives `train()` and `test()`."""

from trompe.data._reading import read_image
from trompe.data._splits import halves

__all__ = ["halves", "read_image"]
