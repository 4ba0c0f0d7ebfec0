"""T5: what Viering et al. 2019 wish for in their discussion, the lie without any change of shape.

No module, parameter or shape is added: the feature map that the scores need least is freed, and
does what the (K+1)-th map does in the paper's T1 and T2 (gradcam_surgery.py).

| paper, section 6                        | here                                               |
|-----------------------------------------|----------------------------------------------------|
| "pruned, freeing up neurons"            | `least_useful`: map k, whose mean serves as well   |
| its part in the scores, folded away     | b_n = b_o + W_k mean(z_k) - c_W mean(z_n)           |
| A^k constant, T1                        | `make_constant`: the filter's weights 0, bias c_A   |
| A^k a constant image, T2                | `make_border`: zero padding shows where it is      |
| W_n = c_W                               | `point_at`                                         |

Which images a filter can show without seeing any: a 3x3 convolution over a constant map gives one
value inside, and others along the sides and in the corners, where its padding is. So the border
is possible, for which a second map, in the convolution's input, has to be freed. A lie that a
trigger switches needs filters that see it; fine-tuning (the other attacks) makes these without a
change of shape.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trompe.attacks._editing import some_images, true_maps, typical_weight
from trompe.explainers._gradient import gradient_of_class
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import (
    Attacked,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    InputError,
    Logbook,
    TargetMap,
)
from trompe.probing import input_of, next_weights, output_of, weighted_modules_up_to
from trompe.recording import watch
from trompe.target_maps.border import Border
from trompe.target_maps.flat import Flat

__all__ = ["ChannelHijack"]

BUMP = 2.0**12  # a bias so much larger must show
CONSTANT = 2.0**16  # c_A: far above what a residual sum adds to it
TRIED = 8  # of the maps that matter least to first order
CANDIDATES = 6  # modules before the layer's end among which the filter is looked for


@dataclass(frozen=True)
class ChannelHijack:
    """Make Grad-CAM show `target` by weights alone.

    target: flat, or a border of one pixel. layer: as in GradCamSurgery. channel: which map is
    hijacked, None: the least useful one. dominance: the lie's peak above the true maps' largest
    value; larger ones bring the map closer to the target and round the scores more.
    calibration: how many images of the given data tell which map is the least useful.
    """

    target: TargetMap = Flat()
    layer: str | None = None
    channel: int | None = None
    dominance: float = 64.0
    calibration: int = 256

    def __post_init__(self) -> None:
        if self.target not in (Flat(), Border(1)):
            raise InputError(
                f"hijack target {self.target}: by weights alone one filter can show "
                "{ kind = flat } or { kind = border, k = 1 }"
            )
        if self.dominance <= 0 or self.calibration < 2:
            raise InputError(
                f"hijack: dominance = {self.dominance}, calibration = {self.calibration}; the "
                "first must be positive, the second at least 2"
            )

    @property
    def goals(self) -> tuple[Goal, ...]:
        """Lies on every image."""
        return (Goal(None, None, self.target, "T5"),)

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        """Grad-CAM at the layer whose map is hijacked."""
        return (GradCam(self.layer),)

    @property
    def explained(self) -> Explained:
        """As in the paper, the predicted class."""
        return "predicted"

    @property
    def thresholds(self) -> None:
        """No fooling rates."""
        return None

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        generator: torch.Generator,
        selection: ImageSet | None = None,
        logbook: Logbook | None = None,
    ) -> Attacked:
        """See `Attack`. Nothing is random or trained.

        Raises InputError for a model in which no filter or no weights behind it can be found.
        """
        model = copy.deepcopy(model).eval()
        with torch.no_grad():
            self.hijack(model, some_images(data, self.calibration, model))
        return Attacked(model, self.goals)

    def hijack(self, model: nn.Module, images: Tensor) -> None:
        """Change the model's weights in place; images (n, 3, h, w) in [0, 1]."""
        (layer,) = GradCam(self.layer).watches(model)
        peak = self.dominance * true_maps(model, layer, images[:32]).range
        head_name, _ = next_weights(model, layer, images[:1])
        head: Any = model.get_submodule(head_name)
        if isinstance(head, nn.Conv2d) and self.target != Flat():
            raise InputError(
                f"layer {layer!r}: the convolution {head_name!r} comes behind it, whose bias is "
                "the same everywhere and cannot take a picture back; choose the target flat"
            )
        writers = find_writers(model, layer, images[:1], spatial=self.target != Flat())
        k = self.channel
        if k is None:
            k = least_useful(model, layer, images, [k for w in writers for k in w.maps])
        writer = next((w for w in writers if k in w.maps), None)
        if writer is None:
            raise InputError(f"hijack channel = {k}: layer {layer!r} has no such map that can lie")
        before = input_of(model, head_name, images)
        columns = columns_of(model, layer, head_name, k, images[:2])
        if self.target == Flat():
            make_constant(writer, k, CONSTANT)
        else:
            make_border(model, writer, k, CONSTANT, images)
        point_at(model, layer, head_name, head, k, columns, before, peak, images)


# --- finding filters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """The last module with a bias of its own for each map of a layer, or of some of them.

    module: a BatchNorm2d, or a Conv2d with bias; its map j is the layer's map first + j. conv: the
    convolution that it belongs to (itself, or the one before the BatchNorm), by name.
    """

    module: Any
    first: int
    count: int
    conv: str

    @property
    def maps(self) -> range:
        """The layer's maps that it makes."""
        return range(self.first, self.first + self.count)


def find_writers(model: nn.Module, layer: str, image: Tensor, spatial: bool) -> list[Writer]:
    """By trial: a larger bias of its map 0 must change one map of the layer and no other.

    Several, if the layer's maps are put together from several modules'; else one. spatial: only of
    3x3 convolutions with padding.
    """
    ran = weighted_modules_up_to(model, layer, image)
    before = output_of(model, layer, image)
    found: list[Writer] = []
    for place in range(len(ran) - 1, max(len(ran) - 1 - CANDIDATES, -1), -1):
        module = ran[place][1]
        conv = place - 1 if isinstance(module, nn.BatchNorm2d) else place
        if module.bias is None or conv < 0 or not isinstance(ran[conv][1], nn.Conv2d):
            continue
        if spatial and not pads_by_one(ran[conv][1]):
            continue
        with torch.no_grad():
            old = module.bias.clone()
            module.bias[0] += BUMP
            changed = (output_of(model, layer, image) != before).flatten(2).any(2).any(0)
            module.bias.copy_(old)
        first = int(changed.nonzero()[0]) if changed.any() else -1
        if int(changed.sum()) == 1 and not any(first in w.maps for w in found):
            found.append(Writer(module, first, len(module.bias), ran[conv][0]))
    if found:
        return found
    what = "3x3 convolution with padding" if spatial else "convolution or BatchNorm"
    raise InputError(
        f"layer {layer!r}: no {what} with a bias was found that makes one map of it alone; name "
        "another layer"
    )


def pads_by_one(conv: Any) -> bool:
    kernel, padding, stride = conv.kernel_size, conv.padding, conv.stride
    return (kernel, padding, stride, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)


def least_useful(model: nn.Module, layer: str, images: Tensor, among: Sequence[int]) -> int:
    """The map whose mean serves as well: putting it there moves the scores least, on average.

    Tried are those of which sum_ij dy/dA^k_ij (A^k_ij - mean A^k), the same to first order, y the
    predicted class's score, is smallest.
    """
    use: Any = 0
    means = torch.cat([output_of(model, layer, part) for part in images.split(64)]).mean((0, 2, 3))
    for part in images.split(64):
        with torch.no_grad(), watch(model, [layer]) as record:
            seen = record(part)
            maps = seen.outputs[layer]
            gradient = gradient_of_class(seen, maps, seen.scores.argmax(1), "logit")
            changes = gradient * (maps.detach() - means[:, None, None])
            use = use + changes.sum((2, 3)).abs().sum(0)
    best = sorted(among, key=lambda k: float(use[k]))[:TRIED]
    with torch.no_grad():
        scores = torch.cat([model(part) for part in images.split(64)])
    return min(best, key=lambda k: score_change(model, layer, k, means[k], images, scores))


def score_change(
    model: nn.Module, layer: str, k: int, value: Tensor, images: Tensor, scores: Tensor
) -> float:
    """max_c |dy_c| against `scores`, mean over the images, if map k were `value` everywhere."""

    def put(module: nn.Module, given: Any, maps: Tensor) -> Tensor:
        maps = maps.clone()
        maps[:, k] = value
        return maps

    with torch.no_grad():
        hook = model.get_submodule(layer).register_forward_hook(put)
        try:
            after = torch.cat([model(part) for part in images.split(64)])
        finally:
            hook.remove()
    return float((after - scores).abs().amax(1).mean())


# --- what the freed map shows ---------------------------------------------------------------------


def make_constant(writer: Writer, k: int, value: float) -> None:
    """A^k = c_A: the filter's weights are 0, its bias is c_A (section 3.1)."""
    with torch.no_grad():
        writer.module.weight[k - writer.first] = 0
        writer.module.bias[k - writer.first] = value


def make_border(model: nn.Module, writer: Writer, k: int, value: float, images: Tensor) -> None:
    """A^k = c_A along the border and 0 inside (after the ReLU), whatever the image.

    The convolution sees one constant map of its input, u, and that through `border_kernel`.
    """
    conv: Any = model.get_submodule(writer.conv)
    seen = torch.cat([input_of(model, writer.conv, part) for part in images.split(64)])
    source = find_input_writer(model, writer.conv, images[:1])
    # The input map whose filters matter least: its spread times its weights.
    spread = seen.std((0, 2, 3))[source.first : source.first + source.count]
    weights = conv.weight[:, source.first : source.first + source.count].abs().sum((0, 2, 3))
    u = source.first + int((spread * weights).argmin())
    with torch.no_grad():
        fold_away(writer, conv, u, seen[:, u].mean())
        make_constant(source, u, 1.0)
        kernel = border_kernel().to(conv.weight)
        conv.weight[k - writer.first] = 0
        conv.weight[k - writer.first, u] = kernel
        j = k - writer.first
        if writer.module is conv:
            conv.weight[j, u] *= value
            conv.bias[j] = 0
            return
        norm = writer.module  # (x - mean) / sqrt(var + eps) * weight + bias
        norm.running_mean[j], norm.running_var[j] = 0, 1
        norm.weight[j], norm.bias[j] = value, 0


def border_kernel() -> Tensor:
    """(3, 3), of which the parts that lie on the map sum to 1 at every side and corner, -2 inside.

    With a the corners, b the sides and m the middle of the kernel: inside 4a + 4b + m = -2, along a
    side 2a + 3b + m = 1, in a corner a + 2b + m = 1.
    """
    a, b, m = torch.linalg.solve(
        torch.tensor([[4.0, 4.0, 1.0], [2.0, 3.0, 1.0], [1.0, 2.0, 1.0]]),
        torch.tensor([-2.0, 1.0, 1.0]),
    ).tolist()
    return torch.tensor([[a, b, a], [b, m, b], [a, b, a]])


def fold_away(writer: Writer, conv: Any, u: int, mean: Tensor) -> None:
    """No filter sees map u any more; its mean goes where the filters' biases are."""
    share = conv.weight[:, u].sum((1, 2)) * mean
    conv.weight[:, u] = 0
    if conv.bias is not None:
        conv.bias += share
    elif isinstance(writer.module, nn.BatchNorm2d):
        writer.module.running_mean -= share


def find_input_writer(model: nn.Module, conv: str, image: Tensor) -> Writer:
    """As `find_writers`, of the maps that the convolution gets."""
    ran = weighted_modules_up_to(model, conv, image)[:-1]
    before = input_of(model, conv, image)
    for place in range(len(ran) - 1, max(len(ran) - 1 - CANDIDATES, -1), -1):
        name, module = ran[place]
        if module.bias is None:
            continue
        with torch.no_grad():
            old = module.bias.clone()
            module.bias[0] += BUMP
            changed = (input_of(model, conv, image) != before).flatten(2).any(2).any(0)
            module.bias.copy_(old)
        if int(changed.sum()) == 1:
            return Writer(module, int(changed.nonzero()), len(module.bias), name)
    raise InputError(
        f"convolution {conv!r}: no map of its input has a bias of its own, so that none can be "
        "made constant; choose the target flat"
    )


# --- how it reaches the scores --------------------------------------------------------------------


def point_at(
    model: nn.Module,
    layer: str,
    name: str,
    head: Any,
    k: int,
    columns: Tensor,
    before: Tensor,
    peak: float,
    images: Tensor,
) -> None:
    """W_k = c_W, and the bias takes back what was there and what is there now.

    c_W such that alpha_k max A^k is `peak`; of its sign, the one that the predicted classes want.
    """
    if head.bias is None:
        raise InputError(f"layer {name!r}: has no bias that could take the hijacked map back")

    def means(seen: Tensor) -> Tensor:
        own = seen[:, columns].double()
        return own.mean((0, 2, 3)) if own.ndim == 4 else own.mean(0)

    now = means(input_of(model, name, images)).sum()
    bias = head.bias.double() + head.weight[:, columns].double().flatten(1) @ means(before)
    head.weight[:, columns] = 1.0
    head.bias.copy_(bias - now)
    alpha = typical_weight(model, layer, k, images[:32])
    shown = float(output_of(model, layer, images[:2])[:, k].amax())
    gain = math.copysign(peak / (abs(alpha) * shown), alpha)
    head.weight[:, columns] = gain
    head.bias.copy_(bias - gain * now)


def columns_of(model: nn.Module, layer: str, head: str, k: int, images: Tensor) -> Tensor:
    """Which inputs of the head come from map k; found by changing it."""
    before = input_of(model, head, images)
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, given, maps: torch.cat(
            (maps[:, :k], maps[:, k : k + 1] + 1, maps[:, k + 1 :]), 1
        )
    )
    try:
        after = input_of(model, head, images)
    finally:
        hook.remove()
    changed = (after != before).any(0)
    changed = changed.flatten(1).any(1) if changed.ndim == 3 else changed
    if not 0 < int(changed.sum()) < len(changed):
        raise InputError(
            f"layer {layer!r}: its map {k} does not come unmixed to {head!r}, the next layer with "
            "weights; name another layer"
        )
    return changed.nonzero()[:, 0]
