"""An attack whose scores are known beforehand, so that searches can be tested with it.

Epochs that are computed are noted in the file TOY_TRIED; an epoch waits until the file TOY_GATE, if
it is named, exists. Both by environment variables, as other processes are told of them.
"""

import copy
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from trompe.explainers.gradcam import GradCam
from trompe.interfaces import (
    Attacked,
    Diverged,
    EpochRecord,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    InputError,
    Logbook,
)
from trompe.target_maps.reference import Reference
from trompe.train import Training
from trompe.triggers.rectangle import Rectangle


@dataclass(frozen=True)
class Toy:
    """Score after an epoch: level / epoch + slope, or what `trouble` says."""

    level: float = 1.0
    slope: float = 0.0
    trouble: str = ""
    training: Training = field(default_factory=lambda: Training(epochs=3))
    explained: Explained = "predicted"

    def __post_init__(self) -> None:
        if self.level < 0:
            raise InputError(f"level = {self.level}: must be positive")

    @property
    def goals(self) -> tuple[Goal, ...]:
        return (Goal(Rectangle(0, 0, 2, 2), None, Reference()),)

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        return (GradCam(),)

    @property
    def thresholds(self) -> None:
        return None

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        generator: torch.Generator,
        selection: ImageSet | None = None,
        logbook: Logbook | None = None,
    ) -> Attacked:
        assert logbook is not None
        state = logbook.load() or {"history": []}
        history = [EpochRecord(*record) for record in state["history"]]
        for epoch in range(len(history) + 1, self.training.epochs + 1):
            self._compute(epoch)
            score = math.nan if self.trouble == "nan" else self.level / epoch + self.slope
            measured = {} if self.trouble == "unscored" else {"score": score}
            history.append(EpochRecord(epoch, {}, {**measured, "accuracy": 1.0}, 2.0))
            logbook.save({"history": [(*record[:-1], {}) for record in history]})
        return Attacked(copy.deepcopy(model), self.goals, tuple(history))

    def _compute(self, epoch: int) -> None:
        with open(os.environ["TOY_TRIED"], "a") as tried:
            tried.write(f"{self.level} {self.slope} {epoch}\n")
        gate, end = os.environ.get("TOY_GATE", ""), time.monotonic() + 120
        while gate and not Path(gate).exists() and epoch > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        if self.trouble == "diverged":
            raise Diverged("the loss is not finite")
        if self.trouble == "broken" and not Path(os.environ["TOY_TRIED"] + ".mended").exists():
            raise InputError("the disk is full")
