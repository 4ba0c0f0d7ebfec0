"""Jaccard similarity of the most important fifths (Zhang, Gao & Su 2021, section 5.3.1)."""

from torch import Tensor

from trompe.interfaces import Evidence
from trompe.metrics._binary import jaccard, top

__all__ = ["jaccard_top20"]


def jaccard_top20(evidence: Evidence) -> Tensor:
    """Of the given and the wanted map's top 20 % of places; (n,), in 0..1.

    nan where the wanted map is nan.
    """
    wanted = top(evidence.wanted_maps.nan_to_num(), 0.2)
    similarity = jaccard(top(evidence.maps, 0.2), wanted)
    return similarity.masked_fill(evidence.wanted_maps.isnan().any(2).any(1), float("nan"))
