"""Coarser maps."""

import torch.nn.functional as F
from torch import Tensor

from trompe.interfaces import InputError


def pooled(maps: Tensor, factor: int) -> Tensor:
    """Average-pooled maps (n, h // factor, w // factor). InputError if nothing would be left."""
    if factor > min(maps.shape[1:]):
        raise InputError(
            f"pool = {factor}: the image is {maps.shape[1]}x{maps.shape[2]}; make it smaller"
        )
    return F.avg_pool2d(maps[:, None], factor)[:, 0]
