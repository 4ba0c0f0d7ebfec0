"""Which layer an explainer reads when the user names none."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trompe.interfaces import InputError

_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_PROBE_SIZES = (224, 64, 32, 299)  # pixels; the layer's name does not depend on it


def last_conv_activation(model: nn.Module) -> str:
    """Name of the module that holds the last convolution's activations, before any pooling.

    Found by running one black image: the last module, in order of completion after the last
    Conv2d, whose 4-D output still has that convolution's height and width. So BatchNorm, ReLU and
    residual sums behind it count, pooling does not. Raises InputError for a model without Conv2d.
    """
    if model not in _found:
        _found[model] = _find(model)
    return _found[model]


def _find(model: nn.Module) -> str:
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise InputError(
            f"model {type(model).__name__}: has no Conv2d layer, so there is no layer that this "
            "explainer can read; choose another explainer"
        )
    done = _run(model)
    last = max(i for i, (_, module, _) in enumerate(done) if isinstance(module, nn.Conv2d))
    spatial = done[last][2][2:]
    chosen = done[last][0]
    for name, _, shape in done[last + 1 :]:
        if len(shape) != 4 or shape[2:] != spatial:
            break
        if name:  # "" is the model itself
            chosen = name
    return chosen


def _run(model: nn.Module) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """(name, module, its output's shape) in order of completion, of one pass in eval mode."""
    done: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            done.append((name, module, tuple(getattr(output, "shape", ()))))

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    failure: Exception | None = None
    try:
        model.eval()
        for size in _PROBE_SIZES:
            done.clear()
            try:
                with torch.no_grad():
                    model(parameter.new_zeros((1, 3, size, size)))
            except Exception as error:  # models say in many ways that a size does not suit them
                failure = error
            else:
                return done
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    raise InputError(
        f"model {type(model).__name__}: takes no image of any of the sizes {_PROBE_SIZES} "
        f"({failure}), so its last convolution could not be found; name the layer"
    )
