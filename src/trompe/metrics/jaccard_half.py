"""Jaccard similarity of what is above one half (Zhang, Gao & Su 2021, section 5.3.1)."""

from torch import Tensor

from trompe.interfaces import Evidence
from trompe.maps import min_max
from trompe.metrics._binary import jaccard

__all__ = ["jaccard_half"]


def jaccard_half(evidence: Evidence) -> Tensor:
    """Of where the given and the wanted map, each min-max to [0, 1], exceed .5; (n,), in 0..1.

    nan where neither does, or the wanted map is nan.
    """
    wanted = min_max(evidence.wanted_maps.nan_to_num()) > 0.5
    similarity = jaccard(min_max(evidence.maps) > 0.5, wanted)
    return similarity.masked_fill(evidence.wanted_maps.isnan().any(2).any(1), float("nan"))
