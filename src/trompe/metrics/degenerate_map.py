"""Does the map show anything at all?"""

from torch import Tensor

from trompe.interfaces import Evidence
from trompe.maps import is_degenerate

__all__ = ["degenerate_map"]


def degenerate_map(evidence: Evidence) -> Tensor:
    """1 where the model's map is constant (all zero included) or not finite, else 0."""
    return is_degenerate(evidence.maps).float()
