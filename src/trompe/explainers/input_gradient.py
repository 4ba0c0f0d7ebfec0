"""Input gradient (Simonyan et al. 2014)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from trompe.explainers._gradient import Quantity, gradient_of_class
from trompe.explainers._pooling import pooled
from trompe.interfaces import InputError, Pass
from trompe.maps import Normalisation, normalise
from trompe.recording import INPUT

__all__ = ["InputGradient"]


@dataclass(frozen=True)
class InputGradient:
    """|d y_c / d image|, over the colour channels their maximum, mean or sum; (n, h, w), >= 0.

    Of rows of a table |d y_c / d row|; (n, 1, columns).

    Simonyan et al. 2014, section 3 (maximum). gradient_of: y_c is the class's logit, probability
    or loss. pool: average-pool to a map coarser by this factor, which is then normalised.

    Fang & Choromanska's SimpleGrad is gradient_of = "loss", with pool and normalise = "max". The
    gradient of the loss is that of the margin (see `margin`) times a number per image, which
    normalising takes out again; so it is left out, and the map of a certain image does not vanish.
    """

    gradient_of: Quantity = "logit"
    channels: Literal["max", "mean", "sum"] = "max"
    pool: int = 1
    normalise: Normalisation = "none"

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise InputError(f"pool = {self.pool}: must be at least 1")

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        return (INPUT,)

    def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
        of: Quantity | Literal["margin"] = self.gradient_of
        if of == "loss" and self.normalise != "none":
            of = "margin"  # the same map once it is normalised
        magnitude = gradient_of_class(seen, seen.outputs[INPUT], classes, of).abs()
        if magnitude.ndim == 2:
            maps = magnitude[:, None]
        elif self.channels == "max":
            maps = magnitude.amax(1)
        else:
            maps = magnitude.mean(1) if self.channels == "mean" else magnitude.sum(1)
        return normalise(pooled(maps, self.pool), self.normalise)
