"""BatchNorm over a batch that several processes share: its statistics are those of all rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trompe.maps import full_precision
from trompe.ranks import summed


@contextmanager
def shared_statistics(counted: bool = True) -> Iterator[None]:
    """Inside, BatchNorm in training mode takes mean and variance over the rows of all processes.

    Same values and derivatives, to any order, as one process has with the whole batch; on any
    device. For any model: what is called is replaced, not its modules. All processes must run the
    same layers. counted: whether the rows of this process are part of the batch.
    """
    with _Mode(counted):
        yield


class _Mode(TorchFunctionMode):
    def __init__(self, counted: bool) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, eps=eps)
        x = full_precision(input)
        over = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        places = x.new_full((1,), x.numel() // x.shape[1])
        sums, n = self.total(torch.cat((x.sum(over), places))).split([x.shape[1], 1])
        mean = sums / n
        x = x - mean.view(shape)  # first, so that a small variance is not the rest of large sums
        var = self.total(x.square().sum(over)) / n
        with torch.no_grad():
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                unbiased = var * n / (n - 1).clamp_min(1)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        x = x * torch.rsqrt(var + eps).view(shape)
        if weight is not None:
            x = x * weight.view(shape)
        if bias is not None:
            x = x + bias.view(shape)
        return x.to(input.dtype)

    def total(self, values: Tensor) -> Tensor:
        """Their sum over the processes whose rows count, of which others do not feel these rows."""
        if self.counted:
            return summed(values)
        total = summed(0 * values)
        return total.detach() + 0 * total  # no gradient, but this process still takes part in it
