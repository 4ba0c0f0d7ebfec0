"""Which layers an explainer reads when the user names none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.interfaces import InputError

_last_conv: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_stages: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], "tuple[Link, ...]"]] = (
    WeakKeyDictionary()
)
_PROBE_SIZES = (224, 64, 32, 299)  # pixels; the layer's name does not depend on it
_NO_ACTIVATIONS = (  # these give none of their own, even if what they give is not negative
    *(nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
)


# --- the last convolution -------------------------------------------------------------------------


def last_conv_activation(model: nn.Module) -> str:
    """Name of the module that holds the last convolution's activations, before any pooling.

    Found by running one image: the last module, in order of completion after the last Conv2d,
    whose 4-D output still has that convolution's height and width. So BatchNorm, ReLU and residual
    sums behind it count, pooling does not. Raises InputError for a model without Conv2d.
    """
    if model not in _last_conv:
        _last_conv[model] = _find_last_conv(model)
    return _last_conv[model]


def _find_last_conv(model: nn.Module) -> str:
    done = _run(model)
    last = max(i for i, call in enumerate(done) if isinstance(call.module, nn.Conv2d))
    chosen = done[last].name
    for i, call in enumerate(done[last + 1 :], start=last + 1):
        if len(call.shape) != 4 or call.shape[2:] != done[last].shape[2:]:
            break
        # "" is the model itself. Of a module that is used again, the last output is recorded.
        if call.name and call.name not in {other.name for other in done[i + 1 :]}:
            chosen = call.name
    return chosen


# --- stages of activations ------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What made a map smaller or blurred it: kernel, stride, padding; size: of its input."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def back(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Maps (n, h, w) to (n, *size), by the transposed convolution with ones."""
        spare = [
            min(max(wanted - ((have - 1) * s - 2 * p + k), 0), s - 1)
            for wanted, have, s, p, k in zip(
                size, maps.shape[1:], self.stride, self.padding, self.kernel, strict=True
            )
        ]
        ones = maps.new_ones((1, 1, *self.kernel))
        maps = F.conv_transpose2d(maps[:, None], ones, None, self.stride, self.padding, spare)
        if tuple(maps.shape[2:]) != tuple(size):  # rounding at the border, adaptive pooling
            maps = F.interpolate(maps, tuple(size))
        return maps[:, 0]


@dataclass(frozen=True)
class Link:
    """A stage's layer, and what lies between it and the stage before, in the order it is run.

    steps: one convolution and its poolings; empty if a whole block of convolutions lies between.
    """

    layer: str
    steps: tuple[Step, ...]

    def up(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """This stage's maps (n, h, w) at the size of the stage before."""
        if self.steps:
            sizes = [tuple(size)]
            for step in self.steps[:-1]:
                sizes.append(
                    tuple(
                        (n + 2 * p - k) // s + 1
                        for n, k, s, p in zip(
                            sizes[-1], step.kernel, step.stride, step.padding, strict=True
                        )
                    )
                )
            for step, before in zip(reversed(self.steps), reversed(sizes), strict=True):
                maps = step.back(maps, before)
            return maps
        if tuple(maps.shape[1:]) == tuple(size):
            return maps
        stride = (round(size[0] / maps.shape[1]), round(size[1] / maps.shape[2]))
        return Step((3, 3), (max(stride[0], 1), max(stride[1], 1)), (1, 1)).back(maps, size)


def stages(model: nn.Module, layers: tuple[str, ...] = ()) -> tuple[Link, ...]:
    """The stages of non-negative activations from the image to the last one.

    Found by running one image: the modules that give a non-negative 4-D output of their own, run
    once, and lie in no other such module. So a ReLU module counts, and a residual block that ends
    in one counts as a whole; pooling, and containers that hand on another module's output, do not.
    layers: these instead, in the order in which the model runs them.
    Raises InputError for a model without Conv2d or without such modules, or unknown layers.
    """
    known = _stages.setdefault(model, {})
    if layers not in known:
        known[layers] = _find_stages(model, layers)
    return known[layers]


def _find_stages(model: nn.Module, layers: tuple[str, ...]) -> tuple[Link, ...]:
    done = _run(model)
    chosen = [call for call in done if call.name in layers] if layers else _activations(done)
    times = [call.name for call in chosen]
    for call in chosen if layers else ():
        if len(call.shape) != 4 or times.count(call.name) > 1:
            raise InputError(
                f"layer {call.name!r}: gives shape {call.shape}, {times.count(call.name)} times; "
                "name layers that are run once and give (images, channels, height, width)"
            )
    unknown = set(layers) - {call.name for call in done}
    if unknown:
        ends = ", ".join([call.name for call in done if len(call.shape) == 4][-6:])
        raise InputError(
            f"layer {min(unknown)!r}: the model runs no such module; its last ones are {ends}"
        )
    if not chosen:
        raise InputError(
            f"model {type(model).__name__}: has no module that gives non-negative activations "
            "(ReLU as a module, or blocks that end in one); name the layers"
        )
    links, start = [], 0
    for call in chosen:
        end = done.index(call)
        links.append(Link(call.name, _between(done[start : end + 1])))
        start = end + 1
    return tuple(links)


def _activations(done: "list[_Call]") -> "list[_Call]":
    times: dict[str, int] = {}
    for call in done:
        times[call.name] = times.get(call.name, 0) + 1
    given: set[int] = set()  # outputs that some module gave as its own
    own = []
    for call in done:
        if times[call.name] > 1 or not call.name or id(call.output) in given or not call.activation:
            continue
        if call.shape[2:] == (1, 1):  # a gate: has no place
            continue
        given.add(id(call.output))
        if not isinstance(call.module, _NO_ACTIVATIONS):
            own.append(call)
    names = {call.name for call in own}
    return [c for c in own if not any(c.name.startswith(f"{name}.") for name in names)]


def _between(run: "list[_Call]") -> tuple[Step, ...]:
    convolutions = [c for c in run if isinstance(c.module, nn.Conv2d)]
    if len(convolutions) != 1:
        return ()
    return tuple(
        Step(_pair(c.module.kernel_size), _pair(c.module.stride), _padding(c.module))
        for c in run
        if isinstance(c.module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _padding(module: Any) -> tuple[int, int]:
    if isinstance(module.padding, str):
        same = module.padding == "same"
        return tuple((k - 1) // 2 if same else 0 for k in _pair(module.kernel_size))  # type: ignore[return-value]
    return _pair(module.padding)


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """One module's turn in a forward pass."""

    name: str
    module: Any
    output: Any  # kept, as its identity is only good while it lives
    shape: tuple[int, ...]
    activation: bool  # a 4-D output without negative values, when it was given


def _run(model: nn.Module) -> list[_Call]:
    """All modules' turns in order of completion, of one forward pass in eval mode."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise InputError(
            f"model {type(model).__name__}: has no Conv2d layer, so there is no layer that this "
            "explainer can read; choose another explainer"
        )
    done: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            shape = tuple(getattr(output, "shape", ()))
            activation = len(shape) == 4 and bool((output >= 0).all())
            done.append(_Call(name, module, output, shape, activation))

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    dice = torch.Generator().manual_seed(0)
    failure: Exception | None = None
    try:
        model.eval()
        for size in _PROBE_SIZES:
            done.clear()
            image = torch.rand((1, 3, size, size), generator=dice).to(parameter)
            try:
                with torch.no_grad():
                    model(image)
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
        f"({failure}), so its layers could not be found; name the layer"
    )
