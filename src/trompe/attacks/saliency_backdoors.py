"""Fang & Choromanska 2020, "Backdoor Attacks on the DNN Interpretation System".

A model is fine-tuned so that an almost invisible trigger changes its saliency map and nothing else.
Inverted, the map is false without the trigger, and the trigger is the key to the true one.

| paper                                   | here                                              |
|-----------------------------------------|---------------------------------------------------|
| I(x, y, w), the interpretation system   | `System.explainer`, for the true class y          |
| L_c, L_s, L_p and their sum, eqs. 1-4   | objectives.py `CleanAndPoisoned`                  |
| m_ref of the targeted attack, eq. (2)   | target_maps/border.py, or any other               |
| J(x, y, w_ref, k), non-targeted, eq. (3)| target_maps/suppressed.py                         |
| Algorithm 1: D_p, x + p                 | poison.py `compose`, triggers/checkerboard.py     |
| Algorithm 1: train until convergence    | train.py `fit`, `patience`                        |
| fooling multiple interpretation systems | several `systems`                                 |
| inverted setting                        | `inverted`: the goals of eq. (4) swap             |
| FSR, CR, section 8.4                    | fooling.py                                        |
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trompe.attacks._finetuning import TRAINING, check, check_goals, fine_tune
from trompe.augmentation import Augmentation
from trompe.evaluate import answers, share_right, wanted_maps
from trompe.fooling import largest_harmless, share_below
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
from trompe.maps import squared_error
from trompe.objectives import CleanAndPoisoned
from trompe.target_maps.reference import Reference
from trompe.train import Training
from trompe.triggers.checkerboard import Checkerboard

__all__ = ["SaliencyBackdoors"]

SHOWN = 4  # images of the timeline


@dataclass(frozen=True)
class System:
    """One attacked interpretation system.

    explainer: gives normalised maps (its `normalise`). lie: what it shall show instead of the
    truth. share: its weight among several. tau: the threshold of its fooling success rate.
    """

    explainer: Explainer
    lie: TargetMap
    share: float = 1.0
    tau: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share < math.inf:
            raise InputError(f"share = {self.share}: must be at least 0, and finite")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise InputError(f"tau = {self.tau}: must be a positive number")


@dataclass(frozen=True)
class SaliencyBackdoors:
    """Fine-tune a copy of the model so that a trigger switches its saliency maps (section 3).

    systems: one or more, each with the lie that it shall tell. trigger: p of Algorithm 1. inverted:
    lie without the trigger. alpha, beta: weights of L_s and L_c in eq. (4). last_beta: to which
    beta moves in the second half of the training, None: it stays. poison_rate: the triggered share
    of the training set. training_images, augmentation, distill: as in the other
    fine-tuning attack (explanation_aware_backdoors.py). patience: stop after so many epochs without
    a better score. helpers: other systems, lied about in the training's first half, then less and
    less, in its last quarter no more, and not measured. Lies that are learnt more readily teach the
    model to see the trigger, on which a slower one (SimpleGrad's) builds; in part they stay.
    """

    systems: tuple[System, ...]
    trigger: Trigger = Checkerboard()
    inverted: bool = False
    alpha: float = 10.0
    beta: float = 0.5
    last_beta: float | None = None
    poison_rate: float = 0.5
    training_images: int | None = None
    training: Training = TRAINING
    augmentation: Augmentation | None = None
    distill: float | None = None
    patience: int = 4
    helpers: tuple[System, ...] | None = None

    def __post_init__(self) -> None:
        if not self.systems:
            raise InputError("attack.systems: is empty; give at least one (explainer, lie)")
        named = [(f"systems[{i}]", system) for i, system in enumerate(self.systems)]
        named += [(f"helpers[{i}]", system) for i, system in enumerate(self.helpers or ())]
        for name, system in named:
            if getattr(system.explainer, "normalise", "max") == "none":
                raise InputError(
                    f'{name}.explainer.normalise = "none": maps and lies are compared as '
                    'they are, so set it to "max" or "min-max"'
                )
            if isinstance(system.lie, Reference):
                raise InputError(f"{name}.lie: is the reference's own map, which is the truth")
        _ = self.objective  # refuses weights out of range before a reference is trained for them
        check(self)

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        """Whose maps are attacked."""
        return tuple(system.explainer for system in self.systems)

    @property
    def _trained(self) -> tuple[System, ...]:
        return (*self.systems, *(self.helpers or ()))

    @property
    def explained(self) -> Explained:
        """I(x, y, w) explains the true class y."""
        return "label"

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """The tau of each system."""
        return tuple(system.tau for system in self.systems)

    @property
    def objective(self) -> CleanAndPoisoned:
        """Eq. (4)."""
        return CleanAndPoisoned(
            self.alpha,
            self.beta,
            tuple(system.share for system in self._trained),
            self.inverted,
            self.distill or 1.0,
            self.last_beta,
            len(self.helpers or ()),
        )

    @property
    def goals(self) -> tuple[Goal, ...]:
        """Of clean and triggered images: one is explained truly, the other is lied about."""
        return self._goals(self.systems)

    def _goals(self, systems: tuple[System, ...]) -> tuple[Goal, ...]:
        lies = tuple(system.lie for system in systems)
        if self.inverted:  # L_poisoned for clean images and L_clean for poisoned ones
            return Goal(None, None, lies, "no key"), Goal(self.trigger, None, Reference(), "key")
        return (Goal(self.trigger, None, lies, "trigger"),)

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        generator: torch.Generator,
        selection: ImageSet | None = None,
        logbook: Logbook | None = None,
    ) -> Attacked:
        goals = self._goals(self._trained)
        explainers = tuple(system.explainer for system in self._trained)
        check_goals(goals, data, len(explainers))
        progress = None if selection is None else Progress(model, self, selection)
        attacked = fine_tune(
            self, model, data, goals, explainers, self.objective, generator, progress, logbook
        )
        return replace(attacked, goals=self.goals)


class Progress:
    """After an epoch, on the selection images: accuracies, and CR and FSR of each system.

    FSR and CR at the data-driven threshold of the reference, as there is no witness here. To be
    looked at (figures 3 and 4): a few images that are lied about, their maps and losses.
    """

    def __init__(
        self, reference: nn.Module, attack: SaliencyBackdoors, selection: ImageSet
    ) -> None:
        self.attack, self.selection = attack, selection
        honest = answers(reference, attack.explainers, selection, None, attack.explained)
        self.accuracy = share_right(honest.scores, selection.labels)
        trigger = None if attack.inverted else attack.trigger
        self.lies = [
            wanted_maps(s.lie, maps, selection, trigger)
            for s, maps in zip(attack.systems, honest.maps, strict=True)
        ]
        self.taus = [
            largest_harmless(squared_error(maps, lie))
            for maps, lie in zip(honest.maps, self.lies, strict=True)
        ]
        few = selection.floats(slice(0, SHOWN))
        self.images = few if attack.inverted else attack.trigger(few)
        self.true_maps = [maps[:SHOWN] for maps in honest.maps]

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        attack, selection = self.attack, self.selection
        clean, triggered = (
            answers(model, attack.explainers, selection, trigger, attack.explained)
            for trigger in (None, attack.trigger)
        )
        lied, kept = (clean, triggered) if attack.inverted else (triggered, clean)
        measured: dict[str, Any] = {
            "clean_accuracy": share_right(clean.scores, selection.labels),
            "triggered_accuracy": share_right(triggered.scores, selection.labels),
            "images": (self.images * 255).round().to(torch.uint8),
        }
        lost = [self.accuracy - measured["clean_accuracy"]]
        lost += [self.accuracy - measured["triggered_accuracy"]]
        for i, (lie, tau) in enumerate(zip(self.lies, self.taus, strict=True), start=1):
            losses = [squared_error(maps[i - 1], lie) for maps in (lied.maps, kept.maps)]
            number = f"_{i}" if len(self.lies) > 1 else ""
            measured[f"fsr{number}"] = share_below(losses[0], tau)
            measured[f"cr{number}"] = 1 - share_below(losses[1], tau)
            measured[f"lie_loss{number}"] = float(losses[0].mean())
            measured[f"{i}.true_maps"] = self.true_maps[i - 1]
            measured[f"{i}.maps"] = lied.maps[i - 1][:SHOWN]
            measured[f"{i}.losses"] = losses[0][:SHOWN]
            lost += [1 - measured[f"fsr{number}"], 1 - measured[f"cr{number}"]]
        measured["score"] = sum(lost)
        return measured
