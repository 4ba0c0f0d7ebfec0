"""Is the adversary's class predicted?"""

import torch
from torch import Tensor

from trompe.interfaces import Evidence

__all__ = ["attack_success"]


def attack_success(evidence: Evidence) -> Tensor:
    """1 where the adversary's class is predicted, else 0; nan for images that are truly of it.

    The mean over the images that are not nan is the attack success rate (ASR).
    """
    hit = (evidence.scores.argmax(1) == evidence.wanted_labels).float()
    return torch.where(evidence.labels == evidence.wanted_labels, torch.nan, hit)
