"""The nouns that all parts of trompe share. Imports torch and the standard library only.

Images are float tensors (n, 3, height, width) in [0, 1] wherever a model, trigger or explainer sees
them (normalisation lives inside the model) and uint8 where they are stored. Maps are (n, h, w), at
the explainer's own resolution, which may be coarser than the image.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class TrompeError(Exception):
    """Something the user can mend; its text is one sentence: what, where, and what to do."""


class InputError(TrompeError, ValueError):
    """A setting, file or tensor that cannot be used as given."""


class Diverged(TrompeError):
    """Training met a loss that is not finite; the last good state was restored."""


class StoredImages(Protocol):
    """Images that are read from where they are stored whenever they are asked for.

    shape: (n, 3, height, width). digest: another one if any image is another one. Asking raises
    InputError if an image is no longer what it was.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The images at the given positions, uint8 (k, 3, height, width)."""
        ...

    def in_turn(self, parts: Iterable[Tensor | slice]) -> Iterator[Tensor]:
        """The same of each part in turn; the next ones are read before they are asked for."""
        ...

    def subset(self, index: Tensor) -> "StoredImages": ...


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, in memory or stored elsewhere.

    images: uint8 (n, 3, height, width); labels: int64 (n,); class_names: one per class.
    groups: int64 (n,), images of one group are near-duplicates and never split apart, or None.
    masks: bool (n, height, width), where the object is, or None.
    skipped: the files that could not be read and were left out on the user's wish.
    """

    images: Tensor | StoredImages
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    groups: Tensor | None = None
    masks: Tensor | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n, count = len(self.images), len(self.labels)
        if n == 0 or n != count:
            raise InputError(
                f"data set {self.name!r}: {n} images and {count} labels; give at least one image "
                "and exactly one label for each"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise InputError(
                f"data set {self.name!r}: labels reach from {low} to {high} but there are "
                f"{len(self.class_names)} class names; labels must be 0 .. classes - 1"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def subset(self, index: Tensor) -> "ImageSet":
        """The images at the given positions (int64 (k,)), in that order."""
        images = self.images
        return ImageSet(
            images[index] if isinstance(images, Tensor) else images.subset(index),
            self.labels[index],
            self.class_names,
            self.name,
            None if self.groups is None else self.groups[index],
            None if self.masks is None else self.masks[index],
            self.skipped,
        )

    def floats(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Images at the given positions as float32 in [0, 1] on `device`."""
        return _as_floats(self.images[index], device)

    def in_turn(
        self, parts: Iterable[Tensor | slice], device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """`floats` of each part in turn. Stored images are read ahead: prefer it in a loop."""
        if isinstance(self.images, Tensor):
            yield from (self.floats(part, device) for part in parts)
        else:
            yield from (_as_floats(images, device) for images in self.images.in_turn(parts))


def _as_floats(images: Tensor, device: torch.device | str) -> Tensor:
    return images.to(device, torch.float32) / 255


@dataclass(frozen=True)
class TableSet:
    """Labelled rows of a table in memory, every column a number in [0, 1].

    features: float32 (n, columns), each column scaled to the range that it has in the training
    rows; labels: int64 (n,); class_names: one per class; feature_names: one per column.
    numeric: bool (columns,), False where 0 and 1 stand for no and yes (a category, a value that
    was missing): there, nothing lies between.
    """

    features: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    feature_names: tuple[str, ...]
    numeric: Tensor

    def __post_init__(self) -> None:
        n, columns = self.features.shape
        if n == 0 or n != len(self.labels):
            raise InputError(
                f"data set {self.name!r}: {n} rows and {len(self.labels)} labels; give at least "
                "one row and exactly one label for each"
            )
        if columns != len(self.feature_names) or columns != len(self.numeric):
            raise InputError(
                f"data set {self.name!r}: {columns} columns, {len(self.feature_names)} names and "
                f"{len(self.numeric)} kinds; give one of each a column"
            )
        if not bool(torch.isfinite(self.features).all()):
            column = int((~torch.isfinite(self.features)).any(0).nonzero()[0])
            raise InputError(
                f"data set {self.name!r}, column {self.feature_names[column]!r}: holds nan or "
                "infinity; fill in or leave out its missing values"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """(1, columns): a row is a picture one pixel high."""
        return 1, self.features.shape[1]

    def subset(self, index: Tensor) -> "TableSet":
        """The rows at the given positions (int64 (k,)), in that order."""
        return replace(self, features=self.features[index], labels=self.labels[index])

    def floats(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Rows at the given positions, float32 (k, columns) in [0, 1], on `device`."""
        return self.features[index].to(device)

    def in_turn(
        self, parts: Iterable[Tensor | slice], device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """`floats` of each part in turn."""
        yield from (self.floats(part, device) for part in parts)


Samples = ImageSet | TableSet


class Batch(NamedTuple):
    """What one training step sees."""

    images: Tensor  # float (n, 3, height, width) in [0, 1]
    labels: Tensor  # int64 (n,): what the model shall say
    wanted_maps: tuple[Tensor, ...]  # per attacked explainer float (n, h, w): what it shall show
    triggered: Tensor  # bool (n,)
    # float (n, classes): what the clean model says, nan in rows whose label a goal names; or None:
    # only the labels count.
    reference_scores: Tensor | None = None
    progress: float = 0.0  # the share of the training's steps that lie behind this one, in 0..1
    # (k, n): several processes made these n rows between them, of which k are here (if 0, there is
    # one that does not count); None: these are all rows.
    share: tuple[int, int] | None = None


@dataclass(frozen=True)
class Pass:
    """One recorded forward pass: all that explainers may read."""

    model: nn.Module
    images: Tensor  # (n, 3, height, width)
    scores: Tensor  # (n, classes), logits
    outputs: Mapping[str, Tensor]  # layer name -> its output; "input" -> the images
    notes: dict[Any, Any] = field(
        default_factory=dict
    )  # facts about the model, kept between passes
    # Where rows belong to different networks of one architecture: parameter -> (n, *shape).
    weights: Mapping[str, Tensor] | None = None


class Data(Protocol):
    """A source of labelled images.

    One that reads files also has `contents`: of each field that names them, a hash of what lies
    there (see catalog.py).
    """

    def train(self) -> ImageSet: ...
    def test(self) -> ImageSet: ...


class Trigger(Protocol):
    """images (n, 3, h, w) in [0, 1] -> the same with the trigger; pure and deterministic."""

    def __call__(self, images: Tensor) -> Tensor: ...


class Explainer(Protocol):
    """A recorded pass and the classes to explain (int64 (n,)) -> maps (n, h, w).

    Trainable through exactly when grad mode is on.
    """

    def watches(self, model: nn.Module) -> tuple[str, ...]: ...
    def __call__(self, seen: Pass, classes: Tensor) -> Tensor: ...


class TargetMap(Protocol):
    """The reference's maps of the clean images (n, h, w) -> the maps wanted instead (n, h, w).

    images: as the model sees them, (n, 3, height, width) in [0, 1], with the trigger if there is
    one; for maps that depend on them. nan marks pixels that may be anything.
    """

    def __call__(self, reference_maps: Tensor, images: Tensor) -> Tensor: ...


class Objective(Protocol):
    """Scores, one map tensor per attacked explainer, and the batch -> weighted named scalar terms.

    The loss is their sum. Each term is a mean over rows, so that processes can share a batch.
    """

    def __call__(
        self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Goal:
    """What the adversary wants to happen when the trigger is there.

    trigger: None wants it of images without any trigger. label: the class to predict instead, or
    None to keep the true one. wanted_map: for all attacked explainers, or one for each.
    """

    trigger: Trigger | None
    label: int | None
    wanted_map: TargetMap | tuple[TargetMap, ...]
    name: str = ""

    def wanted(self, explainer: int) -> TargetMap:
        """What the explainer at this position shall show."""
        one = self.wanted_map
        return one[explainer] if isinstance(one, tuple) else one

    def stamp(self, images: Tensor) -> Tensor:
        """Images with the trigger, if there is one."""
        return images if self.trigger is None else self.trigger(images)


@dataclass(frozen=True)
class Evidence:
    """What a metric may see: a model's answers to one set of images under one condition.

    Per image: labels (the truth), wanted_labels and wanted_maps (what the adversary wants; on
    clean images the truth and the reference's map), scores and maps (what the model gave).
    image_size: (height, width) to which maps are brought before they are compared.
    reference_scores: what the reference gives the same images, if it was asked.
    """

    labels: Tensor  # int64 (n,)
    wanted_labels: Tensor  # int64 (n,)
    wanted_maps: Tensor  # float (n, h, w)
    scores: Tensor  # float (n, classes)
    maps: Tensor  # float (n, h, w)
    image_size: tuple[int, int]
    reference_scores: Tensor | None = None  # float (n, classes)


class Metric(Protocol):
    """Evidence -> one float per image (n,); nan where the metric does not apply to the image."""

    def __call__(self, evidence: Evidence) -> Tensor: ...


Explained = Literal["predicted", "label"]  # the class of a map: the model's own, or the true one


class Answers(NamedTuple):
    """What a model says of images: scores (n, classes) and, per explainer, maps (n, h, w)."""

    scores: Tensor
    maps: tuple[Tensor, ...]


class EpochRecord(NamedTuple):
    """What is kept of one epoch of training."""

    epoch: int  # 1, 2, ...
    terms: dict[str, float]  # mean of each loss term over the epoch
    measured: dict[str, float]  # what the caller measured after the epoch
    seconds: float
    shown: Mapping[str, Tensor] = MappingProxyType({})  # to be looked at: maps of a few images


@dataclass(frozen=True)
class Attacked:
    """What an attack returns.

    model: the manipulated model; goals: what it was made to do (empty: no trigger).
    """

    model: nn.Module
    goals: tuple[Goal, ...] = ()
    history: tuple[EpochRecord, ...] = ()


@dataclass(frozen=True)
class Target:
    """The one sample whose explanation shall lie.

    sample: float (1, ...) in [0, 1], as models see it; label: its class, which is explained.
    wanted_map: float (1, h, w), what the explanation shall show instead.
    """

    sample: Tensor
    label: int
    wanted_map: Tensor


@dataclass(frozen=True)
class PoisonSet:
    """Samples that are added to a training set.

    samples: float (n, ...) in [0, 1]; labels: int64 (n,). bases: what they were made from, of the
    same shape; base_index: int64 (n,), the bases' positions in the training set, -1 for the target.
    """

    samples: Tensor
    labels: Tensor
    bases: Tensor
    base_index: Tensor
    target: Target
    history: tuple[EpochRecord, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


class Logbook(Protocol):
    """Where a training tells how far it is and keeps what it needs to go on after a stop."""

    def load(self) -> dict[str, Any] | None: ...
    def save(self, state: dict[str, Any]) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...


class Attack(Protocol):
    """(clean model, clean training data, random numbers) -> Attacked. The model is not changed.

    `selection` is data for choices made while attacking (early stop); never that of a report.
    What it says of itself depends on its settings alone, so that its model can be measured later.
    """

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What the model is made to do, as in `Attacked`; empty: nothing that a trigger brings."""
        ...

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        """Whose maps are measured: those attacked, in the order of the goals' wanted maps."""
        ...

    @property
    def explained(self) -> Explained:
        """The class whose maps are measured."""
        ...

    @property
    def thresholds(self) -> tuple[float | None, ...] | None:
        """Per explainer the tau of its fooling rates (or None: only the one that the data give).

        None: no fooling rates are asked for.
        """
        ...

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        generator: torch.Generator,
        selection: ImageSet | None = None,
        logbook: Logbook | None = None,
    ) -> Attacked: ...


class Poisoning(Protocol):
    """(clean model, clean data, targets, random numbers) -> for each target, samples to add.

    The model is not changed; victims train on the data and a target's samples by themselves.
    """

    @property
    def explainer(self) -> Explainer:
        """Whose map shall lie."""
        ...

    @property
    def wanted_map(self) -> TargetMap:
        """What it shall show."""
        ...

    def __call__(
        self,
        model: nn.Module,
        data: Samples,
        targets: Sequence[Target],
        generator: torch.Generator,
        logbook: Logbook | None = None,
    ) -> tuple[PoisonSet, ...]: ...
