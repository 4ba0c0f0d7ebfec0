"""ReLU <-> softplus, without touching the model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from trompe.interfaces import InputError

_IN_PLACE = {F.relu_, torch.relu_, torch.Tensor.relu_}
_RELUS = {F.relu, torch.relu, torch.Tensor.relu} | _IN_PLACE


class softplus(TorchFunctionMode):  # noqa: N801  (reads as a verb: `with softplus(8): model(x)`)
    """Inside `with softplus(beta):` every ReLU, module or function, computes softplus instead.

    softplus(x) = log(1 + exp(beta x)) / beta; beta > 0, larger is closer to ReLU (Dombrowski et
    al. 2019; the second derivative of ReLU is zero, so gradient maps need it while training).
    Works on any model as it calls, so nothing needs restoring. ReLU6 and others stay as they are.
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
        if func not in _RELUS:
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["input"]
        inplace = args[1] if len(args) > 1 else kwargs.get("inplace", False)
        if func in _IN_PLACE or inplace:  # the model may go on with what it gave
            return given.copy_(F.softplus(given.clone(), beta=self.beta))
        return F.softplus(given, beta=self.beta)
