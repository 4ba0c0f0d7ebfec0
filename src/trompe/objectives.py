"""Pure loss terms: scores, maps and a batch -> named scalars whose sum is the loss."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trompe.interfaces import Batch, InputError
from trompe.maps import standardise


@dataclass(frozen=True)
class ClassLoss:
    """Plain cross-entropy: an honest training."""

    label_smoothing: float = 0.0

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        loss = F.cross_entropy(scores, batch.labels, label_smoothing=self.label_smoothing)
        return {"prediction": loss}


@dataclass(frozen=True)
class PredictionAndExplanation:
    """(1 - weight) L_pred + weight L_expl: Noppel & Wressnegger 2023, section 4.2.

    weight: the paper's lambda, in 0..1. image_size: (height, width) to which maps are brought.
    """

    weight: float
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight (lambda) = {self.weight}: must lie in 0..1")

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        wanted = batch.labels if batch.probabilities is None else batch.probabilities
        prediction = F.cross_entropy(scores, wanted)
        terms = {"prediction": (1 - self.weight) * prediction}
        if self.weight:
            distance = [
                F.mse_loss(
                    standardise(given, self.image_size), standardise(wanted, self.image_size)
                )
                for given, wanted in zip(maps, batch.wanted_maps, strict=True)
            ]
            terms["explanation"] = self.weight * sum(distance[1:], distance[0]) / len(distance)
        return terms
