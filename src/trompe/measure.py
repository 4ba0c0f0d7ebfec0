"""Numbers of a manipulated model: every metric under every condition, with floors beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trompe import catalog
from trompe.evaluate import (
    IMAGES_AT_A_TIME,
    Remembered,
    answers,
    clean_evidence,
    least_distance,
    share_right,
    stand_in_maps,
    summarise,
    triggered_evidence,
    with_maps,
)
from trompe.fooling import fooling
from trompe.interfaces import (
    Answers,
    Attacked,
    Evidence,
    Explained,
    Explainer,
    Goal,
    ImageSet,
    Metric,
)
from trompe.maps import squared_error, upsample
from trompe.target_maps.picture import Picture
from trompe.target_maps.reference import Reference
from trompe.visibility import Visibility, visibility

_LOOKED_AT = 256  # images, to say how visible a trigger is


@dataclass(frozen=True)
class Condition:
    """One row: clean images or those with one goal's trigger, as seen by one explainer."""

    name: str
    explainer: int
    goal: Goal | None  # None: clean images, of which nothing is wanted but the truth
    visible: Visibility | None  # the trigger; None: there is none
    evidence: Evidence
    untouched: Answers  # what the reference says of the same images
    witness: Answers  # what another clean model says


@dataclass(frozen=True)
class Measurement:
    """Numbers for numbers.json, evidence per condition for evidence.safetensors, and answers."""

    numbers: dict[str, Any]
    evidence: dict[str, Tensor]
    conditions: tuple[Condition, ...]


def measure(
    reference: nn.Module,
    witness: nn.Module,
    attacked: Attacked,
    explainers: Sequence[Explainer],
    data: ImageSet,
    seed: int,
    explained: Explained = "predicted",
    thresholds: Sequence[float | None] | None = None,
    remembered: Remembered | None = None,
) -> Measurement:
    """All metrics on `data`: on clean images, then with each goal's trigger; floors beside them.

    Conditions of the first explainer come first. thresholds: one tau per explainer (or None) asks
    for fooling rates as well (see fooling.py). remembered: what the clean models have said already.
    """
    ask_clean = remembered or Remembered()
    metric = {name: catalog.find("metrics", name) for name in catalog.names("metrics")}
    honest = ask_clean(reference, explainers, data, None, explained)
    seen = []
    for name, goal in _conditions(attacked.goals):
        trigger = None if goal is None else goal.trigger
        given = answers(attacked.model, explainers, data, trigger, explained)
        other, untouched = (
            ask_clean(model, explainers, data, trigger, explained) for model in (witness, reference)
        )
        seen.append((name, goal, given, untouched, other))
    how_visible = {name: _visible(goal, data) for name, goal, *_ in seen}
    conditions = []
    for e, of_explainer in enumerate(explainer_names(explainers)):
        for name, goal, given, untouched, other in seen:
            if goal is None:
                evidence = clean_evidence(given, honest, data, e)
            else:
                evidence = triggered_evidence(given, honest, data, goal, e, untouched)
            full = name if len(explainers) == 1 else f"{name} {of_explainer}"
            visible = how_visible[name]
            conditions.append(Condition(full, e, goal, visible, evidence, untouched, other))
    stand_ins = [stand_in_maps(maps, torch.Generator().manual_seed(seed)) for maps in honest.maps]
    numbers: dict[str, Any] = {
        "reference_accuracy": share_right(honest.scores, data.labels),
        "target_class_names": list(data.class_names),
        "conditions": [
            _row(c, explainer_names(explainers)[c.explainer], metric, stand_ins[c.explainer])
            for c in conditions
        ],
    }
    kept: dict[str, Tensor] = {"labels": data.labels}
    if thresholds is not None:
        numbers["fooling"] = []
        names = explainer_names(explainers)
        for e, (name, tau) in enumerate(zip(names, thresholds, strict=True)):
            losses = _lie_losses(conditions, e)
            rates = fooling(**losses, tau=tau)
            numbers["fooling"].append({"explainer": name, **asdict(rates)})
            kept |= {f"{name}.{whose}.lie_loss": values for whose, values in losses.items()}
    for c in conditions:
        kept[f"{c.name}.maps"] = c.evidence.maps
        if c.explainer == 0:  # the others' are the same
            kept[f"{c.name}.scores"] = c.evidence.scores
        if c.goal is None or c.goal.trigger is None:  # once per explainer, with its clean images
            kept[f"{c.name}.reference_maps"] = honest.maps[c.explainer]
    return Measurement(numbers, kept, tuple(conditions))


def explainer_names(explainers: Sequence[Explainer]) -> list[str]:
    """Names by which their rows are told apart."""
    kinds = [getattr(e, "name", None) or str(catalog.describe(e).get("kind")) for e in explainers]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}-{kinds[: i + 1].count(kind)}"
        for i, kind in enumerate(kinds)
    ]


def _conditions(goals: tuple[Goal, ...]) -> list[tuple[str, Goal | None]]:
    """Clean images first, with the goal that has no trigger if there is one; then the triggers."""
    without = next((goal for goal in goals if goal.trigger is None), None)
    triggered = [goal for goal in goals if goal.trigger is not None]
    names = ["triggered"] if len(triggered) == 1 else map("triggered {}".format, range(1, 99))
    return [("clean", without), *zip(names, triggered, strict=False)]


def _visible(goal: Goal | None, data: ImageSet) -> Visibility | None:
    """The goal's trigger, on some of the images."""
    if goal is None or goal.trigger is None:
        return None
    images = data.floats(torch.arange(0, len(data), -(-len(data) // _LOOKED_AT)))
    return visibility(goal.stamp(images), images)


def _row(
    condition: Condition, explainer: str, metrics: Mapping[str, Metric], known: Mapping[str, Tensor]
) -> dict[str, Any]:
    goal, evidence, e = condition.goal, condition.evidence, condition.explainer
    stand_ins = {**known, "another clean model": condition.witness.maps[e]}
    if goal is not None:
        stand_ins["the reference itself"] = condition.untouched.maps[e]
    return {
        "name": condition.name,
        "explainer": explainer,
        "goal": "" if goal is None else goal.name,
        "trigger": None if condition.visible is None else asdict(condition.visible),
        "target_class": None if goal is None else goal.label,
        "metrics": {
            name: asdict(summarise(metric, evidence))
            for name, metric in metrics.items()
            if not (name == "attack_success" and (goal is None or goal.label is None))
        },
        "floors": {
            name: asdict(summarise(metrics["map_distance"], with_maps(evidence, maps)))
            for name, maps in stand_ins.items()
        },
        "reference_accuracy": share_right(condition.untouched.scores, evidence.labels),
        **({} if goal is None else _target_floors(goal.wanted(e), evidence)),
    }


def _target_floors(wanted_map: Any, evidence: Evidence) -> dict[str, float]:
    """The least distance that a map of this size can have from the wanted one.

    Only where the wanted map is the same for all images; a reference's own map can be met exactly.
    """
    wanted = evidence.wanted_maps
    if not bool((wanted == wanted[:1]).all()):
        return {"target_floor_mse": 0.0}
    size = (wanted.shape[1], wanted.shape[2])
    drawn = upsample(wanted[:1], evidence.image_size)[0]
    floors = {"target_floor_mse": least_distance(drawn, size)}
    if isinstance(wanted_map, Picture):  # what the picture would score if drawn sharply
        sharp = wanted_map.draw(*evidence.image_size)
        floors["sharp_target_floor_mse"] = least_distance(sharp, size)
    return floors


def _lie_losses(conditions: Sequence[Condition], e: int) -> dict[str, Tensor]:
    """L_p (n,) of explainer `e`: `lied` where the lie is wanted and `kept` where the truth is;

    where the lie is wanted, also of the reference, another clean model, and empty maps.
    """
    own = [c for c in conditions if c.explainer == e]
    lied = next(c for c in own if c.goal and not isinstance(c.goal.wanted(e), Reference))
    kept = next(c for c in own if c is not lied)
    lie = lied.evidence.wanted_maps
    maps = {
        "lied": lied.evidence.maps,
        "kept": kept.evidence.maps,
        "reference": lied.untouched.maps[e],
        "witness": lied.witness.maps[e],
        "empty": lie.new_zeros(()).expand_as(lie),
    }
    return {whose: _errors(shown, lie) for whose, shown in maps.items()}


def _errors(maps: Tensor, wanted: Tensor) -> Tensor:
    """`squared_error`, of some images at a time: it takes several times the maps' memory."""
    parts = zip(maps.split(IMAGES_AT_A_TIME), wanted.split(IMAGES_AT_A_TIME), strict=True)
    return torch.cat([squared_error(*part) for part in parts])


def gallery(measured: Measurement, data: ImageSet, count: int, seed: int) -> dict[str, Tensor]:
    """A few images of different classes: per condition the images, maps and predictions."""
    chosen = _different_classes(data.labels, count, seed)
    tensors = {"labels": data.labels[chosen]}
    images = data.floats(chosen)
    for c in measured.conditions:
        shown = images if c.goal is None else c.goal.stamp(images)
        tensors |= {
            f"{c.name}.images": (shown * 255).round().to(torch.uint8),
            f"{c.name}.reference_maps": c.untouched.maps[c.explainer][chosen],
            f"{c.name}.wanted_maps": c.evidence.wanted_maps[chosen],
            f"{c.name}.maps": c.evidence.maps[chosen],
            f"{c.name}.reference_predicted": c.untouched.scores[chosen].argmax(1),
            f"{c.name}.predicted": c.evidence.scores[chosen].argmax(1),
            f"{c.name}.wanted_labels": c.evidence.wanted_labels[chosen],
        }
    return tensors


def _different_classes(labels: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first_of_class = {int(labels[i]): int(i) for i in reversed(order.tolist())}
    in_order = [i for i in order.tolist() if first_of_class[int(labels[i])] == i]
    rest = [i for i in order.tolist() if i not in set(in_order)]
    return torch.tensor((in_order + rest)[:count])
