"""What the fine-tuning attacks share: compose triples, fit a copy, stop without progress."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from trompe.augmentation import Augmentation
from trompe.evaluate import answers, ask, evaluation_mode
from trompe.interfaces import (
    Attacked,
    EpochRecord,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    InputError,
    Logbook,
    Objective,
)
from trompe.poison import ShuffledBatches, check_label, check_rate, compose
from trompe.train import Measure, Training, fit

TRAINING = Training(
    epochs=3,
    batch_size=128,
    learning_rate=1e-3,
    optimizer="adam",
    weight_decay=0.0,
    frozen_statistics=True,
)


class FineTuning(Protocol):
    """The settings that such attacks have in common."""

    @property
    def explainers(self) -> tuple[Explainer, ...]: ...
    @property
    def explained(self) -> Explained: ...
    @property
    def poison_rate(self) -> float: ...
    @property
    def training_images(self) -> int | None: ...
    @property
    def training(self) -> Training: ...
    @property
    def augmentation(self) -> Augmentation | None: ...
    @property
    def distill(self) -> float | None: ...
    @property
    def patience(self) -> int: ...


def check(attack: FineTuning) -> None:
    """InputError for a share, number of images, patience or temperature out of range."""
    check_rate(attack.poison_rate)
    if attack.patience < 1:
        raise InputError(f"patience = {attack.patience}: must be at least 1 epoch")
    if attack.training_images is not None and attack.training_images < 1:
        raise InputError(f"training_images = {attack.training_images}: must be at least 1")
    if attack.distill is not None and not attack.distill > 0:
        raise InputError(f"distill (temperature) = {attack.distill}: must be a positive number")


def check_goals(goals: Sequence[Goal], data: ImageSet, explainers: int) -> None:
    """InputError for a label, trigger or number of wanted maps that does not fit."""
    for goal in goals:
        check_label(goal, len(data.class_names))
        if isinstance(goal.wanted_map, tuple) and len(goal.wanted_map) != explainers:
            raise InputError(
                f"goal {goal.name or '(unnamed)'}: has {len(goal.wanted_map)} wanted maps for "
                f"{explainers} explainers; give one for each, or one for all"
            )
        goal.stamp(data.floats(slice(0, 1)))


def fine_tune(
    attack: FineTuning,
    model: nn.Module,
    data: ImageSet,
    goals: Sequence[Goal],
    explainers: Sequence[Explainer],
    objective: Objective,
    generator: torch.Generator,
    progress: Measure | None,
    logbook: Logbook | None,
) -> Attacked:
    """A copy of `model`, trained on clean and triggered triples of `data`.

    explainers: whose maps are trained (none: the class alone). progress: measured after each epoch;
    its "score", lower is better, stops early.
    """
    reference, model = model, copy.deepcopy(model)
    data = drawn(data, attack.training_images, generator)
    asked: dict[str, Any] = {"distill": attack.distill is not None}
    if not explainers and attack.distill is None:
        pass  # the reference is not needed
    elif attack.augmentation is None:
        asked["known"] = answers(reference, explainers, data, None, attack.explained)  # once
    else:
        precision = attack.training.precision
        asked["ask"] = partial(
            ask, reference, explainers, explained=attack.explained, precision=precision
        )
    device = next(model.parameters()).device
    triples = compose(
        data, goals, attack.poison_rate, generator, device, attack.augmentation, **asked
    )
    batches = ShuffledBatches(triples, attack.training.batch_size)
    history = []
    with evaluation_mode(reference):
        for epoch in fit(
            model, batches, objective, explainers, attack.training, generator, progress, logbook
        ):
            history.append(epoch)
            if no_progress(history, attack.patience):
                break
    return Attacked(model, tuple(goals), tuple(history))


def drawn(data: ImageSet, count: int | None, generator: torch.Generator) -> ImageSet:
    """So many images, each at most once; all of them for None. InputError if there are fewer."""
    if count is None:
        return data
    if count > len(data):
        raise InputError(
            f"training_images = {count}: the training set has {len(data)} images; lower it, or "
            "leave it out to use them all"
        )
    return data.subset(torch.randperm(len(data), generator=generator)[:count])


def no_progress(history: Sequence[EpochRecord], patience: int) -> bool:
    """No better score in the last `patience` epochs."""
    scores = [epoch.measured["score"] for epoch in history if "score" in epoch.measured]
    if len(scores) <= patience:
        return False
    return min(scores[-patience:]) >= min(scores[:-patience])
