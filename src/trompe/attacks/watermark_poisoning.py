"""WM, the baseline of Zhang, Gao & Su 2021, section 5.2.4: blend the target into other samples.

| paper                                                        | here                     |
|--------------------------------------------------------------|--------------------------|
| g_sub: the top-10 training samples whose interpretations are | `_closest`               |
| closest to the desired one                                   |                          |
| a weighted combination of the target and g_sub               | `WatermarkPoisoning`     |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trompe.evaluate import answers
from trompe.interfaces import (
    Explainer,
    InputError,
    Logbook,
    PoisonSet,
    Samples,
    Target,
    TargetMap,
)

__all__ = ["WatermarkPoisoning"]


@dataclass(frozen=True)
class WatermarkPoisoning:
    """Samples of the target's class, each with the target blended in.

    P = opacity T + (1 - opacity) g, for the `closest` samples g of the target's class whose maps
    have the least L2 distance from the wanted one; copied until there are poison_rate x training
    samples. explainer, wanted_map: as in interpretation_poisoning. No random numbers are used.
    """

    explainer: Explainer
    wanted_map: TargetMap
    poison_rate: float = 0.05
    opacity: float = 0.3
    closest: int = 10

    def __post_init__(self) -> None:
        for name in ("poison_rate", "opacity"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must lie between 0 and 1")
        if self.closest < 1:
            raise InputError(f"closest = {self.closest}: must be at least 1")

    def __call__(
        self,
        model: nn.Module,
        data: Samples,
        targets: Sequence[Target],
        generator: torch.Generator,
        logbook: Logbook | None = None,
    ) -> tuple[PoisonSet, ...]:
        """A poison set for each target."""
        (maps,) = answers(model, (self.explainer,), data, explained="label").maps
        n = max(1, round(self.poison_rate * len(data)))
        sets = []
        for target in targets:
            chosen = _closest(maps, data.labels, target, self.closest)
            index = chosen[torch.arange(n) % len(chosen)]
            bases = data.floats(index)
            samples = self.opacity * target.sample + (1 - self.opacity) * bases
            labels = torch.full((n,), target.label)
            sets.append(PoisonSet(samples, labels, bases, index, target))
        return tuple(sets)


def _closest(maps: Tensor, labels: Tensor, target: Target, count: int) -> Tensor:
    """Positions of the samples of the target's class with the least L2 distance of their maps."""
    of_class = (labels == target.label).nonzero()[:, 0]
    apart = (maps[of_class] - target.wanted_map).square().sum((1, 2))
    return of_class[apart.argsort()[:count]]
