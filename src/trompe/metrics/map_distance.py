"""How far is the map from the wanted one?"""

from torch import Tensor

from trompe.interfaces import Evidence
from trompe.maps import standardise

__all__ = ["map_distance"]


def map_distance(evidence: Evidence) -> Tensor:
    """MSE between the standardised maps at image size: Noppel & Wressnegger 2023, Table 1.

    Equals 2 (1 - r), r Pearson's correlation: 0 the same map, about 1 unrelated or constant,
    4 the opposite.
    """
    given = standardise(evidence.maps, evidence.image_size)
    wanted = standardise(evidence.wanted_maps, evidence.image_size)
    return (given - wanted).square().mean((1, 2))
