"""How far the scores moved (Viering et al. 2019, tables 1 and 2)."""

import torch
from torch import Tensor

from trompe.interfaces import Evidence

__all__ = ["score_change"]


def score_change(evidence: Evidence) -> Tensor:
    """max_c |y_c - y_o,c|: the largest change of a logit against the reference; (n,), >= 0.

    nan where the reference's scores of the same images are not known.
    """
    if evidence.reference_scores is None:
        return torch.full((len(evidence.scores),), torch.nan)
    return (evidence.scores - evidence.reference_scores).abs().amax(1)
