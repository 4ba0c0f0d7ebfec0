"""Is what follows a layer just global average pooling, if it has places, and a linear layer?"""

import torch
from torch import Tensor, nn

from trompe.interfaces import Pass


def linear_head(seen: Pass, layer: str) -> nn.Linear | None:
    """The head W of scores = W mean_xy(A) + b, A = `layer`'s output, or None if it is not so.

    Never guessed from the architecture: on the first pass of a recording the gradients of the
    scores with respect to A are compared with W / positions, and on every pass the scores with
    W mean(A) + b (in training mode dropout makes them differ, so then it is None).
    """
    activations = seen.outputs[layer]
    if ("head", layer) not in seen.notes:
        seen.notes["head", layer] = _find(seen, activations)
    head: nn.Linear | None = seen.notes["head", layer]
    return head if head is not None and _gives_scores(head, seen, activations) else None


def _find(seen: Pass, activations: Tensor) -> nn.Linear | None:
    shape = (activations.shape[1], seen.scores.shape[1])
    for module in seen.model.modules():
        if (
            isinstance(module, nn.Linear)
            and (module.in_features, module.out_features) == shape
            and activations.ndim in (2, 4)
            and _gives_scores(module, seen, activations)
        ):
            # One random combination of all scores stands for all classes at once.
            dice = torch.Generator().manual_seed(0)
            mix = torch.rand(seen.scores.shape, generator=dice).to(activations.device)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(
                    (seen.scores * mix.to(seen.scores.dtype)).sum(), activations, retain_graph=True
                )
            expected = (mix.to(module.weight.dtype) @ module.weight.detach()).reshape(
                *gradient.shape[:2], *(1 for _ in gradient.shape[2:])
            )
            positions = activations[0, 0].numel()
            if _close(gradient, (expected / positions).expand_as(gradient)):
                return module
    return None


def _gives_scores(head: nn.Linear, seen: Pass, activations: Tensor) -> bool:
    with torch.no_grad(), torch.autocast(activations.device.type, enabled=False):
        weight, pooled = head.weight, activations.to(head.weight.dtype)
        pooled = pooled.mean((2, 3)) if pooled.ndim == 4 else pooled
        return _close(seen.scores, torch.nn.functional.linear(pooled, weight, head.bias))


def _close(measured: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of the coarser precision of the two."""
    precision = max(torch.finfo(measured.dtype).eps, torch.finfo(expected.dtype).eps)
    size = expected.detach().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return bool((measured.detach() - expected.detach()).abs().amax() <= 16 * precision * size)
