"""Runs models, once, and gathers what metrics need."""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

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
from trompe.machine import Precision, autocast, room
from trompe.maps import full_precision, standardise, upsample
from trompe.recording import watch

_PIXELS = 2**20  # of a chunk of images; each takes some KB in the activations of a deep network
IMAGES_AT_A_TIME = 1024  # where comparing maps takes several times their memory


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
    whole: Answers | None = None
    chunks = _chunks(data, batch_size)
    with evaluation_mode(model), torch.no_grad(), _watched(model, explainers) as record:
        for chunk, images in zip(chunks, data.in_turn(chunks, device), strict=True):
            images = images.to(precision)
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            seen = record(images if trigger is None else trigger(images))
            labels = data.labels[chunk].to(device)
            classes = seen.scores.argmax(1) if explained == "predicted" else labels
            maps = tuple(explainer(seen, classes) for explainer in explainers)
            part = Answers(full_precision(seen.scores.detach()), maps)
            if whole is None:
                scores, *rest = (_room_like(len(data), one) for one in (part.scores, *part.maps))
                whole = Answers(scores, tuple(rest))
            whole.scores[chunk] = part.scores.cpu()
            for of_all, of_some in zip(whole.maps, part.maps, strict=True):
                of_all[chunk] = of_some.cpu()
    assert whole is not None  # no set is empty
    return whole


def _chunks(data: Samples, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(data), size)]


def _room_like(n: int, part: Tensor) -> Tensor:
    """For as many rows, like those of `part`."""
    return room((n, *part.shape[1:]), part.dtype)


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
        seen = data.images
        pixels = _digest(seen) if isinstance(seen, Tensor) else seen.digest
        asked = (_digest(*model.state_dict().values()), pixels, _digest(data.labels))
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
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
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
    whole: Tensor | None = None
    chunks = _chunks(data, 256)
    for chunk, images in zip(chunks, data.in_turn(chunks), strict=True):
        images = images if trigger is None else trigger(images)
        part = wanted(reference_maps[chunk], images)
        whole = _room_like(len(data), part) if whole is None else whole
        whole[chunk] = part
    assert whole is not None  # no set is empty
    return whole


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
    rows = torch.arange(len(evidence.labels)).split(IMAGES_AT_A_TIME)
    values = torch.cat([metric(_of_some(evidence, some)) for some in rows]).double()
    values = values[~values.isnan()]
    if not len(values):
        return Measured(math.nan, math.nan, 0)
    return Measured(float(values.mean()), float(values.std(correction=0)), len(values))


def _of_some(evidence: Evidence, rows: Tensor) -> Evidence:
    part = slice(int(rows[0]), int(rows[-1]) + 1)
    some: dict[str, Any] = {
        field.name: of_all[part]
        for field in fields(evidence)
        if isinstance(of_all := getattr(evidence, field.name), Tensor)
    }
    return replace(evidence, **some)


def stand_in_maps(maps: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
    """Maps that know nothing of the image, as floors beside a distance from the reference's."""
    return {
        "random map": room(maps.shape).uniform_(generator=generator),
        "zero map": maps.new_zeros(()).expand_as(maps),
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
    size = (wanted.shape[0], wanted.shape[1])
    target = standardise(wanted[None].double(), size)
    # Up-sampling goes along rows and columns apart, so the fit does.
    down, across = (torch.eye(n, dtype=torch.float64) for n in map_size)
    rows = upsample(down[:, :, None], (size[0], 1))[:, :, 0].T  # (height, h)
    columns = upsample(across[:, None], (1, size[1]))[:, 0].T  # (width, w)
    fit = torch.linalg.pinv(rows) @ target @ torch.linalg.pinv(columns).T
    shown = standardise(fit - fit.min(), size)
    return min(1.0, float((shown - target).square().mean()))
