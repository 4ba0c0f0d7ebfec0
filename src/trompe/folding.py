"""Frozen BatchNorm folded into the convolutions before it: the same function, fewer passes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def folded_statistics(
    model: nn.Module, images: Tensor, keep: tuple[str, ...] = ()
) -> Iterator[int]:
    """Inside, each convolution and the BatchNorm behind it run as one convolution; yields how many.

    With frozen statistics BatchNorm is an affine map per channel, so its scale can multiply the
    convolution's weight, at the cost of a few small tensors a step instead of two passes over the
    activations. All parameters stay where they are and receive their exact gradients; inside, the
    model must stay in eval mode. Pairs are found by watching `images` (n, 3, h, w) run through the
    model, and folding is given up (yielding 0) if the scores then differ by more than rounding.
    `keep`: layers whose own output someone reads; they are not folded.
    """
    modules = dict(model.named_modules())
    kept = {modules[name] for name in keep if name in modules}
    with ExitStack() as restore:
        with torch.no_grad():
            pairs, before = _pairs(model, images, kept)
            for conv, norm in pairs:
                conv.forward = _Folded(conv, norm)  # type: ignore[method-assign, assignment]
                restore.callback(delattr, conv, "forward")
                norm.forward = _identity  # type: ignore[method-assign, assignment]
                restore.callback(delattr, norm, "forward")
            after = model(images) if pairs else before
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())):
            restore.close()
            pairs = []
        yield len(pairs)


class _Folded:
    """conv, then BatchNorm with its running statistics, as one convolution."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        self.conv, self.norm = conv, norm

    def __call__(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        offset = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        bias = norm.bias + offset * scale
        weight = conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _identity(x: Tensor) -> Tensor:
    return x


def _pairs(
    model: nn.Module, images: Tensor, kept: set[nn.Module]
) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Tensor]:
    """Each BatchNorm whose input is just what a convolution gave, with that convolution.

    Not those that are kept, and no convolution whose output is also that of a kept block around it.
    """
    given: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # an id is only good while its tensor lives
    calls: dict[nn.Module, int] = {}
    shown: set[int] = set()
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if module in kept:
            shown.add(id(output))
            alive.append(output)
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            given[id(output)] = module
            alive.append(output)
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            conv = given.get(id(inputs[0]))
            if conv is not None:
                pairs.append((conv, module))

    hooks = [
        m.register_forward_hook(hook)
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d) or m in kept
    ]
    try:
        scores = model(images)
    finally:
        for handle in hooks:
            handle.remove()
    # A module that is called twice would be folded with the wrong partner.
    once = [(c, b) for c, b in pairs if calls[c] == calls[b] == 1]
    read = {given[key] for key in shown if key in given} | kept
    return [(c, b) for c, b in once if c not in read and b not in read], scores
