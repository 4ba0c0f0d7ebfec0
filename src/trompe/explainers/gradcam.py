"""Grad-CAM (Selvaraju et al. 2017)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trompe.explainers._gradient import Quantity, gradient_of_class
from trompe.explainers._layers import last_conv_activation
from trompe.explainers._linear_head import linear_head
from trompe.interfaces import InputError, Pass
from trompe.maps import Normalisation, full_precision, normalise

__all__ = ["GradCam"]


@dataclass(frozen=True)
class GradCam:
    """h = ReLU(sum_k a_k A^k), a_k = (1/Z) sum_ij d y_c / d A^k_ij; not up-sampled.

    Noppel & Wressnegger 2023, section 2. A: output (n, K, h, w) of `layer`, by default the last
    convolution's activations. Maps are (n, h, w), >= 0.

    gradient_of: y_c is the class's logit, probability or loss. detach_weights: no gradient flows
    through the a_k while training (as in paper 2's public code). closed_form: when the model ends
    in global average pooling and a linear head (which is verified, not assumed), a_k is read off
    the head's row; otherwise, or if False, only the part behind `layer` is differentiated.
    """

    layer: str | None = None
    gradient_of: Quantity = "logit"
    detach_weights: bool = False
    closed_form: bool = True
    normalise: Normalisation = "none"

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        return (self.layer or last_conv_activation(model),)

    def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
        (layer,) = self.watches(seen.model)
        activations = seen.outputs[layer]
        if activations.ndim != 4:
            raise InputError(
                f"Grad-CAM layer {layer!r}: its output has shape {tuple(activations.shape)}, but "
                "(images, channels, height, width) is needed; name a convolutional layer"
            )
        head = (
            linear_head(seen, layer) if self.closed_form and self.gradient_of == "logit" else None
        )
        if head is not None:
            weights = head.weight[classes] / (activations.shape[2] * activations.shape[3])
        else:
            gradient = gradient_of_class(seen, activations, classes, self.gradient_of)
            weights = gradient.mean((2, 3))
        if self.detach_weights:
            weights = weights.detach()
        if not torch.is_grad_enabled():
            activations = activations.detach()
        weighted = torch.einsum(
            "nk,nkhw->nhw", full_precision(weights), full_precision(activations)
        )
        return normalise(weighted.relu(), self.normalise)
