"""Is the true class among the five that score highest?"""

import torch
from torch import Tensor

from trompe.interfaces import Evidence

__all__ = ["top5_accuracy"]


def top5_accuracy(evidence: Evidence) -> Tensor:
    """1 where the true class is among the five highest scores, else 0; nan for five classes or

    fewer, where it would always be. Fang & Choromanska 2020, Table 1.
    """
    if evidence.scores.shape[1] <= 5:
        return torch.full_like(evidence.labels, torch.nan, dtype=torch.float32)
    highest = evidence.scores.topk(5, 1).indices
    return (highest == evidence.labels[:, None]).any(1).float()
