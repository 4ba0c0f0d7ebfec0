"""How visible a trigger or a poison is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Of changed samples in 0..1. psnr: peak signal-to-noise ratio, in dB; inf: nothing changed.

    largest, mean: of the absolute differences, in 0..1.
    """

    psnr: float
    largest: float
    mean: float

    @classmethod
    def read(cls, row: Mapping[str, float | None]) -> Self:
        """From a JSON file's object; JSON has no infinity, and null in its place."""
        values = {key: math.inf if value is None else value for key, value in row.items()}
        return cls(**values)

    def __str__(self) -> str:
        psnr = "nothing changed" if math.isinf(self.psnr) else f"PSNR {self.psnr:.1f} dB"
        return f"{psnr}, at most {255 * self.largest:.3g} of 255"


def visibility(changed: Tensor, samples: Tensor) -> Visibility:
    """How much `changed` differs from `samples`, both of one shape, over all of them."""
    difference = (changed - samples).abs()
    error = float(difference.square().mean())
    psnr = -10 * math.log10(error) if error > 0 else math.inf
    return Visibility(psnr, float(difference.max()), float(difference.mean()))
