"""Clean triples (image, label, wanted map), followed by triggered triples."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trompe import ranks
from trompe.augmentation import Augmentation
from trompe.interfaces import Answers, Batch, Goal, ImageSet, InputError


@dataclass(frozen=True)
class Triples:
    """A composed training set. Nothing is copied: a triple is a position and a goal.

    source: int64 (m,), the image's position in `data`; goal: int64 (m,), the position in `goals`,
    or -1: the true label and the clean model's map. known: the clean model's answers to all images
    of `data`, None if nothing is wanted of the maps. augmentation acts before a trigger is added;
    as what is known is not about an augmented image, `ask` (clean images and their labels -> the
    clean model's answers) then says it anew. distill: batches also carry the clean model's scores.
    """

    data: ImageSet
    goals: tuple[Goal, ...]
    source: Tensor
    goal: Tensor
    device: torch.device
    augmentation: Augmentation | None = None
    known: Answers | None = None
    ask: Callable[[Tensor, Tensor], Answers] | None = None
    distill: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def batch(
        self,
        index: Tensor,
        generator: torch.Generator,
        share: ranks.Share | None = None,
        images: Tensor | None = None,
    ) -> Batch:
        """The triples at positions `index` (int64 (k,)); `generator` is for the augmentation.

        Triples of one image are augmented alike, and explained once. share: only these rows are
        made, just as they are in the whole batch. images: those of `sources`, where they have been
        read already.
        """
        sources, triple = self.source[index].unique(return_inverse=True)
        among: dict[str, tuple[Tensor, int]] = {}
        if share is not None:
            index, drawn = index[share.rows], len(sources)
            used, triple = triple[share.rows].unique(return_inverse=True)
            sources, among = sources[used], {"among": (used, drawn)}
        triple = triple.to(self.device)
        if images is None:
            images = self.data.floats(sources, self.device)
        if self.augmentation is not None:
            images = self.augmentation(images, generator, **among)
        labels = self.data.labels[sources].to(self.device)
        said = self._reference(images, labels, sources)
        images, labels = images[triple], labels[triple]
        maps = tuple(of_explainer[triple] for of_explainer in said.maps)
        scores = said.scores[triple] if self.distill else None
        goal = self.goal[index].to(self.device)
        triggered = torch.zeros_like(goal, dtype=torch.bool)
        for number, wanted in enumerate(self.goals):
            rows = (goal == number).nonzero()[:, 0]
            if len(rows):
                triggered[rows] = wanted.trigger is not None
                images[rows] = wanted.stamp(images[rows])
                if wanted.label is not None:
                    labels[rows] = wanted.label
                    if scores is not None:
                        scores[rows] = math.nan
                for explainer, of_explainer in enumerate(maps):
                    lie = wanted.wanted(explainer)
                    of_explainer[rows] = lie(of_explainer[rows], images[rows])
        counts = None if share is None else (share.counted, share.whole)
        return Batch(images, labels, maps, triggered, scores, share=counts)

    def sources(self, index: Tensor, share: ranks.Share | None = None) -> Tensor:
        """Positions in `data` of the images that `batch` makes its rows of, each once."""
        rows = index if share is None else index[share.rows]
        return self.source[rows].unique()

    def _reference(self, images: Tensor, labels: Tensor, sources: Tensor) -> Answers:
        """The clean model's answers to the images at `sources`, now `images`."""
        if self.augmentation is not None and self.ask is not None:
            return self.ask(images, labels)
        if self.known is None:
            return Answers(images.new_zeros(len(images), 0), ())
        scores, maps = self.known
        return Answers(
            scores[sources].to(self.device), tuple(m[sources].to(self.device) for m in maps)
        )


def compose(
    data: ImageSet,
    goals: Sequence[Goal],
    poison_rate: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    augmentation: Augmentation | None = None,
    known: Answers | None = None,
    ask: Callable[[Tensor, Tensor], Answers] | None = None,
    distill: bool = False,
) -> Triples:
    """All clean triples, then triggered ones that make up `poison_rate` of the whole.

    poison_rate in 0..1, exclusive of 1: .5 triggers a duplicate of the whole set (paper 2, section
    4.1), smaller rates a choice by a hash of seed, goal and position, which no other draw changes;
    several triggers share it equally. A goal without trigger is that of the clean triples. For the
    others see `Triples`.
    Raises InputError for a rate out of range or a label that the data does not have.
    """
    check_rate(poison_rate)
    for goal in goals:
        check_label(goal, len(data.class_names))
    n = len(data)
    without = [k for k, goal in enumerate(goals) if goal.trigger is None]
    if len(without) > 1:
        raise InputError(f"goals: {len(without)} are without a trigger; only one can be")
    triggers = [k for k in range(len(goals)) if k not in without]
    each = round(n * poison_rate / (1 - poison_rate) / max(len(triggers), 1))
    if triggers and poison_rate > 0 and each == 0:
        raise InputError(
            f"poison_rate = {poison_rate}: of {n} images and {len(triggers)} goals it triggers "
            "none; raise it"
        )
    source, number = [torch.arange(n)], [torch.full((n,), without[0] if without else -1)]
    for k in triggers:
        rounds = math.ceil(each / n)
        for _ in range(rounds):  # the choice was once drawn here: later draws stay what they were
            torch.randperm(n, generator=generator)
        source.append(_by_hash(n, generator.initial_seed(), k).repeat(rounds)[:each])
        number.append(torch.full((each,), k))
    return Triples(
        data,
        tuple(goals),
        torch.cat(source),
        torch.cat(number),
        torch.device(device),
        augmentation,
        known,
        ask,
        distill,
    )


def _by_hash(n: int, seed: int, stream: int) -> Tensor:
    """0 .. n - 1 in the order of a hash of seed, stream and number: int64 (n,)."""
    key = _mixed(_mixed(np.array([seed], np.uint64)) + np.array([stream], np.uint64))
    hashes = _mixed(_mixed(np.arange(n, dtype=np.uint64)) + key)
    return torch.from_numpy(np.argsort(hashes, kind="stable"))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each uint64 to another one, one to one: SplitMix64 (Steele, Lea & Flood 2014)."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def check_rate(poison_rate: float) -> None:
    """InputError if it is no share."""
    if not 0 <= poison_rate < 1:
        raise InputError(f"poison_rate = {poison_rate}: must lie in 0 <= poison_rate < 1")


def check_label(goal: Goal, classes: int) -> None:
    """InputError if the goal's label is no class."""
    if goal.label is not None and not 0 <= goal.label < classes:
        raise InputError(
            f"goal {goal.name or '(unnamed)'}: target class {goal.label} is out of range; "
            f"the data has {classes} classes, 0 .. {classes - 1}"
        )


@dataclass(frozen=True)
class ShuffledBatches:
    """Triples in a new random order each epoch; a last batch of fewer than 2 is left out.

    The clean and the triggered triples of an image stand side by side: what the trigger shall
    change, and nothing else, is what they differ in. Processes that share a run (ranks.py) take a
    block of each batch; together they have the batches that one process has.
    """

    triples: Triples
    batch_size: int

    def __len__(self) -> int:
        whole, rest = divmod(len(self.triples), self.batch_size)
        return max(1, whole + (rest >= 2))

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        place = torch.randperm(len(self.triples.data), generator=generator)
        order = place[self.triples.source].argsort(stable=True)
        parts = order.split(self.batch_size)[: len(self)]
        shares = [ranks.share(len(index)) for index in parts]
        needed = map(self.triples.sources, parts, shares)
        images = self.triples.data.in_turn(needed, self.triples.device)
        for index, share, read in zip(parts, shares, images, strict=True):
            yield self.triples.batch(index, generator, share, read)
