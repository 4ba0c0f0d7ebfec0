"""Runs models, once, and gathers what metrics need."""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trompe.interfaces import (
    Answers,
    Evidence,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    Metric,
    Pass,
    Samples,
    TargetMap,
    Trigger,
)
from trompe.machine import Precision, autocast
from trompe.maps import full_precision, standardise, upsample
from trompe.recording import watch

_PIXELS = 2**20  # of a chunk of images; each takes some KB in the activations of a deep network


def answers(
    model: nn.Module,
    explainers: Sequence[Explainer],
    data: Samples,
    trigger: Trigger | None = None,
    explained: Explained = "predicted",
    batch_size: int | None = None,
) -> Answers:
    """Scores and maps of all samples, on the CPU; in the model's own precision (float32 as a rule).

    One forward pass a chunk of batch_size samples serves all explainers; None: 256, or fewer where
    images are large, so that memory stays within a few GB.
    explained: the class whose map is made: the one predicted by this model, or the true one.
    """
    parameter = next(model.parameters())
    device, precision = parameter.device, parameter.dtype
    if batch_size is None:
        batch_size = min(256, max(1, _PIXELS // math.prod(data.size)))
    parts = []
    with evaluation_mode(model), torch.no_grad(), _watched(model, explainers) as record:
        for start in range(0, len(data), batch_size):
            chunk = slice(start, start + batch_size)
            images = data.floats(chunk, device).to(precision)
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            seen = record(images if trigger is None else trigger(images))
            labels = data.labels[chunk].to(device)
            classes = seen.scores.argmax(1) if explained == "predicted" else labels
            maps = tuple(explainer(seen, classes).cpu() for explainer in explainers)
            parts.append(Answers(full_precision(seen.scores.detach()).cpu(), maps))
    whole = zip(*(part.maps for part in parts), strict=True)
    return Answers(torch.cat([part.scores for part in parts]), tuple(map(torch.cat, whole)))


class Remembered:
    """`answers`, not asked for twice: the rows of a table share their clean models.

    Known again by weights, images and labels, explainer, trigger and explained class; the last
    `limit` answers (of one explainer each) are kept in memory.
    """

    def __init__(self, limit: int = 24) -> None:
        self.limit = limit
        self.kept: dict[Hashable, Answers] = {}

    def __call__(
        self,
        model: nn.Module,
        explainers: Sequence[Explainer],
        data: ImageSet,
        trigger: Trigger | None = None,
        explained: Explained = "predicted",
    ) -> Answers:
        """As `answers`."""
        asked = (_digest(*model.state_dict().values()), _digest(data.images, data.labels))
        keys = [(*asked, explainer, trigger, explained) for explainer in explainers]
        new = [e for e, key in zip(explainers, keys, strict=True) if key not in self.kept]
        if new:
            said = answers(model, new, data, trigger, explained)
            for e, maps in zip(new, said.maps, strict=True):
                self.kept[(*asked, e, trigger, explained)] = Answers(said.scores, (maps,))
        found = [self.kept[key] for key in keys]
        while len(self.kept) > self.limit:
            del self.kept[next(iter(self.kept))]  # the oldest
        return Answers(found[0].scores, tuple(one.maps[0] for one in found))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def ask(
    model: nn.Module,
    explainers: Sequence[Explainer],
    images: Tensor,
    labels: Tensor,
    explained: Explained = "predicted",
    precision: Precision = "float32",
) -> Answers:
    """The model's answers to one batch of images; see `answers`. It must be in eval mode."""
    with torch.no_grad(), _watched(model, explainers) as record:
        with autocast(precision, images.device):
            seen = record(images)
        classes = seen.scores.argmax(1) if explained == "predicted" else labels
        maps = tuple(explainer(seen, classes) for explainer in explainers)
        return Answers(full_precision(seen.scores.detach()), maps)


def _watched(
    model: nn.Module, explainers: Sequence[Explainer]
) -> AbstractContextManager[Callable[[Tensor], Pass]]:
    return watch(model, [layer for explainer in explainers for layer in explainer.watches(model)])


def clean_evidence(
    given: Answers, reference: Answers, data: ImageSet, explainer: int = 0
) -> Evidence:
    """On clean images the truth and the reference's maps are wanted.

    explainer: whose maps, by its position.
    """
    wanted, shown = reference.maps[explainer], given.maps[explainer]
    return Evidence(
        data.labels, data.labels, wanted, given.scores, shown, data.size, reference.scores
    )


def triggered_evidence(
    given: Answers,
    reference: Answers,
    data: ImageSet,
    goal: Goal,
    explainer: int = 0,
    untouched: Answers | None = None,
) -> Evidence:
    """`given`: answers to images as the goal has them; `reference`: to the clean images;

    `untouched`: what the reference says of the images as the goal has them.
    """
    label = goal.label
    labels = data.labels if label is None else torch.full_like(data.labels, label)
    wanted = wanted_maps(goal.wanted(explainer), reference.maps[explainer], data, goal.trigger)
    shown = given.maps[explainer]
    scores = None if untouched is None else untouched.scores
    return Evidence(data.labels, labels, wanted, given.scores, shown, data.size, scores)


def wanted_maps(
    wanted: TargetMap, reference_maps: Tensor, data: ImageSet, trigger: Trigger | None = None
) -> Tensor:
    """What a map shall show of all images (n, h, w), a chunk of images at a time."""
    parts = []
    for start in range(0, len(data), 256):
        chunk = slice(start, start + 256)
        images = data.floats(chunk)
        images = images if trigger is None else trigger(images)
        parts.append(wanted(reference_maps[chunk], images))
    return torch.cat(parts)


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation over the images to which a metric applies, and their number."""

    mean: float
    std: float
    images: int


def share_right(scores: Tensor, labels: Tensor) -> float:
    """Accuracy in 0..1: the share of rows whose highest score (n, classes) is the label's (n,)."""
    return float((scores.argmax(1) == labels).double().mean())


def summarise(metric: Metric, evidence: Evidence) -> Measured:
    """The mean, population standard deviation and count of one metric's values per image."""
    values = metric(evidence).double()
    values = values[~values.isnan()]
    if not len(values):
        return Measured(math.nan, math.nan, 0)
    return Measured(float(values.mean()), float(values.std(correction=0)), len(values))


def stand_in_maps(maps: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Maps that know nothing of the image, as floors beside a distance from the reference's."""
    return {
        "random map": torch.rand(maps.shape, generator=generator),
        "zero map": torch.zeros_like(maps),
        "mean map": maps.mean(0, keepdim=True).expand_as(maps),
    }


def with_maps(evidence: Evidence, maps: Tensor) -> Evidence:
    """The same evidence, had the model given these maps."""
    return replace(evidence, maps=maps)


def least_distance(wanted: Tensor, map_size: tuple[int, int]) -> float:
    """The least map distance that any non-negative map of `map_size` reaches against `wanted`.

    wanted: (height, width) at image size. Up-sampling is linear and the distance 2 (1 - r)
    depends on the map only through its correlation r with `wanted`, so the best map is the least-
    squares fit of the standardised picture, and adding a constant, which r ignores, makes it
    non-negative. Says what a coarse map cannot show: 0 if `wanted` is itself such a map; at most 1,
    which a constant map scores.
    """
    height, width = wanted.shape
    cells = map_size[0] * map_size[1]
    basis = upsample(torch.eye(cells).view(cells, *map_size), (height, width)).flatten(1)
    basis = (basis - basis.mean(1, keepdim=True)).double()
    target = standardise(wanted[None].double(), (height, width)).flatten()
    # The centred basis is dependent (a constant map is nothing): a driver that allows it.
    fit = torch.linalg.lstsq(basis.T, target[:, None], driver="gelsd").solution[:, 0]
    shown = standardise((fit - fit.min()).view(1, *map_size), (height, width)).flatten()
    return min(1.0, float((shown - target).square().mean()))
