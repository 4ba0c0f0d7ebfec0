"""Checks that a trigger lies inside the image."""

from torch import Tensor

from trompe.interfaces import InputError


def check_inside(what: str, top: int, left: int, height: int, width: int, images: Tensor) -> None:
    """InputError if rows top..top+height and columns left..left+width leave the image."""
    rows, columns = images.shape[2:]
    if height < 1 or width < 1:
        raise InputError(f"{what}: its size is {height}x{width} pixels; both must be at least 1")
    if top < 0 or left < 0 or top + height > rows or left + width > columns:
        raise InputError(
            f"{what}: it covers rows {top}..{top + height - 1} and columns "
            f"{left}..{left + width - 1}, but the image has {rows} rows and {columns} columns; "
            "make it smaller or move it inside"
        )
