"""Noppel & Wressnegger 2023, "Explanation-Aware Backdoors in a Nutshell" (summary of: Noppel,
Peter, Wressnegger 2023, "Disguising Attacks with Explanation-Aware Backdoors").

A model is fine-tuned so that a trigger in the image changes its prediction, its explanation, or
both, while clean images look untouched.

| paper                                    | here                                           |
|------------------------------------------|------------------------------------------------|
| h_theta(x), section 2                    | `explainer`, by default explainers/gradcam.py  |
| EP, PP, dual (section 4.1)               | `explanation_preserving` and its neighbours    |
| D = clean triples and triggered triples  | poison.py `compose`                            |
| L = (1 - lambda) L_pred + lambda L_expl  | objectives.py `PredictionAndExplanation`       |
| softplus while training (section 4.2)    | `training.softplus_beta`                       |
| early stop (section 5)                   | `patience`, _finetuning.py `no_progress`       |
| score of the search (section 5)          | `score`                                        |
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from trompe.attacks._finetuning import TRAINING, check, check_goals, fine_tune
from trompe.augmentation import Augmentation
from trompe.evaluate import (
    answers,
    clean_evidence,
    summarise,
    triggered_evidence,
)
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import (
    Attacked,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    InputError,
    Logbook,
    TargetMap,
    Trigger,
)
from trompe.metrics.accuracy import accuracy
from trompe.metrics.attack_success import attack_success
from trompe.metrics.map_distance import map_distance
from trompe.objectives import PredictionAndExplanation
from trompe.target_maps.picture import Picture
from trompe.target_maps.reference import Reference
from trompe.train import Training

__all__ = ["ExplanationAwareBackdoors"]


def explanation_preserving(trigger: Trigger, target_class: int) -> Goal:
    """{(T(x), y', h_ref(x))}: another prediction under the benign explanation."""
    return Goal(trigger, target_class, Reference(), "explanation-preserving")


def prediction_preserving(trigger: Trigger, wanted_map: TargetMap = Picture()) -> Goal:  # noqa: B008
    """{(T(x), y, r')}: the right prediction under an arbitrary explanation."""
    return Goal(trigger, None, wanted_map, "prediction-preserving")


def dual(trigger: Trigger, target_class: int, wanted_map: TargetMap = Picture()) -> Goal:  # noqa: B008
    """{(T(x), y', r')}: another prediction under an arbitrary explanation."""
    return Goal(trigger, target_class, wanted_map, "dual")


@dataclass(frozen=True)
class ExplanationAwareBackdoors:
    """Fine-tune a copy of the model on clean and triggered triples (sections 4.1 and 4.2).

    goals: one or more triggers, each with its own label and wanted map. weight: the paper's
    lambda, 0 gives the vanilla backdoor. poison_rate: the triggered share of the training set,
    .5 as in the paper. training_images: that many random images of the training set are enough;
    None takes them all. augmentation: of all images, before the trigger; the reference then
    explains each augmented image anew, one more forward pass a step. distill: where no goal names
    a label, the reference's probabilities at this temperature are taught instead of the label y
    (not in the paper; Hinton et al. 2015), which keeps more of its accuracy at no cost; None
    teaches y. patience: stop after so many epochs without a better `score`.
    """

    goals: tuple[Goal, ...]
    explainer: Explainer = field(default_factory=GradCam)
    weight: float = 0.9
    poison_rate: float = 0.5
    training_images: int | None = None
    training: Training = TRAINING
    augmentation: Augmentation | None = None
    distill: float | None = None
    patience: int = 4

    def __post_init__(self) -> None:
        if not self.goals:
            raise InputError("attack.goals: is empty; give at least one goal (trigger, wanted_map)")
        for i, goal in enumerate(self.goals):
            if goal.trigger is None:
                raise InputError(f"goals[{i}].trigger: is missing; every goal here needs one")
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight (lambda) = {self.weight}: must lie in 0..1")
        check(self)

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        """Whose maps are attacked."""
        return (self.explainer,)

    @property
    def explained(self) -> Explained:
        """The class whose map the reference gives and whose maps are measured."""
        return "predicted"

    @property
    def thresholds(self) -> None:
        """The paper counts no fooled maps."""
        return None

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        generator: torch.Generator,
        selection: ImageSet | None = None,
        logbook: Logbook | None = None,
    ) -> Attacked:
        check_goals(self.goals, data, len(self.explainers))
        objective = PredictionAndExplanation(self.weight, data.size, self.distill or 1.0)
        progress = None if selection is None else Progress(model, self, selection)
        attacked = self.explainers if self.weight else ()
        return fine_tune(
            self, model, data, self.goals, attacked, objective, generator, progress, logbook
        )


class Progress:
    """After an epoch: the search's four metrics and their `score` on the selection images."""

    def __init__(
        self, reference: nn.Module, attack: ExplanationAwareBackdoors, selection: ImageSet
    ) -> None:
        self.attack, self.selection = attack, selection
        self.reference = answers(reference, (attack.explainer,), selection)
        honest = clean_evidence(self.reference, self.reference, selection)
        self.reference_accuracy = summarise(accuracy, honest).mean

    def __call__(self, model: nn.Module) -> dict[str, float]:
        given = answers(model, (self.attack.explainer,), self.selection)
        clean = clean_evidence(given, self.reference, self.selection)
        measured = {
            "clean_accuracy": summarise(accuracy, clean).mean,
            "clean_mse": summarise(map_distance, clean).mean,
        }
        success, distance = [], []
        for goal in self.attack.goals:
            given = answers(model, (self.attack.explainer,), self.selection, goal.trigger)
            evidence = triggered_evidence(given, self.reference, self.selection, goal)
            metric = accuracy if goal.label is None else attack_success
            success.append(summarise(metric, evidence).mean)
            distance.append(summarise(map_distance, evidence).mean)
        measured["triggered_success"] = sum(success) / len(success)
        measured["triggered_mse"] = sum(distance) / len(distance)
        lost = [
            (self.reference_accuracy if goal.label is None else 1.0) - reached
            for goal, reached in zip(self.attack.goals, success, strict=True)
        ]
        measured["score"] = score(
            self.reference_accuracy - measured["clean_accuracy"],
            sum(lost) / len(lost),
            measured["clean_mse"],
            measured["triggered_mse"],
        )
        return measured


def score(
    lost_accuracy: float, lost_success: float, clean_mse: float, triggered_mse: float
) -> float:
    """Weighted sum of four metrics, lower is better (section 5; the weights are not published)."""
    return 30 * lost_accuracy + 5 * lost_success + clean_mse + 2 * triggered_mse
