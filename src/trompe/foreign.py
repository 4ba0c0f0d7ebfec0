"""Other people's explainers as witnesses: for evaluation, not to be trained through."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from captum.attr import GuidedBackprop, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

from trompe.explainers._pooling import pooled
from trompe.interfaces import InputError, Pass
from trompe.maps import Normalisation, normalise

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]
_CAPTUMS_REMARKS = (  # on what it does and undoes by itself
    "Input Tensor 0 did not already require gradients",
    "Setting backward hooks on ReLU",
)


@dataclass(frozen=True)
class Foreign:
    """An explainer made of any function (model, images, classes) -> maps or attributions.

    images (n, 3, height, width) in [0, 1], classes int64 (n,). It may give maps (n, h, w), or
    signed attributions (n, 3, h, w), of which the largest magnitude over the channels counts. The
    function runs the model as often as it likes. name: for tables. pool, normalise: as in
    InputGradient.
    Raises InputError where grad mode is on: such maps cannot be trained through.
    """

    name: str
    explain: Explain
    pool: int = 1
    normalise: Normalisation = "max"

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        return ()

    def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise InputError(
                f"explainer {self.name!r}: is another library's and cannot be trained through; "
                "use it to look at a model, not to attack one"
            )
        with torch.enable_grad(), warnings.catch_warnings():
            for text in _CAPTUMS_REMARKS:
                warnings.filterwarnings("ignore", text)
            maps = self.explain(seen.model, seen.images.detach(), classes)
        maps = maps.detach()
        if maps.ndim == 4:
            maps = maps.abs().amax(1)
        if maps.ndim != 3 or len(maps) != len(seen.images):
            raise InputError(
                f"explainer {self.name!r}: gave shape {tuple(maps.shape)} for "
                f"{len(seen.images)} images; (images, height, width) is needed"
            )
        return normalise(pooled(maps, self.pool), self.normalise)


def integrated_gradients(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Sundararajan et al. 2017, from a black image in 20 steps; Captum's."""
    explainer = IntegratedGradients(model)
    attributions: Tensor = explainer.attribute(
        images, target=classes, n_steps=20, internal_batch_size=len(images)
    )
    return attributions


def smoothgrad(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Smilkov et al. 2017: the mean gradient of 10 noisy copies (deviation .1); Captum's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        explainer = NoiseTunnel(Saliency(model))
        attributions: Tensor = explainer.attribute(
            images, target=classes, nt_samples=10, stdevs=0.1, nt_samples_batch_size=1, abs=False
        )
    return attributions


def guided_backprop(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Springenberg et al. 2015, over the model's ReLU modules; Captum's."""
    attributions: Tensor = GuidedBackprop(model).attribute(images, target=classes)
    return attributions


WITNESSES: dict[str, Explain] = {
    "integrated gradients": integrated_gradients,
    "smoothgrad": smoothgrad,
    "guided backprop": guided_backprop,
}


def witnesses(pool: int = 1) -> tuple[Foreign, ...]:
    """Captum's explainers that look at what an attack was not trained for."""
    return tuple(Foreign(name, explain, pool) for name, explain in WITNESSES.items())
