"""What a network does inside, found by running it: what a module gets and gives, what comes next.

The model is left as it was found: hooks removed, mode as before.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from trompe.interfaces import InputError


class _Found(Exception):
    """Ends a run when what was looked for has been seen."""


def next_weights(model: nn.Module, layer: str, *given: Tensor) -> tuple[str, Tensor]:
    """The first Linear or Conv2d that is run after `layer`, and its input.

    given: what the model is called with. InputError if there is none.
    """
    passed: list[bool] = []
    found: list[tuple[str, Tensor]] = []

    def begin(name: str, seen: Tensor) -> None:
        if passed:
            found.append((name, seen.clone()))
            raise _Found

    hooks = [
        module.register_forward_pre_hook(lambda _, seen, name=name: begin(name, seen[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    hooks.append(model.get_submodule(layer).register_forward_hook(lambda *_: passed.append(True)))
    _run(model, given, hooks)
    if not found:
        raise InputError(
            f"layer {layer!r}: no Linear or Conv2d comes behind it, so there are no weights that "
            'could take a map more; use wiring = "apart", or name an earlier layer'
        )
    return found[0]


def input_of(model: nn.Module, name: str, *given: Tensor) -> Tensor:
    """What the module called `name` gets first when the model is called with `given`."""
    found: list[Tensor] = []

    def begin(module: nn.Module, seen: tuple[Tensor, ...]) -> None:
        found.append(seen[0].clone())
        raise _Found

    _run(model, given, [model.get_submodule(name).register_forward_pre_hook(begin)])
    return found[0]


def output_of(model: nn.Module, name: str, *given: Tensor) -> Tensor:
    """What the module called `name` gives first."""
    found: list[Tensor] = []

    def end(module: nn.Module, seen: Any, gave: Tensor) -> None:
        found.append(gave.clone())
        raise _Found

    _run(model, given, [model.get_submodule(name).register_forward_hook(end)])
    return found[0]


def weighted_modules_up_to(
    model: nn.Module, layer: str, *given: Tensor
) -> list[tuple[str, nn.Conv2d | nn.BatchNorm2d]]:
    """The convolutions and BatchNorms, in the order in which they end, until `layer` ends."""
    ran: list[tuple[str, nn.Conv2d | nn.BatchNorm2d]] = []

    def end(*_: Any) -> None:
        raise _Found

    hooks = [
        module.register_forward_hook(lambda m, seen, gave, name=name: ran.append((name, m)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    hooks.append(model.get_submodule(layer).register_forward_hook(end))
    _run(model, given, hooks)
    return ran


def _run(model: nn.Module, given: tuple[Tensor, ...], hooks: list[Any]) -> None:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), contextlib.suppress(_Found):
            model(*given)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
