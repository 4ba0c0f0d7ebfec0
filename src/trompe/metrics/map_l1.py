"""L1 distance of maps (Viering et al. 2019, section 4)."""

import torch
from torch import Tensor

from trompe.interfaces import Evidence
from trompe.maps import peak_one

__all__ = ["map_l1"]


def map_l1(evidence: Evidence) -> Tensor:
    """Sum over positions of |wanted - given|, each map divided by its maximum; (n,), >= 0.

    The paper's normalisation and sum; divide by the number of positions for a mean. nan where some
    of the wanted map may be anything.
    """
    wanted, given = (peak_one(m) for m in (evidence.wanted_maps, evidence.maps))
    distance: Tensor = torch.sum((wanted - given).abs(), (1, 2))
    return distance
