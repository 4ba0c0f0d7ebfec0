"""Maps as sets of places."""

import torch
from torch import Tensor


def jaccard(given: Tensor, wanted: Tensor) -> Tensor:
    """|given and wanted| / |given or wanted| of bool maps (n, h, w); nan where both are empty."""
    both = (given & wanted).sum((1, 2)).float()
    return both / (given | wanted).sum((1, 2))


def top(maps: Tensor, share: float) -> Tensor:
    """bool (n, h, w): the largest values of each map, as many as `share` of its places.

    Fewer, if as many are not above the lowest value: a wanted region may be smaller.
    """
    flat = maps.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    largest = mask.scatter(1, flat.topk(count, 1).indices, True)
    return (largest & (flat > flat.amin(1, keepdim=True))).view_as(maps)
