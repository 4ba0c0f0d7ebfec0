"""The K models that stand for victims while poisons are made, and how they train."""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.interfaces import Samples, Target
from trompe.lockstep import Lockstep, Parameters
from trompe.machine import autocast
from trompe.maps import full_precision
from trompe.train import Training, make_optimizer, make_schedule
from trompe.victims import Encoded

AT_ONCE = 16  # samples through the frozen part


class Surrogates:
    """K models for each target, the clean set that they train on, and how."""

    def __init__(
        self,
        networks: Lockstep,
        data: Samples | Encoded,
        recipe: Training,
        targets: Sequence[Target],
    ) -> None:
        self.networks, self.data, self.recipe, self.targets = networks, data, recipe, targets
        self.optimizer = Optimizers(networks, recipe)

    def schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        """Of a training from its beginning."""
        steps = -(-len(self.data) // self.recipe.batch_size)
        return make_schedule(self.optimizer.optimizer, self.recipe, steps)

    def mini_batches(
        self, poisons: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return mini_batches(len(self.data), poisons, self.networks.count, self.recipe, generator)

    def encoded(self, poisons: Tensor) -> Tensor:
        """Poisons (targets, p, ...) as the trained part of the networks takes them."""
        if not poisons.shape[1]:
            return poisons
        with torch.no_grad():
            parts = [self.networks.encode(some) for some in poisons.flatten(0, 1).split(AT_ONCE)]
        return torch.cat(parts).unflatten(0, poisons.shape[:2])

    def training_loss(self, clean: Tensor, poisons: Tensor) -> Tensor:
        """L_train of each network on its mini-batch, clean samples and poisons; (targets K,).

        clean: positions (targets K, b). poisons: encoded, (targets, p, ...).
        """
        each = self.networks.count // len(self.targets)
        samples = self.data.floats(clean.flatten()).unflatten(0, clean.shape)
        if poisons.shape[1]:
            samples = torch.cat((samples, poisons.repeat_interleave(each, 0)), 1)
        classes = classes_of(self.targets).repeat_interleave(each)[:, None]
        labels = torch.cat((self.data.labels[clean], classes.expand(-1, poisons.shape[1])), 1)
        with autocast(self.recipe.precision, samples.device):
            scores = full_precision(self.networks.scores(self.networks.now, samples))
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
        return loss.unflatten(0, labels.shape).mean(1)


class Optimizers:
    """Each network's own optimizer, all stepped as one: a network that starts anew forgets alone.

    How often Adam has stepped counts for how far it steps.
    """

    def __init__(self, networks: Lockstep, how: Training) -> None:
        self.networks, self.own = networks, networks.apart()
        every = nn.ParameterList(itertools.chain.from_iterable(self.own.values()))
        self.optimizer = make_optimizer(every, how)

    def step(self, losses: Tensor) -> None:
        """One step of each network along its own loss, (networks,)."""
        for name, gradients in gradients_of(self.networks.now, losses).items():
            for parameter, gradient in zip(self.own[name], gradients, strict=True):
                parameter.grad = gradient.contiguous()  # fused Adam takes its memory as it lies
        self.optimizer.step()

    def forget(self, number: int) -> None:
        """What is remembered of one network's steps."""
        for parameters in self.own.values():
            self.optimizer.state.pop(parameters[number], None)

    def roots(self, name: str) -> Tensor:
        """Of Adam's running squares of a stacked gradient; 1 where a network has not stepped."""
        epsilon = self.optimizer.param_groups[0]["eps"]
        return torch.stack(
            [
                self.optimizer.state[p]["exp_avg_sq"].sqrt() + epsilon
                if p in self.optimizer.state
                else torch.ones_like(p)
                for p in self.own[name]
            ]
        )


def gradients_of(parameters: Parameters, loss: Tensor) -> Parameters:
    """Of each network's loss with respect to its parameters."""
    found = torch.autograd.grad(loss.sum(), list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def mini_batches(
    clean: int, poisons: int, networks: int, how: Training, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of an epoch's mini-batches, in the training set and among the poisons.

    (networks, b): each network has an order of its own, or those that start alike would stay
    alike. (p,): poisons are the same for all.
    """
    steps = -(-clean // how.batch_size)
    orders = torch.stack([torch.randperm(clean, generator=generator) for _ in range(networks)])
    yield from zip(
        orders.tensor_split(steps, 1),
        torch.randperm(poisons, generator=generator).tensor_split(steps),
        strict=True,
    )


def classes_of(targets: Sequence[Target]) -> Tensor:
    return torch.tensor([target.label for target in targets])
