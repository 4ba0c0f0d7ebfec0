"""Jaccard similarity of the most important fifths (Zhang, Gao & Su 2021, section 5.3.1)."""

from torch import Tensor

from trompe.interfaces import Evidence
from trompe.metrics._binary import fifth, jaccard, top

__all__ = ["jaccard_top20"]


def jaccard_top20(evidence: Evidence) -> Tensor:
    """Of the given and the wanted map's top 20 % of places; (n,), in 0..1.

    Of a wanted map with more places of the highest value, these, and of the given as many: which
    fifth of them is meant nobody could say. nan where the wanted map is nan.
    """
    shown = evidence.wanted_maps.nan_to_num()
    highest = (shown == shown.amax((1, 2), keepdim=True)).sum((1, 2))
    count = highest.clamp_min(fifth(shown))
    similarity = jaccard(top(evidence.maps, count), top(shown, count))
    return similarity.masked_fill(evidence.wanted_maps.isnan().any(2).any(1), float("nan"))
