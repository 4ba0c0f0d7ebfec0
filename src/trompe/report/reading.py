"""What the report knows of a run: its folder's files, checked and in one object."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trompe.files import real
from trompe.fooling import Fooling
from trompe.interfaces import EpochRecord, InputError
from trompe.maps import standardise
from trompe.run_shapes import AttackNumbers, Difference, Provenance, Spec
from trompe.runs import RunFolder
from trompe.visibility import Visibility

_CHUNK = 256  # maps that are brought to image size at once


class Value(NamedTuple):
    """A metric over the images to which it applies; nan where it applies to none."""

    mean: float
    std: float = math.nan


@dataclass(frozen=True)
class Condition:
    """One row of numbers: clean images, or images with one goal's trigger."""

    name: str  # "clean", "triggered", "triggered 2"
    explainer: str  # whose maps
    goal: str  # the goal's own name, "" for none or a nameless one
    trigger: Visibility | None  # None: there is none, or it was not measured
    target: str | None  # the class that the adversary wants
    metrics: dict[str, Value]
    floors: dict[str, Value]  # map distance of stand-ins for the manipulated model
    reference_accuracy: float
    target_floor: float | None  # the least distance that a map of this size can have
    sharp_target_floor: float | None


class Shown(NamedTuple):
    """The gallery's n images under one condition."""

    images: Tensor  # uint8 (n, 3, height, width), with the trigger if there is one
    reference_maps: Tensor  # (n, h, w)
    wanted_maps: Tensor  # (n, h, w)
    maps: Tensor  # (n, h, w): the manipulated model's
    reference_predicted: Tensor  # int64 (n,)
    predicted: Tensor  # int64 (n,)
    wanted_labels: Tensor  # int64 (n,)


class Change(NamedTuple):
    """A module that the attack added, removed or changed; before and after: in words, or None."""

    name: str
    change: str  # "added", "removed" or "changed"
    before: str | None
    after: str | None


class Moment(NamedTuple):
    """A few images that are lied about, after an epoch."""

    epoch: int
    images: Tensor  # uint8 (n, 3, height, width)
    true_maps: Tensor  # (n, h, w): the reference's
    maps: Tensor  # (n, h, w)
    losses: Tensor  # (n,): L_p


@dataclass(frozen=True)
class Run:
    """A finished run, as one explainer sees it."""

    path: Path
    explainer: str
    alone: bool  # no other explainer was measured
    spec: dict[str, Any]
    inputs: dict[str, str]  # what the data and weights held
    provenance: dict[str, Any]
    history: tuple[EpochRecord, ...]  # what was measured of other explainers is left out
    facts: dict[str, Any]  # what numbers.json says besides the conditions
    classes: list[str]
    labels: Tensor  # int64 (n,), of the gallery's images
    clean: Condition
    triggered: tuple[Condition, ...]
    shown: dict[str, Shown]  # by condition name
    fooling: Fooling | None
    timeline: tuple[Moment, ...]  # after each epoch, empty if none was kept
    architecture: tuple[Change, ...] | None  # None: the run does not say what was changed
    evidence: dict[str, Tensor] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.spec["name"]) + ("" if self.alone else f" · {self.explainer}")

    @property
    def inverted(self) -> bool:
        """Is the lie told without the trigger?"""
        return bool(self.spec["attack"].get("inverted", False))

    @property
    def seed(self) -> int:
        return int(self.spec["seed"])

    @property
    def goals(self) -> str:
        """The goals' names, the experiment's if they have none."""
        lied = self.triggered or (self.clean,)
        return " + ".join(c.goal for c in lied if c.goal) or self.name

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (self.clean, *self.triggered)

    def settings(self) -> dict[str, Any]:
        """The spec without its seeds, and the inputs: equal for runs that differ in seeds alone."""
        settings: dict[str, Any] = _seedless(self.spec)
        return {**settings, "explainer seen": self.explainer, "inputs": self.inputs}


def load_all(folders: Sequence[RunFolder]) -> list[Run]:
    """Several runs, each once. Raises InputError as `load` does, and if there is none."""
    if not folders:
        raise InputError("report: there is no run to report on; name at least one run folder")
    return [seen for folder in dict.fromkeys(folders) for seen in load(folder)]


def load(folder: RunFolder) -> list[Run]:
    """A run's files, once per explainer that was measured.

    Raises InputError if one is missing, damaged, or lacks what the report needs.
    """
    poisons = (folder.path / "victims.json").is_file()
    # First: without it the run has not finished.
    numbers = folder.read("numbers", dict[str, Any] if poisons else AttackNumbers)
    if poisons:
        raise InputError(
            f"run folder {folder.path}: holds poisons, which lie to nobody yet; "
            f"`trompe victim {folder.path}` trains victims on them and draws their maps"
        )
    spec, made = folder.read("spec", Spec), folder.read("provenance", Provenance)
    classes = folder.read("classes", list[str])
    gallery, evidence = folder.read_tensors("gallery"), folder.read_tensors("evidence")
    try:
        history = folder.read_history()
        every = [_condition(row, classes) for row in numbers["conditions"]]
        facts = {k: v for k, v in numbers.items() if k not in ("conditions", "fooling")}
        rates = {row["explainer"]: _fooling(row) for row in numbers.get("fooling") or []}
        explainers = list(dict.fromkeys(condition.explainer for condition in every))
        runs: list[Run] = []
        for number, explainer in enumerate(explainers, start=1):
            conditions = tuple(c for c in every if c.explainer == explainer)
            shown = {
                c.name: Shown(*(gallery[f"{c.name}.{f}"] for f in Shown._fields))
                for c in conditions
            }
            runs.append(
                Run(
                    folder.path,
                    explainer,
                    len(explainers) == 1,
                    spec,
                    folder.inputs,
                    made,
                    _of_system(history, number, len(explainers)),
                    facts,
                    classes,
                    gallery["labels"],
                    conditions[0],
                    conditions[1:],
                    shown,
                    rates.get(explainer),
                    _timeline(folder, history, number),
                    _architecture(folder),
                    evidence,
                )
            )
        _ = runs[0].name, runs[0].seed, runs[0].inverted
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"run folder {folder.path}: does not hold what a report needs ({error!r}); it was "
            "written by another version: measure it again with this one, or run it again"
        ) from error
    return runs


def _of_system(
    history: Sequence[EpochRecord], number: int, systems: int
) -> tuple[EpochRecord, ...]:
    """What was measured of all systems, and of this one: "fsr" for the second's "fsr_2".

    Numbered names that are not there once for each of several systems stay as they are.
    """

    def own(measured: dict[str, float]) -> dict[str, float]:
        kept = {}
        for name, value in measured.items():
            word, _, end = name.rpartition("_")
            if systems > 1 and all(f"{word}_{k}" in measured for k in range(1, systems + 1)):
                if end == str(number):
                    kept[word] = value
            else:
                kept[name] = value
        return kept

    return tuple(record._replace(measured=own(record.measured)) for record in history)


def _timeline(folder: RunFolder, history: Sequence[EpochRecord], number: int) -> tuple[Moment, ...]:
    if not (folder.path / "timeline.safetensors").is_file():
        return ()
    kept = folder.read_tensors("timeline")
    fields = ("true_maps", "maps", "losses")
    return tuple(
        Moment(
            record.epoch,
            kept[f"{record.epoch}.images"],
            *(kept[f"{record.epoch}.{number}.{field}"] for field in fields),
        )
        for record in history
    )


def _architecture(folder: RunFolder) -> tuple[Change, ...] | None:
    if not (folder.path / "architecture.json").is_file():
        return None
    return tuple(Change(**row) for row in folder.read("architecture", list[Difference]))


def _condition(row: dict[str, Any], classes: list[str]) -> Condition:
    target = row["target_class"]
    return Condition(
        row["name"],
        row["explainer"],
        row.get("goal", ""),
        None if row.get("trigger") is None else Visibility.read(row["trigger"]),
        None if target is None else classes[target],
        _values(row["metrics"]),
        _values(row["floors"]),
        real(row["reference_accuracy"]),
        row.get("target_floor_mse"),
        row.get("sharp_target_floor_mse"),
    )


def _values(table: dict[str, Any]) -> dict[str, Value]:
    return {key: Value(real(v["mean"]), real(v["std"])) for key, v in table.items()}


def _fooling(row: dict[str, Any]) -> Fooling:
    """tau, fsr and cr are None where no threshold was given; the others are numbers, or nan."""
    given = {f.name: row[f.name] for f in fields(Fooling)}
    optional = ("tau", "fsr", "cr")
    return Fooling(**{k: v if k in optional else real(v) for k, v in given.items()})


def _seedless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _seedless(inner)
            for key, inner in value.items()
            if key != "seed" and not key.endswith("_seed")
        }
    return [_seedless(inner) for inner in value] if isinstance(value, list) else value


def wants_reference(run: Run, condition: Condition) -> bool:
    """Is the wanted map the one that the reference gives the clean image?"""
    wanted, clean = run.shown[condition.name].wanted_maps, run.shown[run.clean.name].reference_maps
    return torch.equal(wanted, clean)


def lies_on_every_image(run: Run) -> bool:
    """Is no trigger needed for the lie?"""
    return not run.triggered and not wants_reference(run, run.clean)


def l1_per_position(run: Run, condition: Condition) -> float | None:
    """The mean L1 distance of the maps, in 0..1, or None if it was not measured."""
    measured = condition.metrics.get("map_l1", Value(math.nan)).mean
    positions = run.shown[condition.name].wanted_maps[0].numel()
    return None if math.isnan(measured) else measured / positions


def is_flat(maps: Tensor) -> bool:
    """Does each map (n, h, w), or the one map (h, w), have one value at all its positions?"""
    return bool((maps.amax((-2, -1)) == maps.amin((-2, -1))).all())


def distances(run: Run, condition: Condition) -> Tensor | None:
    """Map distance (n,) of every measured image, or None if the wanted maps are not known.

    They are known where all images want the same map, or each the reference's own.
    """
    wanted = run.shown[condition.name].wanted_maps
    given = run.evidence[f"{condition.name}.maps"]
    if wants_reference(run, condition):
        wanted = run.evidence[f"{run.clean.name}.reference_maps"]
    elif bool((wanted == wanted[:1]).all()):
        wanted = wanted[:1].expand_as(given)
    else:
        return None
    height, width = run.shown[condition.name].images.shape[2:]
    values = torch.cat(list(_chunks(given, wanted, (height, width))))
    # The gallery alone cannot prove which maps were wanted; the measured mean can.
    measured = condition.metrics["map_distance"].mean
    return values if math.isclose(float(values.mean()), measured, abs_tol=1e-3) else None


def _chunks(given: Tensor, wanted: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    for one, other in zip(given.split(_CHUNK), wanted.split(_CHUNK), strict=True):
        yield (standardise(one, size) - standardise(other, size)).square().mean((1, 2))
