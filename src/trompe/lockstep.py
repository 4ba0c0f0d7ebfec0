"""K networks of one architecture, run and trained as one."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trompe.interfaces import InputError, Pass
from trompe.recording import INPUT

Parameters = dict[str, Tensor]  # name -> (K, *shape)


class Lockstep(nn.Module):
    """The networks' parameters, stacked, and the one forward pass that serves all K.

    As a module it takes K blocks of n rows (K n, ...), one block a network, and gives their scores
    (K n, classes), so that `fit` trains it as any other.

    vectorised: one call of torch.func.vmap instead of K calls. Faster for small networks (tables),
    slower for convolutions on a CPU; None: vectorised if no network has any. Both give the same.
    Networks run in eval mode: BatchNorm keeps its statistics, dropout is off.
    """

    def __init__(self, networks: Sequence[nn.Module], vectorised: bool | None = None) -> None:
        super().__init__()
        shapes = [{n: p.shape for n, p in network.named_parameters()} for network in networks]
        if not networks or any(s != shapes[0] for s in shapes):
            raise InputError(
                f"lock-step of {len(networks)} networks: give at least one, all of one architecture"
            )
        parameters, buffers = torch.func.stack_module_state(list(networks))
        # Parameters' names must have no dots in them.
        self.stacked = nn.ParameterDict(
            {name.replace(".", "/"): value.detach() for name, value in parameters.items()}
        )
        self.fixed = {name: value.detach() for name, value in buffers.items()}
        self.count = len(networks)
        # Only its forward() is used; in a tuple, so that its weights are none of this module's.
        self._skeleton = (copy.deepcopy(networks[0]).eval(),)
        convolutional = any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in self.skeleton.modules())
        self.vectorised = not convolutional if vectorised is None else vectorised

    @property
    def skeleton(self) -> nn.Module:
        """A network of the architecture; its weights are nobody's."""
        return self._skeleton[0]

    @property
    def now(self) -> Parameters:
        """The parameters as they are, by the networks' names."""
        return {name.replace("/", "."): value for name, value in self.stacked.items()}

    def forward(self, inputs: Tensor) -> Tensor:
        each = inputs.unflatten(0, (self.count, -1))
        return self.scores(self.now, each).flatten(0, 1)

    def scores(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """inputs (K, n, ...), each network's own -> scores (K, n, classes)."""
        return self._run(parameters, inputs, ())[0]

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
            scores, outputs = self._run(parameters, rows.unflatten(0, inputs.shape[:2]), wanted)
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
                value.copy_(state[name][k])
        return network

    def replace(self, k: int, network: nn.Module) -> None:
        """Start the k-th network anew from another one's weights."""
        with torch.no_grad():
            for name, value in network.named_parameters():
                self.now[name][k] = value

    def _run(
        self, parameters: Mapping[str, Tensor], inputs: Tensor, layers: tuple[str, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (K, n, classes) and outputs by layer (K n, ...)."""

        def one(state: Mapping[str, Tensor], own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen: dict[str, Tensor] = {}
            modules = dict(self.skeleton.named_modules())
            hooks = [modules[n].register_forward_hook(_keep(seen, n)) for n in layers]
            try:
                return torch.func.functional_call(self.skeleton, dict(state), (own,)), seen
            finally:
                for hook in hooks:
                    hook.remove()

        state = {**parameters, **self.fixed}
        if self.vectorised:
            scores, seen = torch.func.vmap(one)(state, inputs)
            return scores, {name: value.flatten(0, 1) for name, value in seen.items()}
        each = [one({n: v[k] for n, v in state.items()}, inputs[k]) for k in range(self.count)]
        return (
            torch.stack([scores for scores, _ in each]),
            {name: torch.cat([seen[name] for _, seen in each]) for name in layers},
        )


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = output

    return hook
