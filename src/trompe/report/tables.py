"""The report's tables: rows of finished text."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trompe.report.reading import Condition, Run, Value, l1_per_position, lies_on_every_image

# Titles for names that are written for code; any other name is shown as it is.
TITLES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Accuracy, top 5",
    "attack_success": "Attack success rate",
    "map_distance": "Map distance (MSE)",
    "map_l1": "Map distance (L1, sum)",
    "score_change": "Change of scores (max)",
    "degenerate_map": "Empty maps",
    "clean_accuracy": "accuracy, clean",
    "clean_mse": "map distance, clean",
    "triggered_success": "Acc/ASR, triggered",
    "triggered_mse": "map distance, triggered",
    "triggered_accuracy": "accuracy, triggered",
    "fsr": "FSR",
    "cr": "CR",
    "lie_loss": "L_p",
}
NOTHING = "—"  # in a cell that has no value
OTHER_CLEAN_MODEL = "another clean model"


def title(name: str) -> str:
    return TITLES.get(name, name)


def number(value: float | None) -> str:
    """Three decimals, four for a value that would vanish; a dash for none or nan."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.4f}" if 0.00005 <= abs(value) < 0.0005 else f"{value:.3f}"


def spread(mean: float, std: float) -> str:
    return number(mean) if math.isnan(std) else f"{number(mean)} ± {number(std)}"


def percent(value: float) -> str:
    return (
        NOTHING if math.isnan(value) else f"{100 * value:.1f}\u202f%"
    )  # not torn apart at a line's end


def headline(condition: Condition) -> str:
    """The metric that says whether predictions under the trigger are as the adversary wants."""
    return "accuracy" if condition.target is None else "attack_success"


@dataclass(frozen=True)
class Row:
    """A row of the main table. seed is "" in a row over seeds."""

    experiment: str
    goal: str
    seed: str
    reference: str
    clean_accuracy: str
    clean_distance: str
    clean_floor: str  # distance of another clean model
    clean_l1: str  # "" where the reference's maps are wanted
    success_kind: str  # "ASR", "Acc", or "" without a trigger
    success: str
    distance: str
    floor: str
    trigger: str = ""  # how visible it is
    over_seeds: bool = False


def main_rows(runs: Sequence[Run]) -> list[Row]:
    """One row per run and trigger, and after the seeds of one experiment a row over them."""
    rows = []
    for family in families(runs):
        for run in family:
            rows += [
                _row([run], [condition], labels(runs)) for condition in run.triggered or [None]
            ]
        if len(family) > 1:
            rows += _rows_over_seeds(family, labels(runs))
    return rows


Labels = dict[tuple[Path, str], str]  # by run folder and explainer


def labels(runs: Sequence[Run]) -> Labels:
    """Per run folder and explainer the experiment's name, or the folder's where some share one."""
    names = [family[0].name for family in families(runs)]

    def label(run: Run) -> str:
        if names.count(run.name) == 1:
            return run.name
        return run.path.name + ("" if run.alone else f" · {run.explainer}")

    return {(run.path, run.explainer): label(run) for run in runs}


def families(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but seeds belong together; in order of appearance."""
    found: list[tuple[Any, list[Run]]] = []
    for run in runs:
        settings = run.settings()
        known = next((members for other, members in found if other == settings), None)
        if known is None:
            found.append((settings, [run]))
        else:
            known.append(run)
    return [members for _, members in found]


def _rows_over_seeds(family: list[Run], names: Labels) -> list[Row]:
    if not family[0].triggered:
        return [_row(family, [None] * len(family), names)]
    same = zip(*(run.triggered for run in family), strict=False)
    return [_row(family, list(conditions), names) for conditions in same]


def _row(runs: list[Run], conditions: Sequence[Condition | None], names: Labels) -> Row:
    """One row from one run, or from the means of several."""
    clean = [run.clean for run in runs]
    there = [condition for condition in conditions if condition is not None]
    metric = headline(there[0]) if there else ""
    kind = {"accuracy": "Acc", "attack_success": "ASR", "": ""}[metric]
    return Row(
        names[runs[0].path, runs[0].explainer],
        there[0].goal if there else clean[0].goal,
        str(runs[0].seed) if len(runs) == 1 else f"{len(runs)} seeds",
        _share([c.reference_accuracy for c in clean]),
        _share([c.metrics["accuracy"].mean for c in clean]),
        _distance(clean),
        _floor(clean),
        _l1(runs),
        kind,
        _share([c.metrics[metric].mean for c in there]) if there else NOTHING,
        _distance(there) if there else NOTHING,
        _floor(there) if there else "",
        str(there[0].trigger) if there and there[0].trigger else "",
        len(runs) > 1,
    )


def _share(values: list[float]) -> str:
    """A share; over several runs its mean and sample standard deviation."""
    if len(values) == 1 or any(map(math.isnan, values)):
        return number(statistics.fmean(values))
    return spread(statistics.fmean(values), statistics.stdev(values))


def _distance(conditions: list[Condition]) -> str:
    """Mean ± std over one run's images, or over the means of several runs."""
    values = [condition.metrics["map_distance"] for condition in conditions]
    return spread(*values[0]) if len(values) == 1 else _share([value.mean for value in values])


def _floor(conditions: list[Condition]) -> str:
    values = [c.floors[OTHER_CLEAN_MODEL].mean for c in conditions if OTHER_CLEAN_MODEL in c.floors]
    return number(statistics.fmean(values)) if values else ""


def _l1(runs: list[Run]) -> str:
    """Where every image is lied about: a flat map has no other distance that means anything."""
    values = [l1_per_position(run, run.clean) for run in runs if lies_on_every_image(run)]
    known = [value for value in values if value is not None]
    return number(statistics.fmean(known)) if known else ""


class Grid(NamedTuple):
    """A table: its header and, per row, the run, its seed, the condition, then the cells."""

    header: list[str]
    rows: list[list[str]]


def floor_grid(runs: Sequence[Run]) -> Grid:
    """What the measured map distance is to be compared with."""
    every = [condition for run in runs for condition in run.conditions]
    stand_ins = list(dict.fromkeys(name for condition in every for name in condition.floors))
    header = ["measured", *stand_ins, "target floor", "sharp target floor", "empty maps"]
    rows = [
        [*whose, *_floor_cells(condition, stand_ins)] for whose, condition in _every_condition(runs)
    ]
    return Grid(header, rows)


def _floor_cells(condition: Condition, stand_ins: list[str]) -> list[str]:
    def value(name: str) -> str:
        return number(condition.floors[name].mean) if name in condition.floors else NOTHING

    empty = condition.metrics.get("degenerate_map")
    return [
        number(condition.metrics["map_distance"].mean),
        *(value(name) for name in stand_ins),
        number(condition.target_floor),
        number(condition.sharp_target_floor),
        NOTHING if empty is None else percent(empty.mean),
    ]


def metric_grid(runs: Sequence[Run]) -> Grid:
    """Every metric that was measured, mean ± std over images."""
    found = _every_condition(runs)
    names = list(dict.fromkeys(name for _, condition in found for name in condition.metrics))
    none = Value(math.nan)
    rows = [[*whose, *(spread(*c.metrics.get(name, none)) for name in names)] for whose, c in found]
    return Grid([title(name) for name in names], rows)


def fooling_grid(runs: Sequence[Run]) -> Grid | None:
    """Fooling and correct rates, where they were measured."""
    header = ["tau", "FSR", "CR", "tau, data", "FSR", "CR", "area", "L_p", "empty map", "reference"]
    names = labels(runs)
    rows = []
    for run in runs:
        if (rates := run.fooling) is not None:
            cells = [number(rates.tau), _rate(rates.fsr), _rate(rates.cr)]
            cells += [number(rates.data_tau), _rate(rates.data_fsr), _rate(rates.data_cr)]
            cells += [number(rates.fsr_area), number(rates.mean_loss)]
            cells += [number(rates.zero_loss), number(rates.reference_loss)]
            where = "lie without trigger" if run.inverted else "lie with trigger"
            rows.append([names[run.path, run.explainer], str(run.seed), where, *cells])
    return Grid(header, rows) if rows else None


def _rate(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _every_condition(runs: Sequence[Run]) -> list[tuple[list[str], Condition]]:
    """Experiment, seed and images in words, and the condition."""
    names = labels(runs)
    found = []
    for run in runs:
        for c in run.conditions:
            goal = f" ({c.goal})" if c.goal and len(run.triggered) > 1 else ""
            found.append(([names[run.path, run.explainer], str(run.seed), f"{c.name}{goal}"], c))
    return found
