"""What the attacks that edit weights share: what they need to know of a network."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trompe.classifier import Classifier
from trompe.explainers._gradient import gradient_of_class
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import ImageSet, InputError
from trompe.recording import watch


@dataclass(frozen=True)
class TrueMaps:
    """The largest value of an unedited network's maps; size: their (h, w)."""

    range: float
    size: tuple[int, int]


def true_maps(model: nn.Module, layer: str, images: Tensor) -> TrueMaps:
    """Of Grad-CAM of the predicted classes; the range is 1 if all maps are empty."""
    with torch.no_grad(), watch(model, [layer]) as record:
        seen = record(images)
        maps = GradCam(layer)(seen, seen.scores.argmax(1))
    return TrueMaps(float(maps.max()) or 1.0, (maps.shape[1], maps.shape[2]))


def typical_weight(model: nn.Module, layer: str, k: int, images: Tensor) -> float:
    """alpha_k of Grad-CAM (Viering et al. 2019, eq. 2) for the predicted classes: the median.

    InputError if it is 0: the scores do not depend on that map.
    """
    with torch.no_grad(), watch(model, [layer]) as record:
        seen = record(images)
        maps = seen.outputs[layer]
        gradient = gradient_of_class(seen, maps, seen.scores.argmax(1), "logit")
    alpha = float(gradient[:, k].mean((1, 2)).median())
    if alpha == 0:
        raise InputError(
            f"layer {layer!r}: the scores do not depend on the map that shall lie; name another "
            "layer"
        )
    return alpha


def some_images(data: ImageSet, count: int, model: nn.Module) -> Tensor:
    """Images (n, 3, h, w) from all over the data, on the model's device, in its precision."""
    parameter: Any = next(model.parameters())
    spread = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    return data.floats(spread).to(parameter)


def as_classifier(model: nn.Module) -> Classifier:
    """The model itself, or a plain network behind a normalisation that does nothing.

    InputError for one that has been edited already.
    """
    if isinstance(model, Classifier):
        if model.edit is not None:
            raise InputError("model: has one feature map more already; give one without")
        return model
    parameter: Any = next(model.parameters())
    return Classifier(model, (0.0,), (1.0,)).to(parameter)
