"""The one forward pass of a step: `watch` records what explainers ask to see."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trompe.interfaces import InputError, Pass

INPUT = "input"  # the name under which the images themselves are watched


@contextmanager
def watch(model: nn.Module, layers: Iterable[str]) -> Iterator[Callable[[Tensor], Pass]]:
    """Record the outputs of `layers` (names as in `model.named_modules()`, or "input").

    With grad mode on, the pass is an ordinary one and maps made from it can be trained through.
    With grad mode off, the graph starts at the first watched layer only: enough for explainers to
    differentiate the part behind it, no memory for the part before.

    The model is left as it was found: hooks removed, grad mode as before.
    Raises InputError for a layer that the model does not have.
    """
    wanted = tuple(dict.fromkeys(layers))
    modules = dict(model.named_modules())
    for name in wanted:
        if name != INPUT and name not in modules:
            ends = ", ".join(list(modules)[-6:])
            raise InputError(
                f"layer {name!r}: the model has no such module; its last ones are {ends}"
            )
    outputs: dict[str, Tensor] = {}
    notes: dict[Any, Any] = {}

    recording = False

    def keep(name: str, value: Any) -> Any:
        if not recording:  # someone else runs the model meanwhile
            return value
        if not isinstance(value, Tensor):
            raise InputError(
                f"layer {name!r}: gives a {type(value).__name__}, not one tensor; name a layer "
                "inside or behind it"
            )
        if not value.requires_grad:  # nothing before it is differentiated: the graph starts here
            torch.set_grad_enabled(True)  # from here on; `record` puts the mode back
            value = value.detach().requires_grad_()
        outputs[name] = value
        return _apart(value)  # an in-place activation behind it must not change what was recorded

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, inputs, output: keep(name, output)

    def record(images: Tensor) -> Pass:
        nonlocal recording
        outputs.clear()
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # puts the mode back
            if INPUT in wanted:
                if not images.requires_grad:
                    images = images.detach().requires_grad_()
                outputs[INPUT] = images
                torch.set_grad_enabled(True)
            recording = True
            try:
                scores = model(images)
            finally:
                recording = False
        for name in wanted:
            if name not in outputs:
                raise InputError(
                    f"layer {name!r}: the model has it but does not run it; name one that it runs"
                )
        return Pass(model, images, scores, dict(outputs), notes)

    with ExitStack() as restore:
        for name in wanted:
            if name != INPUT:
                restore.callback(modules[name].register_forward_hook(hook(name)).remove)
        yield record


def _apart(value: Tensor) -> Tensor:
    """The same values, which can be written over while `value` stays as it is.

    Their memory is shared until somebody writes, which behind most layers nobody does.
    """
    try:
        apart: Tensor = torch._lazy_clone(value)
    except (AttributeError, RuntimeError):
        # Another PyTorch, or memory that it did not allocate itself: NumPy's, another process's.
        apart = value.clone()
    return apart
