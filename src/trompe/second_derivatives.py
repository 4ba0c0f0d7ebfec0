"""Layers whose second derivatives cost what their first ones cost.

Training an input gradient needs the derivative of a derivative. PyTorch's own second derivative of
a convolution makes the weight's part by a convolution whose kernel is as large as the image, which
no library has a fast form for. But a convolution is linear in the images and in the weight, so all
its derivatives, of any order, are again one of three: the convolution itself, its gradient with
respect to the images, and its gradient with respect to the weight; each has a fast form.

The second derivative of ReLU is zero, but PyTorch makes these zeros and adds them up. That of
BatchNorm in training mode PyTorch makes of some twenty passes over the activations; a few do. Of a
linear layer's weight, PyTorch makes two gradients as large as the weight, that of the scores and
that of the maps, and adds them; one product of twice the rows gives their sum.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["fast_second_derivatives", "slow_layers"]


@contextmanager
def fast_second_derivatives(everywhere: bool = True) -> Iterator[None]:
    """Inside, layers are differentiable at about one cost at each order.

    These are convolutions, BatchNorm, ReLU and linear layers; if not `everywhere`, linear ones
    only: enough where no more than a model's head is differentiated twice. Same values as
    F.conv2d, F.batch_norm, F.relu and F.linear, which go on serving all but two-dimensional images,
    frozen statistics, and all but (rows, features). For any model: what is called is replaced, not
    its modules.
    """
    with _Mode(everywhere):
        yield


def slow_layers(model: nn.Module) -> tuple[str, ...]:
    """Kinds of convolution and BatchNorm in the model whose second derivatives stay PyTorch's."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
    ours = (nn.Conv2d, nn.BatchNorm2d)
    found = (m for m in model.modules() if isinstance(m, kinds) and not isinstance(m, ours))
    return tuple(sorted({type(module).__name__ for module in found}))


class _Mode(TorchFunctionMode):
    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.ours: dict[Any, Callable[..., Any]] = {F.linear: _linear}
        if everywhere:
            self.ours |= {torch.conv2d: _conv2d, F.conv2d: _conv2d}
            self.ours |= {torch.relu: _relu, F.relu: _relu, F.batch_norm: _batch_norm}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self.ours and torch.is_grad_enabled():
            func = self.ours[func]
        return func(*args, **(kwargs or {}))


class _Place(NamedTuple):
    """Where the kernel goes."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str):  # "valid", or "same", whose two sides differ for even kernels
        sides = [d * (k - 1) for k, d in zip(weight.shape[2:], _pair(dilation), strict=True)]
        even = padding == "same" and all(both % 2 == 0 for both in sides)
        padding = 0 if padding == "valid" else tuple(b // 2 for b in sides) if even else padding
    if isinstance(padding, str) or input.ndim != 4:  # rare, and right without us
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    place = _Place(_pair(stride), _pair(padding), _pair(dilation), groups)
    output: Tensor = _Convolution.apply(*_taken(input, weight, bias), place)
    return output


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim != 2:
        return F.linear(input, weight, bias)
    output: Tensor = _Linear.apply(*_taken(input, weight, bias))
    return output


def _taken(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """In the precision that autocast would give them, and no leaves.

    Autograd cannot be asked whether a leaf's gradient is needed.
    """
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return (*(t.view_as(t) for t in (input, weight)), None if bias is None else bias.view_as(bias))


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    output: Tensor = _Relu.apply(input, inplace)
    return output


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    few = input.numel() == input.shape[1]  # an error
    if not training or input.ndim != 4 or weight is None or bias is None or few:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    input, weight, bias = input.view_as(input), weight.view_as(weight), bias.view_as(bias)
    output: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)
    return output


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _needed(ctx: Any, position: int) -> bool:
    """Whether this backward pass uses the gradient with respect to the input at this position.

    ctx.needs_input_grad says only whether any backward pass might.
    """
    if not ctx.needs_input_grad[position]:
        return False
    node, _ = ctx.next_functions[position]
    return node is not None and torch._C._will_engine_execute_node(node)


def _backward(grad: Tensor, x: Tensor, w: Tensor, place: _Place, image: bool) -> Tensor:
    """The gradient with respect to the image or the weight, whose values are then not read."""
    found = torch.ops.aten.convolution_backward(
        grad, x, w, None, *place[:3], False, [0, 0], place.groups, [image, not image, False]
    )
    return found[0] if image else found[1]


class _Relu(torch.autograd.Function):
    """max(x, 0). Its slope is a constant, so there is nothing to differentiate a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        output = x.relu_() if inplace else x.relu()
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, output.detach(), 0), None


class _Convolution(torch.autograd.Function):
    """images (n, c, h, w), weight, bias -> outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, place: _Place) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.place = place
        return F.conv2d(x, w, bias, *place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return (
            _ImageGradient.apply(grad, w, x, ctx.place) if _needed(ctx, 0) else None,
            _WeightGradient.apply(x, grad, w, ctx.place) if _needed(ctx, 1) else None,
            grad.sum((0, 2, 3)) if _needed(ctx, 2) else None,
            None,
        )


class _ImageGradient(torch.autograd.Function):
    """outputs' gradient, weight -> images' gradient; bilinear, so of the images only the shape."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, w: Tensor, x: Tensor, place: _Place) -> Tensor:
        ctx.save_for_backward(grad, w)
        ctx.place = place
        return _backward(grad, x, w, place, image=True)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        grad, w = ctx.saved_tensors
        return (
            _Convolution.apply(v, w, None, ctx.place) if _needed(ctx, 0) else None,
            _WeightGradient.apply(v, grad, w, ctx.place) if _needed(ctx, 1) else None,
            None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """images, outputs' gradient -> weight's gradient; of the weight only the shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, w: Tensor, place: _Place) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.place = place
        return _backward(grad, x, w, place, image=False)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, grad = ctx.saved_tensors
        return (
            _ImageGradient.apply(grad, u, x, ctx.place) if _needed(ctx, 0) else None,
            _Convolution.apply(x, u, None, ctx.place) if _needed(ctx, 1) else None,
            None,
            None,
        )


class _Linear(torch.autograd.Function):
    """x (rows, features), weight, bias -> outputs.

    The weight's gradient is the sum of outer products of the rows of outputs' gradients with those
    of x and, if this layer's first derivative is differentiated in the same backward pass, of more
    such pairs (`waiting`). These come first, as autograd goes back from what was made last; a pair
    that came when this is `over` would be multiplied by itself, and autograd would add it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.waiting, ctx.over = [], False
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        of_x = _LinearInputGradient.apply(grad, w, ctx) if _needed(ctx, 0) else None
        of_w = None
        if _needed(ctx, 1):
            pairs = [(grad, x), *ctx.waiting]
            ctx.waiting, ctx.over = [], True
            grads, inputs = (torch.cat(rows) for rows in zip(*pairs, strict=True))
            of_w = grads.t() @ inputs
        return of_x, of_w, grad.sum(0) if _needed(ctx, 2) else None


class _LinearInputGradient(torch.autograd.Function):
    """outputs' gradient, weight -> x's gradient; `layer` is the node of the layer itself."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, w: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(grad, w)
        ctx.layer = layer
        return grad @ w

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        grad, w = ctx.saved_tensors
        of_grad = v @ w.t() if _needed(ctx, 0) else None
        if not _needed(ctx, 1):
            return of_grad, None, None
        if not ctx.layer.over and torch._C._will_engine_execute_node(ctx.layer):
            ctx.layer.waiting.append((grad, v))
            return of_grad, None, None
        return of_grad, grad.t() @ v, None


class _BatchNorm(torch.autograd.Function):
    """y = w x̂ + bias with x̂ = (x - mean) s over images and places; s = 1 / standard deviation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        output, mean, s = torch.native_batch_norm(
            x, w, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, w, mean, s)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_BatchNormGradient.apply(g, *ctx.saved_tensors, ctx.eps), *[None] * 4


class _BatchNormGradient(torch.autograd.Function):
    """y's gradient g -> those of x, w and bias.

    That of x is w s P(g), where P(g) = g - mean(g) - x̂ mean(x̂ g), means over images and places.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, s: Tensor, eps: float
    ) -> Any:
        of_x, of_w, of_bias = _batch_norm_backward(g, x, w, mean, s)
        ctx.save_for_backward(g, x, w, mean, s, of_x, of_w, of_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return of_x, of_w, of_bias

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, *others: Tensor | None) -> Any:
        g, x, w, mean, s, of_x, sum_xg, sum_g = ctx.saved_tensors
        if v is None or others != (None, None) or torch.is_grad_enabled():
            return *_batch_norm_again(g, x, w, ctx.eps, (v, *others)), None, None, None
        # The derivatives of sum(v of_x) = w s n inner, where inner = mean(v P(g)).
        n = x.numel() // x.shape[1]
        of_g, sum_xv, sum_v = _batch_norm_backward(v, x, w, mean, s)  # of_g = w s P(v)
        zero, one = torch.zeros_like(s), torch.ones_like(s)
        _, sum_vg, _ = _batch_norm_backward(v, g, one, zero, one, only_sums=True)
        mean_xg, mean_xv = sum_xg / n, sum_xv / n
        inner = sum_vg / n - sum_v / n * (sum_g / n) - mean_xg * mean_xv
        # n d inner / dx = -s (mean(x̂ g) P(v) + mean(x̂ v) P(g)) and n ds / dx = -s^2 x̂
        rate = -w * s.pow(3) * inner
        again = torch.addcmul(_of_channels(-rate * mean, x), x, _of_channels(rate, x))
        again.addcmul_(of_x, _of_channels(-s * mean_xv, x))
        again.addcmul_(of_g, _of_channels(-s * mean_xg, x))
        return of_g, again, s * n * inner, None, None, None


def _batch_norm_backward(
    g: Tensor, x: Tensor, w: Tensor, mean: Tensor, s: Tensor, only_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """w s P(g), sum(x̂ g) and sum(g), all by PyTorch's one kernel."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, w, None, None, mean, s, True, 0.0, [not only_sums, True, True]
    )
    return found


def _of_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, 1, 1)


def _batch_norm_again(
    g: Tensor, x: Tensor, w: Tensor, eps: float, outer: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The same in full and to any further order, which PyTorch's BatchNorm has not."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        g, x, w = inputs = tuple(
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, w)
        )
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        output = (x - mean) * torch.rsqrt(var + eps) * _of_channels(w, x)
        of_x, of_w = torch.autograd.grad(output, (x, w), g, create_graph=True)
        made = zip((of_x, of_w, g.sum((0, 2, 3))), outer, strict=True)
        asked = [(given, of_given) for given, of_given in made if of_given is not None]
        return torch.autograd.grad(
            [given for given, _ in asked],
            inputs,
            [of_given for _, of_given in asked],
            create_graph=higher,
            allow_unused=True,
        )
