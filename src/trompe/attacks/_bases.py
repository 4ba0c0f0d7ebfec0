"""What poisons are made from, and how far they may be from it."""

from typing import Literal

import torch
from torch import Tensor

from trompe.interfaces import ImageSet, InputError, Samples, TableSet, Target

Bases = Literal["target", "class", "near", "both", "around"]
Categories = Literal["free", "fixed"]


def choose_bases(
    data: Samples, target: Target, rate: float, bases: Bases, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """n = rate x training samples, float (n, ...), and their positions in `data` (-1: the target).

    Zhang, Gao & Su 2021, section 4.1. "target": copies of it. "class": different samples of its
    class, drawn at random. "near": those of its class that are nearest to it. "both": half copies,
    half drawn. "around": half copies, half the nearest. Raises InputError if the class has too few
    samples.
    """
    n = max(1, round(rate * len(data)))
    copies = {"target": n, "both": n - n // 2, "around": n - n // 2}.get(bases, 0)
    of_class = (data.labels == target.label).nonzero()[:, 0]
    if len(of_class) < n - copies:
        raise InputError(
            f"poison_rate = {rate:g}: asks for {n - copies} different samples of class "
            f"{data.class_names[target.label]!r}, but {data.name!r} has {len(of_class)}; lower it, "
            'or take bases = "target"'
        )
    if bases in ("near", "around"):
        apart = (data.floats(of_class) - target.sample).flatten(1).square().sum(1)
        chosen = of_class[apart.argsort()[: n - copies]]
    else:
        chosen = of_class[torch.randperm(len(of_class), generator=generator)[: n - copies]]
    samples = torch.cat(
        (target.sample.expand(copies, *target.sample.shape[1:]), data.floats(chosen))
    )
    return samples, torch.cat((torch.full((copies,), -1), chosen))


def feasible(
    bases: Tensor, data: Samples, epsilon: float, categories: Categories
) -> tuple[Tensor, Tensor]:
    """The lowest and highest values of poisons (..., n, *sample): epsilon around their bases.

    In [0, 1], which is a table column's range in the training set. categories: a table's columns
    that are no numbers stay as they are if "fixed"; "free": they move as the others do. Images are
    kept in 8 bits: a bound is the last such value within epsilon, or rounding would pass it.
    Raises InputError if nothing could change.
    """
    lowest, highest = (bases - epsilon).clamp(0, 1), (bases + epsilon).clamp(0, 1)
    if isinstance(data, ImageSet):
        # A thousandth of a step, as floats of the bases' own values lie that near to them.
        lowest = (lowest * 255 - 1e-3).ceil() / 255
        highest = (highest * 255 + 1e-3).floor() / 255
    if isinstance(data, TableSet) and categories == "fixed":
        lowest = torch.where(data.numeric, lowest, bases)
        highest = torch.where(data.numeric, highest, bases)
    if not (highest > lowest).any():
        if isinstance(data, ImageSet):
            raise InputError(
                f"epsilon = {epsilon:g}: is less than an image file's step, 1 / 255, so that no "
                "poison could change; raise it"
            )
        raise InputError(
            f"categories = {categories!r}: {data.name!r} has no column of numbers, so that no "
            'poison could change; set it to "free"'
        )
    return lowest, highest
