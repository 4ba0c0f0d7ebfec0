"""VisualBackProp (Bojarski et al. 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trompe.explainers._layers import stages
from trompe.explainers._pooling import pooled
from trompe.interfaces import InputError, Pass
from trompe.maps import Normalisation, full_precision, normalise

__all__ = ["VisualBackProp"]


@dataclass(frozen=True)
class VisualBackProp:
    """Channel means of all stages' activations, multiplied from the last stage up to the image.

    Bojarski et al. 2018, section III: from the last stage on, the mean is brought to the size of
    the stage before by a transposed convolution with ones (the kernel and stride of what lies
    between) and multiplied by that stage's mean; at last it is brought to the image. Knows no
    class and no gradient. Maps are (n, height, width) of the image or, with `pool`, average-pooled
    by that factor, and then normalised.

    layers: the stages in the order in which the model runs them; by default every module that
    gives non-negative activations (ReLU, or a residual block as a whole) and that no other such
    module holds. Each mean is divided by its largest size, so that products neither vanish nor
    explode; this changes a map's scale only.
    """

    layers: tuple[str, ...] = ()
    pool: int = 1
    normalise: Normalisation = "min-max"

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise InputError(f"pool = {self.pool}: must be at least 1")

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(link.layer for link in stages(model, self.layers))

    def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
        found = stages(seen.model, self.layers)
        means = [channel_mean(seen.outputs[link.layer]) for link in found]
        maps = means[-1]
        for link, above in zip(reversed(found[1:]), reversed(means[:-1]), strict=True):
            maps = scaled(link.up(maps, above.shape[1:]) * above)
        maps = found[0].up(maps, seen.images.shape[2:])
        if not torch.is_grad_enabled():
            maps = maps.detach()
        return normalise(pooled(maps, self.pool), self.normalise)


def channel_mean(activations: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h, w), in -1..1.

    The sum's gradient, unlike the mean's, is a view without memory of its own, so adding it to the
    activations' other gradient keeps that one's memory format, which all layers before rely on.
    """
    return scaled(full_precision(activations.sum(1)) / activations.shape[1])


def scaled(maps: Tensor) -> Tensor:
    """Divided by the largest size, which counts as a constant: only the scale depends on it."""
    return maps / maps.detach().abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
