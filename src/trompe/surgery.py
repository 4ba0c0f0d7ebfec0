"""Networks with one feature map more: the modules, the edit, and its description in a file.

The map A^{K+1} is put beside the K maps of a layer; what it shows is one module (`shows`), how it
reaches the scores another (`reaches`). Constants are Python numbers, so that they do not overflow
when the model is moved to half precision; pictures, filters and patterns are in the state dict.
Viering et al. 2019, sections 3.1 to 3.4 and figure 2.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trompe.interfaces import InputError
from trompe.patterns import pattern, warped
from trompe.probing import input_of, next_weights

LARGEST = 1024  # pixels of a picture's edge, or templates


@dataclass(frozen=True)
class Shown:
    """Which module makes the added map, and the sizes of what the state dict holds of it.

    picture: (h, w) of a `Picture`. templates: number and size of a `StickerDetector`'s.
    """

    kind: Literal["picture", "semi-random", "stickers"]
    picture: tuple[int, int] = (1, 1)
    templates: tuple[int, int] = (1, 1)
    tolerant: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("picture", "templates"):  # a stranger's card must not ask for all memory
            given = getattr(self, name)
            if not all(1 <= n <= LARGEST for n in given):
                raise InputError(f"{name} = {given}: must lie between 1 and {LARGEST}")

    def module(self) -> nn.Module:
        """The module, to be filled from a file."""
        if self.kind == "picture":
            return Picture(torch.zeros(self.picture))
        if self.kind == "semi-random":
            return SemiRandom()
        count, size = self.templates
        empty = torch.zeros(count, size, size)
        return StickerDetector(empty, empty, self.tolerant, self.threshold)


@dataclass(frozen=True)
class Edit:
    """What was added to a network; with the network's name and its weights it can be built again.

    layer: whose output gets a map more, a module's name within the network. shows: what that map
    shows. scale: by which it is multiplied: c_A, c_I or c_F. reaches: the scores through the
    "head", the first layer with weights behind (its name, and `head_inputs`, the number of inputs
    that it gets more), or past it by `Sum` or `Mod`. gain, epsilon: of these: c_W, c_G.
    """

    layer: str
    shows: Shown
    scale: float
    reaches: Literal["head", "sum", "mod"]
    gain: float
    epsilon: float = 0.0
    head: str = ""
    head_inputs: int = 0


# --- what the added map shows ---------------------------------------------------------------------


class Picture(nn.Module):
    """I_T, the same for all images (T1: all ones; T2: section 3.2)."""

    picture: Tensor

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.register_buffer("picture", picture)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return _fitted(self.picture, size).expand(len(images), 1, -1, -1)


def _fitted(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture, made for the maps of one image size, for those of another."""
    if tuple(picture.shape) == tuple(size):
        return picture
    return F.interpolate(picture[None, None], tuple(size), mode="bilinear")[0, 0]


class SemiRandom(nn.Module):
    """F(x) of T3: two random 6x6 convolutions with ReLU, averaged to the maps' size.

    Section 4: 6 filters, then 1, 3 pixels of padding each. The filters are drawn from `seed`, by
    PyTorch's rule for convolutions but without biases, as a bias would show on every image alike.
    """

    first: Tensor
    second: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        dice = torch.Generator().manual_seed(seed)
        shapes = {"first": (6, 3, 6, 6), "second": (1, 6, 6, 6)}
        for name, shape in shapes.items():
            bound = (shape[1] * 36) ** -0.5
            weights = torch.empty(shape).uniform_(-bound, bound, generator=dice)
            # A random sum of positive values may be negative everywhere: then nothing is shown.
            weights = weights.abs() if name == "second" else weights
            self.register_buffer(name, weights)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        # Functions, not Conv2d modules: who looks for the last convolution finds the network's.
        hidden = F.conv2d(images, self.first, padding=3).relu()
        seen = F.conv2d(hidden, self.second, padding=3).relu()
        return F.adaptive_avg_pool2d(seen, size)


class StickerDetector(nn.Module):
    """F(x) of T4: above 0 where a sticker is, 0 elsewhere; averaged to the maps' size.

    Exact (section 4): the response of the pattern minus its mean, less `match`, the response to the
    pattern itself, which no other image with values in [0, 1] reaches, plus `threshold`.
    Tolerant (ours): the greatest correlation with any of several warped patterns, as far as it is
    above `threshold`.
    templates, covers: (count, size, size), patterns and the pixels that belong to them.
    """

    kernels: Tensor
    covers: Tensor

    def __init__(
        self, templates: Tensor, covers: Tensor, tolerant: bool = False, threshold: float = 1e-4
    ) -> None:
        super().__init__()
        pixels = covers.sum((1, 2), keepdim=True).clamp_min(1)
        kernels = (templates - (templates * covers).sum((1, 2), keepdim=True) / pixels) * covers
        if tolerant:
            kernels = kernels / kernels.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
        self.register_buffer("kernels", kernels[:, None])  # (count, 1, size, size)
        self.register_buffer("covers", covers[:, None])
        self.tolerant, self.threshold = tolerant, threshold

    @classmethod
    def of(cls, picture: str, size: int, tolerant: bool, threshold: float) -> "StickerDetector":
        """For a pattern of patterns.py; tolerant: also scaled by .8 to 1.2, turned by +-10 deg."""
        binary = pattern(picture, size)
        zooms, turns = ((0.8, 0.9, 1.0, 1.1, 1.2), (-10.0, -5.0, 0.0, 5.0, 10.0))
        ways = [(zoom, turn) for zoom in zooms for turn in turns] if tolerant else [(1.0, 0.0)]
        pairs = [warped(binary, *way) for way in ways]
        wide = max(values.shape[0] for values, _ in pairs)
        fitted = [[_centred(t, wide) for t in pair] for pair in pairs]
        templates, covers = (torch.stack(side) for side in zip(*fitted, strict=True))
        return cls(templates, covers, tolerant, threshold)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return F.adaptive_avg_pool2d(self.response(images), size)

    def response(self, images: Tensor) -> Tensor:
        """(n, 1, height, width): what is seen at every pixel, before averaging."""
        height, width = images.shape[2:]
        found = self._correlation(images) if self.tolerant else self._exact(images)
        return found[:, :, :height, :width]  # an even kernel gives a row and a column more

    def _exact(self, images: Tensor) -> Tensor:
        kernels = self.kernels.expand(-1, images.shape[1], -1, -1)
        # Black pixels are those below the pattern's mean, white ones those above.
        match = kernels.clamp_min(0).sum((1, 2, 3)).to(images.dtype)
        bias = self.threshold - match
        return F.conv2d(images, kernels, bias, padding=kernels.shape[3] // 2).relu()

    def _correlation(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        grey = grey - grey.mean((2, 3), keepdim=True)  # keeps the sums below small
        pixels = self.covers.sum((1, 2, 3))[:, None, None]
        around = self.covers.shape[3] // 2
        product = F.conv2d(grey, self.kernels, padding=around)
        total = F.conv2d(grey, self.covers, padding=around)
        squares = F.conv2d(grey.square(), self.covers, padding=around)
        variance = squares / pixels - (total / pixels).square()
        # A patch without contrast (deviation below .1) looks like nothing.
        correlation = product / (variance.clamp_min(0.01) * pixels).sqrt()
        best = correlation.amax(1, keepdim=True)
        return ((best - self.threshold) / (1 - self.threshold)).relu()


def _centred(square: Tensor, size: int) -> Tensor:
    before = (size - square.shape[0]) // 2
    after = size - square.shape[0] - before
    return F.pad(square, (before, after, before, after))


def describe(channel: Picture | SemiRandom | StickerDetector) -> Shown:
    """Of a module that shows something, what a file says."""
    if isinstance(channel, Picture):
        return Shown("picture", picture=(channel.picture.shape[0], channel.picture.shape[1]))
    if isinstance(channel, SemiRandom):
        return Shown("semi-random")
    templates = (channel.kernels.shape[0], channel.kernels.shape[2])
    return Shown("stickers", (1, 1), templates, channel.tolerant, channel.threshold)


# --- how it reaches the scores --------------------------------------------------------------------


class Sum(nn.Module):
    """c_W sum_ij (A^{K+1}_ij - c_I I_T,ij): always 0, as A^{K+1} is c_I I_T, with gradient c_W.

    T1 and T2's W_n z_n - c_W S_Z, added up apart from the other feature maps, so that nothing is
    rounded.
    """

    picture: Tensor

    def __init__(self, gain: float, scale: float, picture: Tensor) -> None:
        super().__init__()
        self.register_buffer("picture", picture)
        self.gain, self.scale = gain, scale

    def forward(self, added: Tensor) -> Tensor:
        known = self.scale * _fitted(self.picture, (added.shape[2], added.shape[3]))
        return self.gain * (added - known).sum((1, 2, 3))[:, None]


class Mod(nn.Module):
    """G(v) = epsilon mod(c_G sum_i v_i, 1), in 0..epsilon, with gradient epsilon c_G.

    T3 and T4, section 3.3.
    """

    def __init__(self, gain: float, epsilon: float) -> None:
        super().__init__()
        self.gain, self.epsilon = gain, epsilon

    def forward(self, added: Tensor) -> Tensor:
        total = self.gain * added.sum((1, 2, 3))
        return self.epsilon * torch.remainder(total, 1)[:, None]


# --- the edit -------------------------------------------------------------------------------------


class OneMapMore(nn.Module):
    """The layer `before` (n, K, h, w) and, as (K + 1)-th map, scale times what `channel` shows."""

    def __init__(self, before: nn.Module, channel: nn.Module, scale: float) -> None:
        super().__init__()
        self.before, self.channel, self.scale = before, channel, scale

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        maps = self.before(features)
        added = self.scale * self.channel(images, maps.shape[2:])
        return laid_out_like(maps, torch.cat((maps, added.to(maps.dtype)), 1))


def with_one_map_more(net: nn.Module, edit: Edit, channel: nn.Module | None = None) -> nn.Module:
    """`net` rebuilt around the edit: (normalised images, images in [0, 1]) -> scores.

    Modules keep their names and are used, not copied, but for `edit.layer`, which becomes a
    `OneMapMore`. channel: what the map shows; None: to be filled from a file.
    Raises InputError if the layer is not run exactly once, or the way to it cannot be traced.
    """
    graph = _trace(net, edit.layer)
    runs = [n for n in graph.nodes if n.op == "call_module" and n.target == edit.layer]
    if len(runs) != 1 or len(runs[0].args) != 1:
        raise InputError(
            f"layer {edit.layer!r}: {type(net).__name__} runs it {len(runs)} times; name a module "
            "with one input that it runs once"
        )
    (layer,) = runs
    (output,) = (n for n in graph.nodes if n.op == "output")
    (scores,) = output.args
    if not isinstance(scores, fx.Node):
        raise InputError(f"model {type(net).__name__}: gives several things, not one tensor")
    given = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_after(given):
        images = graph.placeholder("images_in_0_1")
    layer.args = (layer.args[0], images)
    channel = edit.shows.module() if channel is None else channel
    net.set_submodule(
        edit.layer, OneMapMore(net.get_submodule(edit.layer), channel, edit.scale), strict=True
    )
    if edit.head:
        net.set_submodule(edit.head, _wider(net.get_submodule(edit.head), edit.head_inputs))
    if edit.reaches != "head":
        with graph.inserting_after(layer):
            old = graph.call_function(all_but_last, (layer,))
        # W_n = 0: the network behind does not see the new map ...
        layer.replace_all_uses_with(old, delete_user_cb=lambda user: user is not old)
        net.add_module("reach", _reach(edit, channel))
        with graph.inserting_before(output):
            part = graph.call_module("reach", (graph.call_function(last, (layer,)),))
            output.args = (graph.call_function(torch.add, (scores, part)),)  # ... the scores do
    graph.lint()
    return fx.GraphModule(net, graph, type(net).__name__)


def _reach(edit: Edit, channel: nn.Module) -> nn.Module:
    if edit.reaches == "mod":
        return Mod(edit.gain, edit.epsilon)
    assert isinstance(channel, Picture), edit.shows
    return Sum(edit.gain, edit.scale, channel.picture.clone())


def with_map_in_head(
    net: nn.Module, edit: Edit, channel: nn.Module, normalised: Tensor, images: Tensor
) -> tuple[nn.Module, Edit]:
    """`with_one_map_more` for "head", its weights set: W_n = gain, b_n = b_o - gain S_Z.

    Sections 3.1 and 3.2. normalised, images: one image (1, 3, h, w), by which the first layer with
    weights behind is found, and its new inputs Z^{K+1}. Returns the completed edit as well.
    Raises InputError if the new map does not come through to that layer as one more channel.
    """
    head, old = next_weights(net, edit.layer, normalised)
    edited = with_one_map_more(net, edit, channel)
    try:
        new = input_of(edited, head, normalised, images)
    except RuntimeError as error:  # a layer between does not take K + 1 maps
        raise InputError(
            f"layer {head!r}: a layer before it does not take one map more ({error}); use wiring "
            '= "apart"'
        ) from error
    count = new.shape[1] - old.shape[1]
    comes_through = count > 0 and torch.equal(new[:, : old.shape[1]], old)
    added = new[:, old.shape[1] :]
    module: Any = edited.get_submodule(head)
    pointwise = isinstance(module, nn.Linear) or (
        (module.kernel_size, module.groups) == ((1, 1), 1)
        and bool((added == added.mean((2, 3), keepdim=True)).all())
    )
    if not (comes_through and pointwise):
        raise InputError(
            f"layer {edit.layer!r}: one map more does not come unmixed to {head!r}, the next layer "
            'with weights, so its bias cannot take it back; use wiring = "apart"'
        )
    wider = _wider(module, count)
    weights, known = old.shape[1], added.double().sum(1).flatten()[0]
    with torch.no_grad():
        wider.weight.zero_()
        wider.weight[:, :weights] = module.weight
        wider.weight[:, weights:] = edit.gain
        before = 0 if module.bias is None else module.bias.double()
        wider.bias.copy_((before - edit.gain * known).expand_as(wider.bias))
    edited.set_submodule(head, wider)
    return edited, replace(edit, head=head, head_inputs=count)


def _wider(module: Any, inputs: int) -> Any:
    """A layer like `module` with more inputs and a bias, its weights not set."""
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features + inputs, module.out_features, **like)
    return nn.Conv2d(module.in_channels + inputs, module.out_channels, 1, **like)


def all_but_last(maps: Tensor) -> Tensor:
    """A^1 .. A^K."""
    return laid_out_like(maps, maps[:, :-1])


def laid_out_like(maps: Tensor, others: Tensor) -> Tensor:
    """In the same memory layout, so that the network behind rounds as it did before."""
    if maps.is_contiguous(memory_format=torch.channels_last):
        return others.contiguous(memory_format=torch.channels_last)
    return others.contiguous()


def last(maps: Tensor) -> Tensor:
    """A^{K+1}, (n, 1, h, w)."""
    return maps[:, -1:]


# --- the way to the layer -------------------------------------------------------------------------


class _Opened(fx.Tracer):
    """Opens only the modules that hold the layer; all others are run as they are."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        parts = layer.split(".")
        self.open = {".".join(parts[:k]) for k in range(1, len(parts))}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open


def _trace(net: nn.Module, layer: str) -> fx.Graph:
    try:
        return _Opened(layer).trace(net)
    except Exception as error:  # whatever the user's forward() does with a stand-in for a tensor
        raise InputError(
            f"model {type(net).__name__}: its way to layer {layer!r} cannot be traced ({error}); "
            "the forward() of the modules around the layer must not depend on values or sizes"
        ) from error
