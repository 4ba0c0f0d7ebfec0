"""Victims: networks that are trained honestly, on data to which somebody added samples."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.augmentation import Augmentation
from trompe.interfaces import (
    Batch,
    EpochRecord,
    ImageSet,
    InputError,
    Logbook,
    PoisonSet,
    Samples,
)
from trompe.lockstep import Lockstep
from trompe.train import Training, fit

Start = Literal["clean model", "new head", "scratch"]

RECIPE = Training(
    epochs=20,
    batch_size=128,
    learning_rate=1e-3,
    optimizer="adam",
    weight_decay=1e-4,
)


def fresh(model: nn.Module, start: Start, generator: torch.Generator) -> nn.Module:
    """A copy of the model, with new weights in its last linear layer, or everywhere.

    Drawn as PyTorch initialises layers. "clean model" draws none.
    """
    network = copy.deepcopy(model)
    if start == "clean model":
        return network
    layers = [m for m in network.modules() if hasattr(m, "reset_parameters")]
    heads = [m for m in layers if isinstance(m, nn.Linear | nn.Conv2d)]
    if not heads:
        raise InputError(
            f"model {type(model).__name__}: has no linear or convolutional layer to start anew"
        )
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers if start == "scratch" else heads[-1:]:
            layer.reset_parameters()  # type: ignore[operator]
    return network


def check_in_memory(data: Samples) -> None:
    """InputError for a training set that is read from disk: victims ask for it all the time."""
    if isinstance(data, ImageSet) and not data.in_memory:
        raise InputError(
            f"data {data.name!r}: are read from disk whenever they are asked for, but poisoning "
            "and its victims need them in memory; set data.in_memory = true, or a smaller data.size"
        )


def poisoned(data: Samples, poison: PoisonSet | None) -> Samples:
    """The training set with the poison's samples behind its own; images in 8 bits.

    InputError for images that are not in memory.
    """
    if poison is None:
        return data
    check_in_memory(data)
    labels = torch.cat((data.labels, poison.labels))
    name = f"{data.name}, poisoned"
    if isinstance(data, ImageSet):
        images: Any = data.images
        added = (poison.samples * 255).round().to(torch.uint8)
        return ImageSet(torch.cat((images, added)), labels, data.class_names, name)
    features = torch.cat((data.features, poison.samples))
    return replace(data, features=features, labels=labels, name=name)


@dataclass(frozen=True)
class Encoded:
    """Samples as the part of networks that is trained takes them (see `Lockstep.encode`).

    features: float (n, ...). Otherwise as `Samples`.
    """

    features: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Features at the given positions."""
        return self.features[index].to(device)


# The last training set that was encoded: the clean model, the crafting and all victims share it.
_encoded_last: list[tuple[nn.Module, Tensor, Encoded]] = []


def encode(networks: Lockstep, data: Samples) -> Samples | Encoded:
    """The data as `networks` train on them: as they are, or once through their frozen part.

    What networks with the same frozen part got last is remembered.
    """
    if networks.body is None:
        return data
    given = data.images if isinstance(data, ImageSet) else data.features
    assert isinstance(given, Tensor)  # see check_in_memory
    for body, seen, encoded in _encoded_last:
        same = seen.shape == given.shape and torch.equal(seen, given)
        if same and _same_function(body, networks.body):
            return replace(encoded, labels=data.labels, class_names=data.class_names)
    with torch.no_grad():
        features = torch.cat(
            [networks.encode(data.floats(i)) for i in torch.arange(len(data)).split(64)]
        )
    encoded = Encoded(features, data.labels, data.class_names, data.name)
    _encoded_last[:] = [(networks.body, given, encoded)]
    return encoded


def _same_function(one: nn.Module, other: nn.Module) -> bool:
    """Have both the same layers with the same weights?"""
    ours, theirs = (
        dict(itertools.chain(m.named_parameters(), m.named_buffers())) for m in (one, other)
    )
    return (
        repr(one) == repr(other)
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def with_poison(networks: Lockstep, data: Samples | Encoded, poison: PoisonSet | None) -> Any:
    """`poisoned` data, as `networks` train on them; `data` are encoded already."""
    if not isinstance(data, Encoded):
        return poisoned(data, poison)
    if poison is None:
        return data
    samples = poison.samples
    if samples.ndim == 4:
        samples = (samples * 255).round() / 255  # as an image file holds them
    with torch.no_grad():
        added = torch.cat([networks.encode(some) for some in samples.split(64)])
    features, labels = torch.cat((data.features, added)), torch.cat((data.labels, poison.labels))
    return replace(data, features=features, labels=labels, name=f"{data.name}, poisoned")


@dataclass(frozen=True)
class LockstepBatches:
    """Batches for networks in lock-step, each with an order of its own.

    data: one training set, or one for each of as many equal groups of networks; all of one size.
    A network's share of a batch is the k-th of `networks` blocks of rows. noise: standard deviation
    of what is added to all samples, which stay in [0, 1]. augmentation: of images, before that.
    """

    data: tuple[Samples | Encoded, ...]
    networks: int
    batch_size: int
    noise: float = 0.0
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return -(-len(self.data[0]) // self.batch_size)

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        n, of_each = len(self.data[0]), self.networks // len(self.data)
        orders = torch.stack([torch.randperm(n, generator=generator) for _ in range(self.networks)])
        for index in orders.split(self.batch_size, dim=1):
            groups = list(zip(self.data, index.split(of_each), strict=True))
            rows = torch.cat([data.floats(i.flatten()) for data, i in groups])
            labels = torch.cat([data.labels[i.flatten()] for data, i in groups])
            if self.augmentation is not None:
                rows = self.augmentation(rows, generator)
            if self.noise:
                rows = rows + self.noise * torch.randn(rows.shape, generator=generator)
                rows = rows.clamp(0, 1)
            yield Batch(rows, labels, (), torch.zeros(len(labels), dtype=torch.bool))


@dataclass(frozen=True)
class EachClassLoss:
    """The sum over networks in lock-step of each one's mean cross-entropy: none feels another."""

    networks: int
    smoothing: float = 0.0

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        return {
            "prediction": self.networks
            * F.cross_entropy(scores, batch.labels, label_smoothing=self.smoothing)
        }


def train_together(
    networks: Lockstep,
    data: Sequence[Samples | Encoded],
    how: Training,
    generator: torch.Generator,
    logbook: Logbook | None = None,
    noise: float = 0.0,
    augmentation: Augmentation | None = None,
) -> list[EpochRecord]:
    """Train networks in place, honestly, each as if alone; see `LockstepBatches` for the rest.

    As `Lockstep` runs them: BatchNorm's statistics stay as they are, and dropout is off. Raises
    InputError for `clip`, which would take all networks' gradients as one, and for what networks in
    lock-step do not have.
    """
    if how.clip is not None:
        raise InputError(f"training.clip = {how.clip:g}: poisoning has none; leave it out")
    if how.frozen:
        raise InputError(
            f"training.frozen = {list(how.frozen)}: poisoning has frozen_until, the layer up to "
            "which all is kept; set that instead"
        )
    if how.softplus_beta is not None and networks.vectorised:
        raise InputError(
            f"training.softplus_beta = {how.softplus_beta:g}: networks of tables, trained in one "
            "call, have none; leave it out"
        )
    if (noise or augmentation is not None) and networks.frozen_until is not None:
        raise InputError(
            f"{f'noise = {noise:g}' if noise else 'augmentation'}: what lies before "
            f"{networks.frozen_until!r} is run once, on the samples as they are; set victims.whole "
            "= true, or leave it out"
        )
    if augmentation is not None and not all(isinstance(d, ImageSet) for d in data):
        raise InputError("augmentation: is of images; rows of a table have noise")
    # Lockstep never moves statistics: what says when they stay has nothing to do.
    how = replace(how, frozen_statistics=False, moving_epochs=None)
    batches = LockstepBatches(tuple(data), networks.count, how.batch_size, noise, augmentation)
    objective = EachClassLoss(networks.count, how.label_smoothing)
    return list(fit(networks, batches, objective, (), how, generator, None, logbook))
