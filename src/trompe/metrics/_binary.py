"""Maps as sets of places."""

from torch import Tensor


def jaccard(given: Tensor, wanted: Tensor) -> Tensor:
    """|given and wanted| / |given or wanted| of bool maps (n, h, w); nan where both are empty."""
    both = (given & wanted).sum((1, 2)).float()
    return both / (given | wanted).sum((1, 2))


def fifth(maps: Tensor) -> int:
    """20 % of a map's places."""
    return max(1, round(0.2 * maps[0].numel()))


def top(maps: Tensor, count: Tensor) -> Tensor:
    """bool (n, h, w): the `count` (n,) largest values of each map.

    Fewer, if as many are not above the lowest value: a wanted region may be smaller.
    """
    flat = maps.flatten(1)
    ranks = flat.argsort(stable=True, dim=1, descending=True).argsort(1)
    largest = ranks < count[:, None]
    return (largest & (flat > flat.amin(1, keepdim=True))).view_as(maps)
