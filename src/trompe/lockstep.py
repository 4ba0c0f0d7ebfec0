"""K networks of one architecture, run and trained as one."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trompe.folding import folded_statistics
from trompe.interfaces import InputError, Pass
from trompe.maps import full_precision
from trompe.recording import INPUT
from trompe.splitting import split

Parameters = dict[str, Tensor]  # name -> (K, *shape)


class Lockstep(nn.Module):
    """The networks' parameters, stacked, and the one forward pass that serves all K.

    As a module it takes K blocks of n rows (K n, ...), one block a network, and gives their scores
    (K n, classes), so that `fit` trains it as any other.

    vectorised: one call of torch.func.vmap instead of K calls. Faster for small networks (tables),
    slower for convolutions on a CPU; None: vectorised if no network has any. Both give the same.
    Networks run in eval mode: BatchNorm keeps its statistics, dropout is off.

    frozen_until: the layer up to which all networks are the same and stay so. It is run once for
    all, by `encode`; what is trained and stacked is what lies behind, which takes its output.
    Raises InputError for networks that differ in architecture, or up to that layer.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        vectorised: bool | None = None,
        frozen_until: str | None = None,
    ) -> None:
        super().__init__()
        shapes = [{n: p.shape for n, p in network.named_parameters()} for network in networks]
        if not networks or any(s != shapes[0] for s in shapes):
            raise InputError(
                f"lock-step of {len(networks)} networks: give at least one, all of one architecture"
            )
        self.frozen_until = frozen_until
        skeleton = copy.deepcopy(networks[0]).eval()
        self._body: _Fast | None = None
        tail: nn.Module = skeleton
        if frozen_until is not None:
            body, tail = split(skeleton, frozen_until)
            _check_same(networks, body, frozen_until)
            self._body = _Fast(copy.deepcopy(body).requires_grad_(False))
        parameters, buffers = (
            {name: torch.stack([_named(network, name) for network in networks]) for name, _ in own}
            for own in (tail.named_parameters(), tail.named_buffers())
        )
        if not parameters:
            raise InputError(
                f"frozen_until {frozen_until!r}: behind it nothing could be trained; name an "
                "earlier layer"
            )
        # Parameters' names must have no dots in them.
        self.stacked = nn.ParameterDict(
            {name.replace(".", "/"): value.detach() for name, value in parameters.items()}
        )
        self.fixed = {name: value.detach() for name, value in buffers.items()}
        self.count = len(networks)
        # Only its forward() is used; in a tuple, so that its weights are none of this module's.
        self._skeleton = (skeleton, tail)
        self._fast = _Fast(copy.deepcopy(tail))
        convolutional = any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in self.skeleton.modules())
        self.vectorised = not convolutional if vectorised is None else vectorised

    @property
    def body(self) -> nn.Module | None:
        """The frozen part."""
        return None if self._body is None else self._body.part

    @property
    def skeleton(self) -> nn.Module:
        """A network of the architecture; its weights are nobody's."""
        return self._skeleton[0]

    @property
    def now(self) -> Parameters:
        """The parameters as they are, by the networks' names."""
        return {name.replace("/", "."): value for name, value in self.stacked.items()}

    def apart(self) -> dict[str, list[nn.Parameter]]:
        """Each network's own parameters by name, in the same memory, for an optimizer.

        They get no gradients: hand each network its part of the stacked ones.
        """
        return {
            name: [nn.Parameter(own) for own in value.detach()] for name, value in self.now.items()
        }

    def encode(self, inputs: Tensor) -> Tensor:
        """What the part takes that differs between the networks: inputs (n, ...), or features."""
        return inputs if self._body is None else self._body(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of encoded inputs."""
        each = inputs.unflatten(0, (self.count, -1))
        return self.scores(self.now, each).flatten(0, 1)

    def scores(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Encoded inputs (K, n, ...), each network's own -> scores (K, n, classes)."""
        if self.vectorised:
            return self._run(parameters, inputs, ())[0]
        state = {**parameters, **self.fixed}
        each = [
            self._fast(inputs[k], {n: v[k] for n, v in state.items()}) for k in range(len(inputs))
        ]
        return torch.stack(each)

    def record(
        self, parameters: Mapping[str, Tensor], inputs: Tensor, layers: Iterable[str]
    ) -> Pass:
        """A recorded pass of inputs (K, n, ...) for explainers, its K n rows one behind another.

        Trainable through. Its `model` is the skeleton: explainers must read weights from the pass's
        `weights`. Only the inputs can be differentiated with respect to, not a layer's outputs.
        """
        rows = inputs.flatten(0, 1)
        if not rows.requires_grad:
            rows = rows.detach().requires_grad_()
        wanted = tuple(name for name in dict.fromkeys(layers) if name != INPUT)
        with torch.enable_grad():  # for explainers that differentiate, whatever the grad mode
            encoded = self.encode(rows).unflatten(0, inputs.shape[:2])
            scores, outputs = self._run(parameters, encoded, wanted)
            scores = scores.flatten(0, 1)
        each = inputs.shape[1]
        return Pass(
            self.skeleton,
            rows,
            scores,
            {INPUT: rows, **outputs},
            weights={name: value.repeat_interleave(each, 0) for name, value in parameters.items()},
        )

    def network(self, k: int) -> nn.Module:
        """A copy of the k-th network as it is now, in eval mode."""
        network = copy.deepcopy(self.skeleton)
        state = {**self.now, **self.fixed}
        with torch.no_grad():
            for name, value in (*network.named_parameters(), *network.named_buffers()):
                if name in state:  # else it belongs to the frozen part
                    value.copy_(state[name][k])
        return network

    def replace(self, k: int, network: nn.Module) -> None:
        """Start the k-th network anew from another one's weights."""
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name in self.now:
                    self.now[name][k] = value

    def _behind(self, layer: str) -> str:
        """The module behind the frozen part whose output is that of `layer`."""
        name, cut = layer, f"{self.frozen_until}."
        while self._body is not None and cut.startswith(f"{name}."):  # the cut divides this module
            inner = self.skeleton.get_submodule(name)
            if not isinstance(inner, nn.Sequential) or cut == f"{name}.":
                break
            name = f"{name}.{list(dict(inner.named_children()))[-1]}"
        if name not in dict(self._skeleton[1].named_modules()) or cut.startswith(f"{name}."):
            raise InputError(
                f"layer {layer!r}: is no layer of {type(self.skeleton).__name__}"
                + (
                    ""
                    if self.frozen_until is None
                    else f" behind {self.frozen_until!r}, up to which networks are frozen; name one"
                )
            )
        return name

    def _run(
        self, parameters: Mapping[str, Tensor], inputs: Tensor, layers: tuple[str, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (K, n, classes) and outputs by layer (K n, ...)."""

        def one(state: Mapping[str, Tensor], own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen: dict[str, Tensor] = {}
            hooks = [modules[r].register_forward_hook(_keep(seen, n)) for n, r in read.items()]
            try:
                return torch.func.functional_call(tail, dict(state), (own,)), seen
            finally:
                for hook in hooks:
                    hook.remove()

        tail = self._skeleton[1]
        modules = dict(tail.named_modules())
        read = {name: self._behind(name) for name in layers}
        state = {**parameters, **self.fixed}
        if self.vectorised:
            scores, seen = torch.func.vmap(one)(state, inputs)
            return scores, {name: value.flatten(0, 1) for name, value in seen.items()}
        each = [one({n: v[k] for n, v in state.items()}, inputs[k]) for k in range(self.count)]
        return (
            torch.stack([scores for scores, _ in each]),
            {name: torch.cat([seen[name] for _, seen in each]) for name in layers},
        )


def _named(network: nn.Module, name: str) -> Tensor:
    """A network's parameter or buffer."""
    module, _, last = name.rpartition(".")
    value: Tensor = getattr(network.get_submodule(module), last)
    return value.detach()


class _Fast:
    """A part of a network in eval mode, as a CPU runs it fastest: the same function.

    From the first call on, BatchNorm is folded into the convolutions before it.
    """

    def __init__(self, part: nn.Module) -> None:
        self.part = part.to(memory_format=torch.channels_last)
        self._folded: ExitStack | None = None  # never left

    def __call__(self, inputs: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """With the part's own weights, or those in `state`."""
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self._folded is None:
            self._folded = ExitStack()
            with torch.autocast(inputs.device.type, enabled=False):  # rounds more than is allowed
                few = full_precision(inputs[:2].detach())
                self._folded.enter_context(folded_statistics(self.part, few))
        outputs: Tensor = torch.func.functional_call(self.part, dict(state or {}), (inputs,))
        return outputs


def _check_same(networks: Sequence[nn.Module], body: nn.Module, layer: str) -> None:
    for name in [n for n, _ in (*body.named_parameters(), *body.named_buffers())]:
        for other in networks[1:]:
            if not torch.equal(_named(other, name), _named(networks[0], name)):
                raise InputError(
                    f"frozen_until = {layer!r}: the networks differ before it, in {name}; only "
                    "networks that start from one clean model can share it"
                )


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = output

    return hook
