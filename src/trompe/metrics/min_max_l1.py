"""L1 distance of maps in [0, 1] (Zhang, Gao & Su 2021, section 5.3.1)."""

from torch import Tensor

from trompe.interfaces import Evidence
from trompe.maps import min_max

__all__ = ["min_max_l1"]


def min_max_l1(evidence: Evidence) -> Tensor:
    """Mean over places of |wanted - given|, each map min-max to [0, 1]; (n,), in 0..1.

    nan where some of the wanted map may be anything.
    """
    wanted, given = (min_max(m) for m in (evidence.wanted_maps, evidence.maps))
    distance: Tensor = (wanted - given).abs().mean((1, 2))
    return distance
