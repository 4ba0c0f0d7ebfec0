"""ReLU <-> softplus, without touching the model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trompe.interfaces import InputError

_IN_PLACE = {F.relu_, torch.relu_, torch.Tensor.relu_}
_RELUS = {F.relu, torch.relu, torch.Tensor.relu} | _IN_PLACE
_FAR = 20.0  # exp(-20) is nothing beside 1, and processors are slow where its powers vanish
_CUT = {F.relu6, F.hardtanh, F.hardtanh_}  # ReLU6 is a hardtanh from 0 to 6


class softplus(TorchFunctionMode):  # noqa: N801  (reads as a verb: `with softplus(8): model(x)`)
    """Inside `with softplus(beta):` every ReLU, module or function, computes softplus instead.

    softplus(x) = log(1 + exp(beta x)) / beta; beta > 0, larger is closer to ReLU (Dombrowski et
    al. 2019; the second derivative of ReLU is zero, so gradient maps need it while training).
    Works on any model as it calls, so nothing needs restoring. ReLU6, of MobileNets, is relu(x) -
    relu(x - 6) and computes softplus(x) - softplus(x - 6); other activations stay as they are.
    """

    def __init__(self, beta: float) -> None:
        if not beta > 0:
            raise InputError(f"softplus_beta = {beta}: must be a positive number (paper: 8)")
        super().__init__()
        self.beta = beta

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CUT:
            return self._cut(func, *args, **kwargs)
        if func not in _RELUS:
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["input"]
        inplace = args[1] if len(args) > 1 else kwargs.get("inplace", False)
        if func in _IN_PLACE or inplace:  # the model may go on with what it gave
            return given.copy_(_smooth(given.clone(), self.beta))
        return _smooth(given, self.beta)

    def _cut(self, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("inplace",) if func is F.relu6 else ("min_val", "max_val", "inplace")
        how = {**dict(zip(names, args, strict=False)), **kwargs}
        lowest, highest = how.get("min_val", -1.0), how.get("max_val", 1.0)
        if func is F.relu6:
            lowest, highest = 0.0, 6.0
        if lowest != 0:
            kept: Tensor = func(input, *args, **kwargs)
            return kept
        given = input.clone() if how.get("inplace", False) or func is F.hardtanh_ else input
        smooth = _smooth(given, self.beta, highest)
        return smooth if given is input else input.copy_(smooth)


def _smooth(x: Tensor, beta: float, highest: float | None = None) -> Tensor:
    output: Tensor = _Softplus.apply(x, beta, highest)
    return output


def _sigmoids(x: Tensor, beta: float, highest: float | None) -> tuple[Tensor, Tensor | None]:
    """The slopes of softplus(x) and, where it is taken off, of softplus(x - highest)."""
    upper = None if highest is None else (x * beta).sub_(beta * highest).clamp_(min=-_FAR)
    lower = (x * beta).clamp_(min=-_FAR)
    return lower.sigmoid_(), None if upper is None else upper.sigmoid_()


def _above_relu(x: Tensor, beta: float) -> Tensor:
    """softplus(x) - relu(x) = log(1 + exp(-beta |x|)) / beta; F.softplus is slower by far."""
    return x.abs().mul_(-beta).clamp_(min=-_FAR).exp_().log1p_().div_(beta)


class _Softplus(torch.autograd.Function):
    """softplus(x), less softplus(x - highest) where there is a highest value.

    Its slope is a sigmoid s, or a difference of two, s - t; the slope of that is beta s (1 - s), or
    beta (s - t) (1 - s - t). Made once for both derivatives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float, highest: float | None) -> Tensor:
        output = x.clamp(0, highest).add_(_above_relu(x, beta))
        if highest is not None:
            output -= _above_relu(x - highest, beta)
        slope = rest = None
        if ctx.needs_input_grad[0]:
            slope, upper = _sigmoids(x, beta, highest)
            if upper is not None:
                rest = (1 - slope).sub_(upper)
                slope -= upper
        ctx.save_for_backward(x, slope, rest)
        ctx.shape = beta, highest
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SoftplusGradient.apply(g, *ctx.saved_tensors, *ctx.shape), None, None


class _SoftplusGradient(torch.autograd.Function):
    """g times the slope, given the slope."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, rest: Any, *shape: Any) -> Tensor:
        ctx.save_for_backward(g, x, slope, rest)
        ctx.shape = shape
        return g * slope

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, x, slope, rest = ctx.saved_tensors
        beta, highest = ctx.shape
        if torch.is_grad_enabled():  # a third derivative may follow
            lower = (x * beta).sigmoid()
            upper = 0 if highest is None else ((x - highest) * beta).sigmoid()
            slope, rest = lower - upper, 1 - lower - upper
            of_x = beta * v * g * slope * rest
        elif rest is None:
            of_x = torch.ops.aten.sigmoid_backward((v * g).mul_(beta), slope)
        else:
            of_x = (v * g).mul_(slope).mul_(rest).mul_(beta)
        return v * slope, of_x, None, None, None, None
