"""Pure loss terms: scores, maps and a batch -> named scalars whose sum is the loss."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trompe.interfaces import Batch, InputError
from trompe.maps import squared_error, standardise


def class_loss(scores: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Cross-entropy (n,) against the labels; in rows with reference scores, distillation instead.

    That is T^2 KL(softmax(reference / T) || softmax(scores / T)): Hinton et al. 2015, section 2.
    """
    hard = F.cross_entropy(scores, batch.labels, reduction="none")
    if batch.reference_scores is None:
        return hard
    taught = ~batch.reference_scores.isnan().any(1)
    teacher = (batch.reference_scores.nan_to_num() / temperature).log_softmax(1)
    pupil = (scores / temperature).log_softmax(1)
    soft = F.kl_div(pupil, teacher, reduction="none", log_target=True).sum(1)
    return torch.where(taught, temperature**2 * soft, hard)


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
    temperature: of `class_loss`.
    """

    weight: float
    image_size: tuple[int, int]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight (lambda) = {self.weight}: must lie in 0..1")

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        prediction = class_loss(scores, batch, self.temperature).mean()
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


@dataclass(frozen=True)
class CleanAndPoisoned:
    """L_clean on images that are explained truly, L_poisoned on those that are lied about.

    Fang & Choromanska 2020, eqs. (1) to (4). alpha, beta: the paper's, at least 0. shares: each
    explainer's weight in the sum over interpretation systems ("Fooling multiple ..."). inverted:
    lie about the images without the trigger. Maps and wanted maps are normalised already.
    temperature: of `class_loss`. last_beta: see `beta_at`. helpers: see `shares_at`.
    """

    alpha: float
    beta: float
    shares: tuple[float, ...]
    inverted: bool = False
    temperature: float = 1.0
    last_beta: float | None = None
    helpers: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 0, and finite")
        if self.last_beta is not None and not (self.last_beta > 0 and self.beta > 0):
            raise InputError(
                f"last_beta = {self.last_beta}, beta = {self.beta}: both must be positive, as the "
                "one grows from the other by a factor a step"
            )

    def beta_at(self, progress: float) -> float:
        """beta in the training's first half; then by equal factors to last_beta at its end."""
        if self.last_beta is None:
            return self.beta
        return float(self.beta * (self.last_beta / self.beta) ** max(0.0, 2 * progress - 1))

    def shares_at(self, progress: float) -> tuple[float, ...]:
        """The last `helpers` shares fall to 0 in the training's third quarter; the others stay."""
        attacked, left = len(self.shares) - self.helpers, min(1.0, max(0.0, 3 - 4 * progress))
        return (*self.shares[:attacked], *(left * share for share in self.shares[attacked:]))

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        lied = batch.triggered != self.inverted
        loss_c = class_loss(scores, batch, self.temperature)
        loss_map = sum(  # eq. (1) where the truth is wanted; eq. (2) or (3) where a lie is
            share * squared_error(given, wanted)
            for share, given, wanted in zip(
                self.shares_at(batch.progress), maps, batch.wanted_maps, strict=True
            )
        )
        beta = self.beta_at(batch.progress)
        scale = self.alpha + beta + 1
        return {  # eq. (4)
            "classification": (beta * loss_c / scale).mean(),
            "true maps": torch.where(lied, 0, self.alpha * loss_map / scale).mean(),
            "false maps": torch.where(lied, loss_map / scale, 0).mean(),
        }
