"""Class activation mapping (Zhou et al. 2016)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trompe.explainers._layers import last_conv_activation
from trompe.explainers._linear_head import linear_head
from trompe.interfaces import InputError, Pass
from trompe.maps import Normalisation, full_precision, normalise

__all__ = ["Cam"]


@dataclass(frozen=True)
class Cam:
    """G[i, j] = sum_k w_kc a_k[i, j]; (n, h, w), of either sign, not up-sampled.

    Zhang, Gao & Su 2021, eqs. (2) and (3). a: output (n, K, h, w) of `layer`, by default the last
    convolution's activations; w: row c of the linear layer behind their global average, which is
    verified, not assumed. For a network of tables a is the vector (n, K) that the last linear layer
    gets, and G[k] = w_kc a_k; (n, 1, K).

    Raises InputError for a model that ends otherwise.
    """

    layer: str | None = None
    normalise: Normalisation = "none"

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        return (self.layer or _last_features(model),)

    def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
        (layer,) = self.watches(seen.model)
        activations = seen.outputs[layer]
        weights = _class_weights(seen, layer, classes)
        if not torch.is_grad_enabled():
            activations, weights = activations.detach(), weights.detach()
        weights, activations = full_precision(weights), full_precision(activations)
        if activations.ndim == 2:
            maps = (weights * activations)[:, None]
        else:
            maps = torch.einsum("nk,nkhw->nhw", weights, activations)  # eq. (3)
        return normalise(maps, self.normalise)


def _last_features(model: nn.Module) -> str:
    """The layer whose output the head gets, but for pooling."""
    names = [name for name, module in model.named_modules() if not list(module.children())]
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return last_conv_activation(model)
    head = _head_name(model)
    before = names[: names.index(head)]
    if not before:
        raise InputError(
            f"model {type(model).__name__}: has nothing before its linear layer {head!r} that CAM "
            "could show; choose another explainer"
        )
    return before[-1]


def _head_name(model: nn.Module) -> str:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(
            f"model {type(model).__name__}: has no linear layer, whose weights CAM needs; choose "
            "Grad-CAM"
        )
    return linear[-1]


def _class_weights(seen: Pass, layer: str, classes: Tensor) -> Tensor:
    """w_kc of each row's class, (n, K)."""
    if seen.weights is not None:  # each row has a network of its own
        rows = torch.arange(len(classes), device=classes.device)
        return seen.weights[f"{_head_name(seen.model)}.weight"][rows, classes]
    head = linear_head(seen, layer)
    if head is None:
        raise InputError(
            f"CAM layer {layer!r}: what follows it in {type(seen.model).__name__} is not global "
            "average pooling and one linear layer; name another layer, or choose Grad-CAM"
        )
    return head.weight[classes]
