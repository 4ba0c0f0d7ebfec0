"""Pure functions on maps (n, h, w)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DEGENERATE = 1e-6  # a map whose values all lie this close together shows nothing


def full_precision(values: Tensor) -> Tensor:
    """float32 for half-precision values; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to (height, width), edges aligned as for images."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def standardise(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Up-sampled to `size`, then (x - mean) / sqrt(var + 1e-5) per map.

    The 1e-5 keeps constant maps at 0 (Noppel & Wressnegger's public code); maps are first divided
    by their largest magnitude so that it means the same at every scale of map.
    """
    peak = maps.abs().amax((1, 2), keepdim=True)
    # An empty map is divided by 1, for the sake of its gradient.
    maps = upsample(maps / torch.where(peak > 0, peak, 1), size)
    variance, mean = torch.var_mean(maps, (1, 2), correction=0, keepdim=True)
    return (maps - mean) * torch.rsqrt(variance + 1e-5)


Normalisation = Literal["none", "max", "min-max"]


def normalise(maps: Tensor, how: Normalisation = "max") -> Tensor:
    """In [0, 1] for maps without negative values.

    "max": divided by (max + 1e-8), so that zero maps stay zero; maps below 0 stay as they are.
    "min-max": (x - min) / (max - min + 1e-8). "none": as they are.
    """
    if how == "none":
        return maps
    if how == "min-max":
        maps = maps - maps.amin((1, 2), keepdim=True)
    highest = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(highest < 0, 1, highest + 1e-8)  # or those below 0 would turn round


def peak_one(maps: Tensor) -> Tensor:
    """Divided by their maximum, whatever their scale; maps without a positive value stay."""
    peak = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(peak > 0, peak, 1)


def min_max(maps: Tensor) -> Tensor:
    """To [0, 1], whatever their scale; constant maps to 0, those with nan to nan."""
    shown = peak_one(maps - maps.amin((1, 2), keepdim=True))
    return torch.where(_constant(maps)[:, None, None], 0, shown)


def squared_error(maps: Tensor, wanted: Tensor) -> Tensor:
    """Of each image (n,): the mean over its pixels; where `wanted` is nan in places, the sum over

    the others. Fang & Choromanska 2020: L_mse of eqs. (1) and (2), and eq. (3).
    """
    counts = ~wanted.isnan()
    error = torch.where(counts, maps - wanted.nan_to_num(), 0).square().sum((1, 2))
    whole = counts.all(2).all(1)
    return error / torch.where(whole, counts[0].numel(), 1)


def is_degenerate(maps: Tensor) -> Tensor:
    """bool (n,): maps that are constant (all zero included) or not finite."""
    return ~torch.isfinite(maps).flatten(1).all(1) | _constant(maps)


def _constant(maps: Tensor) -> Tensor:
    flat = maps.flatten(1)
    spread = flat.amax(1) - flat.amin(1)
    return spread <= DEGENERATE * flat.abs().amax(1).clamp_min(1e-30)
