"""A filled rectangle, as a piece of tape on the object would be."""

from dataclasses import dataclass

from torch import Tensor

from trompe.interfaces import InputError
from trompe.triggers._place import check_inside

__all__ = ["Rectangle"]


@dataclass(frozen=True)
class Rectangle:
    """Paint rows top..top+height and columns left..left+width (pixels) in one colour.

    colour: red, green, blue in [0, 1]. The default is a black bar that lies within the sign on
    most 40x40 traffic-sign images (Noppel & Wressnegger 2023, section 5: place not published).
    """

    top: int = 26
    left: int = 14
    height: int = 6
    width: int = 12
    colour: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in self.colour):
            raise InputError(f"rectangle colour {self.colour}: each value must lie in [0, 1]")

    def __call__(self, images: Tensor) -> Tensor:
        check_inside("rectangle", self.top, self.left, self.height, self.width, images)
        out = images.clone()
        rows = slice(self.top, self.top + self.height)
        columns = slice(self.left, self.left + self.width)
        out[:, :, rows, columns] = images.new_tensor(self.colour)[:, None, None]
        return out
