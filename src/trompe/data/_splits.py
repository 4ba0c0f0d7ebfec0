"""Splits that are fixed by a seed."""

import torch
from torch import Tensor

from trompe.interfaces import InputError


def check_held_out(share: float) -> None:
    """InputError for a share of held-out samples that leaves one part empty for sure."""
    if not 0 < share < 1:
        raise InputError(f"data.held_out = {share}: must lie between 0 and 1")


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of two disjoint parts, the first with `share` of each class (rounded), sorted.

    labels: int64 (n,). Odd images go alternately to the one and the other part, so that halves
    of the whole set differ by at most one image.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    # Walking through the classes, an image is taken whenever the running share passes a whole.
    whole = torch.floor(torch.arange(len(labels) + 1, dtype=torch.float64) * share + 1e-9)
    first = whole[1:] > whole[:-1]
    return by_class[first].sort().values, by_class[~first].sort().values


def halves(labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two stratified halves of a test set: the first selects, the second reports."""
    return stratified_split(labels, 0.5, seed)
