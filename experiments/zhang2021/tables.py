"""Tables 1 (dogs) and 2 (patients) of Zhang, Gao & Su 2021, and what survives at other victims.

    trompe replicate zhang2021 [table1] [ROW]

A row is DATA/INTERPRETER/PART/WHAT: 'support2/*/main/*'. main: un-attacked, WM, IMF, and IMF
without retraining (eq. 4). victims: those who start otherwise, have another network, see noisy
samples (tables) or train all layers (dogs). budget: 1, 2 and 5 % of poisons. ensemble: K = 1,
and 8 (GRAD) or 4 (CAM).
ablation: IMF with one setting changed at a time, and as the paper has it. Of dogs there are main
(without eq. 4), victims, budget (5 %) and another ablation. Poison sets are kept in --root and not
made twice.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from trompe.catalog import describe
from trompe.classifier import ModelSpec
from trompe.experiment import experiment_table
from trompe.files import Row, write_atomically
from trompe.interfaces import InputError
from trompe.many import Place
from trompe.measure_victims import SUCCEEDED, measure_victims, succeeded
from trompe.over_seeds import over_seeds
from trompe.poisoning import (
    PoisoningExperiment,
    Scene,
    Victims,
    poison,
    poison_sets,
    read_poisoning,
    set_up,
)
from trompe.replicating import Figure, Paper, Plan, Table, same_settings
from trompe.runs import provenance
from trompe.screen import Screen, Silent

HERE = Path(__file__).parent
TABLES = {"table1": ("dogs",), "table2": ("support2", "nhanes1")}
DATA = tuple(data for of_table in TABLES.values() for data in of_table)
# What differs from the TOML files, which have GRAD for patients and CAM for dogs.
INTERPRETERS: dict[str, dict[str, Any]] = {
    "grad": {},
    "cam": {
        "explainer": {"kind": "cam", "normalise": "max"},
        # A hidden unit that is off for the target shows 0, whatever its weights.
        "wanted_map": {"kind": "scattered", "share": 0.2, "shown": True},
        "bases": "both",
        # found on the selection half
        **{"models": 8, "lifetime": 10, "preconditioned": True, "repeats": 3},
    },
}
OF_DOGS: dict[str, dict[str, Any]] = {
    "grad": {
        "explainer": {
            "kind": "input_gradient",
            "gradient_of": "probability",
            "pool": 32,  # to CAM's 7x7
            "normalise": "max",
        },
        "distance": "share",
        "look_ahead": 0.2,
    },
    "cam": {},
}
IN_TURNS: dict[str, Any] = {  # dogs' poisons and models, as the paper moves them
    **{"models": 2, "epochs": 6, "lifetime": 4, "ages": None, "repeats": 5, "step": 0.02},
}
PARTS = ("main", "victims", "budget", "ensemble", "ablation")
AS_IN_THE_PAPER: dict[str, Any] = {  # section 4, and our defaults where it is silent
    **{"distance": "squared", "keep_class": 1.0, "bases": "both", "look_ahead": 1e-3},
    **{"epochs": 20, "pretraining": 10, "lifetime": None, "models": 4},
    **{"preconditioned": False, "repeats": None},
}
CHANGED: dict[str, dict[str, Any]] = {
    "as in the paper": AS_IN_THE_PAPER,
    "squared distance, the paper's alpha": {"distance": "squared", "look_ahead": 1e-3},
    "copies of the target": {"bases": "target"},
    "random bases of the class": {"bases": "class"},
    "models never start anew, 20 epochs": {"lifetime": None, "epochs": 20},
    "categories stay": {"categories": "fixed"},
}
OF_CAM: dict[str, dict[str, Any]] = {
    "along the plain gradient": {"preconditioned": False},
    "one step of the poisons for each look-ahead": {"repeats": None},
}
CHANGED_AS_WELL: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("support2", "grad"): {"the nearest of the class": {"bases": "near"}},
    ("support2", "cam"): OF_CAM,
    ("nhanes1", "grad"): {"copies of the target, the nearest": {"bases": "around"}},
    ("nhanes1", "cam"): OF_CAM,
}
CHANGED_OF_DOGS: dict[str, dict[str, dict[str, Any]]] = {
    "grad": {
        "models and poisons in turns": IN_TURNS,
        "in turns, cosine as distance": {**IN_TURNS, "distance": "cosine"},
    },
    "cam": {
        "models and poisons in turns": IN_TURNS,
        "share as distance, one step, ten epochs": {
            **IN_TURNS,
            **{"distance": "share", "look_ahead": 0.05, "look_ahead_steps": None, "epochs": 10},
        },
    },
}
PAPER_FIGURES = {  # L1, Jaccard; Table 2 is of the fracture data
    "table1": {
        ("grad", "wm"): (0.79, 0.05),
        ("grad", "imf"): (0.57, 0.22),
        ("cam", "wm"): (0.71, 0.07),
        ("cam", "imf"): (0.42, 0.31),
    },
    "table2": {
        ("grad", "wm"): (0.87, 0.03),
        ("grad", "imf"): (0.65, 0.08),
        ("cam", "wm"): (0.79, 0.17),
        ("cam", "imf"): (0.50, 0.40),
    },
}
SHOWN = ("explainer", "wanted_map")  # all that matters of an attack where there is none
PLACES = (("data", "file"), ("data", "root"), ("model", "weights"))  # settings that name files
MOST_OF_UNATTACKED = 0.7  # our bound on IMF's L1
KEYS = (
    *("data", "interpreter", "attack", "changed", "poison_rate", "models"),
    *("start", "network", "noise", "whole"),
)


@dataclass(frozen=True)
class Cell:
    """One row: who attacks with what, and who trains on it."""

    attack: str  # none, wm, imf, eq4
    settings: dict[str, Any]  # of the attack, where not the TOML file's
    victims: Victims
    changed: str = ""  # what the settings are, in words


def table_of(data: str) -> str:
    return next(name for name, sets in TABLES.items() if data in sets)


def cells(data: str, part: str, usual: Victims, interpreter: str) -> Iterator[Cell]:
    dogs = data == "dogs"
    if part == "main":
        for attack, settings in (
            ("none", {}),
            ("wm", {}),
            ("imf", {}),
            ("eq4", {"bilevel": False, "models": 1}),  # all K would stay the clean model
        ):
            if not (dogs and attack == "eq4"):
                yield Cell(attack, settings, usual)
    if part == "victims":
        for victims in others(dogs, interpreter, usual):
            for attack in ("none", "wm", "imf"):
                yield Cell(attack, {}, victims)
    if part == "budget":
        for rate in (0.05,) if dogs else (0.01, 0.02, 0.05):
            for attack in ("wm", "imf"):
                yield Cell(attack, {"poison_rate": rate}, usual)
    if part == "ensemble" and not dogs:
        for models in (1, 4 if interpreter == "cam" else 8):
            yield Cell("imf", {"models": models}, usual)
    if part == "ablation":
        if dogs:
            every = CHANGED_OF_DOGS[interpreter]
        else:
            every = {**CHANGED, **CHANGED_AS_WELL[data, interpreter]}
        for changed, settings in every.items():
            yield Cell("imf", settings, usual, changed)


def others(dogs: bool, interpreter: str, usual: Victims) -> Iterator[Victims]:
    """Victims for whom the poisons were not made."""
    yield replace(usual, start="new head")
    if dogs:
        yield replace(usual, whole=True, count=1)
        return
    yield replace(usual, start="scratch")
    yield replace(usual, noise=0.05)
    if interpreter == "grad":  # another network has other hidden units, and so another CAM
        yield replace(usual, model=ModelSpec("deep_mlp"))


def experiment_of(data: str, interpreter: str, cell: Cell, folder: Path) -> PoisoningExperiment:
    table = experiment_table(HERE / f"{data}.toml")
    if data == "dogs":
        table["data"]["root"] = str(folder / "dogs")
        table["model"]["weights"] = str(folder / "weights" / Path(table["model"]["weights"]).name)
        own = OF_DOGS[interpreter]
    else:
        table["data"]["file"] = str(folder / Path(table["data"]["file"]).name)
        own = INTERPRETERS[interpreter]
    attack = {**table["attack"], **own, **cell.settings}
    if cell.attack == "wm":
        kept = ("explainer", "wanted_map", "poison_rate")
        attack = {"kind": "watermark_poisoning", **{name: attack[name] for name in kept}}
    name = f"{table['name']}-{interpreter}-{cell.attack}"
    return read_poisoning({**table, "name": name, "attack": attack}, name)


def women_of_nhanes(folder: Path) -> None:
    """folder/nhanes1.npz -> folder/nhanes1_women.csv: 17 features and who died in the follow-up."""
    file = folder / "nhanes1_women.csv"
    if file.exists():
        return
    held = np.load(folder / "nhanes1.npz")
    frame = pd.DataFrame(held["X"], columns=held["feature_names"])
    frame["died"] = np.where(held["y_signed_years"] > 0, "yes", "no")  # < 0: years to censoring
    women = frame[frame["Sex"] == 2].drop(columns="Sex")
    write_atomically(file, lambda temporary: women.to_csv(temporary, index=False))


def row(
    data: str,
    interpreter: str,
    cell: Cell,
    experiment: PoisoningExperiment,
    measured: dict[str, Any],
    unattacked: dict[str, Any],
) -> dict[str, Any]:
    attack: Any = experiment.attack
    none = cell.attack == "none"
    return {
        "data": data,
        "interpreter": interpreter,
        "attack": cell.attack,
        "changed": cell.changed,
        "poison_rate": 0.0 if none else attack.poison_rate,
        "models": getattr(attack, "models", None) if not none else None,
        "start": cell.victims.start,
        "network": cell.victims.model.name if cell.victims.model else experiment.model.name,
        "noise": cell.victims.noise,
        "whole": cell.victims.whole,
        "targets": measured["targets"],
        "victims": measured["victims"],
        "l1_mean": measured["l1"],
        "l1_std": measured["l1_std"],
        "l1_std_targets": measured["l1_std_targets"],
        "l1_unattacked": unattacked["l1"],
        "jaccard_top20": measured["jaccard_top20"],
        "jaccard_half": measured["jaccard_half"],
        "jaccard_top20_unattacked": unattacked["jaccard_top20"],
        "jaccard_half_unattacked": unattacked["jaccard_half"],
        "class_kept": measured["class_kept"],
        "degenerate": measured["degenerate"],
        "victim_accuracy": measured["victim_accuracy"],
        "clean_victim_accuracy": unattacked["victim_accuracy"],
        "succeeded": succeeded(unattacked, measured),
        "seed": experiment.seed,
        "settings": anywhere(describe(replace(experiment, victims=cell.victims))),
        "provenance": provenance(torch.device("cpu")),
    }


def anywhere(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without where files lie on this machine: absolute paths by their last names."""
    for part, key in PLACES:
        place = settings[part].get(key)
        if place is not None and Path(place).is_absolute():
            settings = {**settings, part: {**settings[part], key: Path(place).name}}
    return settings


def known(
    data: str, interpreter: str, cell: Cell, experiment: PoisoningExperiment, rows: Sequence[Row]
) -> bool:
    """Is the row there, of the same settings? Where the data lie does not matter."""
    wanted: Any = replace(experiment, victims=cell.victims)

    def build(settings: dict[str, Any]) -> PoisoningExperiment:
        there = describe(wanted)
        for part, key in PLACES:
            if there[part].get(key) is not None:
                settings = {**settings, part: {**settings[part], key: there[part][key]}}
        own, of_attack = settings["attack"], there["attack"]
        if cell.attack == "none" and all(own[n] == of_attack[n] for n in SHOWN):
            settings = {**settings, "attack": of_attack}
        return read_poisoning(settings)

    return any(
        (r["data"], r["interpreter"], r["attack"]) == (data, interpreter, cell.attack)
        and same_settings(r["settings"], wanted, build)
        for r in rows
    )


TITLES = {"table1": "Table 1: dogs", "table2": "Table 2: tables of patients"}


def markdown(rows: list[dict[str, Any]]) -> str:
    victims = " or ".join(str(n) for n in sorted({r["victims"] for r in rows}, reverse=True))
    lines = [
        f"# Zhang, Gao & Su 2021, {TITLES[table_of(rows[0]['data'])]}",
        "",
        "L1 (less is nearer to the lie) and Jaccard (more is nearer) between victims' maps of the "
        f"target and the wanted map: mean over 10 targets and {victims} victims each, L1 with its "
        "standard deviation over both. In brackets the same victims, un-attacked. Succeeded: the "
        f"share of targets whose mean L1 is at most {SUCCEEDED} of its un-attacked mean. Class "
        "kept: share of victims that predict the target's class. Accuracy: victims', beside "
        "un-attacked ones'. Empty: share of degenerate maps (—: not counted).",
        "",
        "| data, interpreter | attack | poisons | K | victims | L1 | of un-attacked | Jaccard, top "
        "20 % | Jaccard, > .5 | succeeded | class kept | accuracy | empty |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = ("none", "wm", "eq4", "imf")
    for r in sorted(
        rows,
        key=lambda r: (
            DATA.index(r["data"]),
            list(INTERPRETERS).index(r["interpreter"]),
            who(r) != "as trained for",
            who(r),
            r["changed"] != "",
            r["attack"] != "none",
            -r["poison_rate"],
            order.index(r["attack"]),
            r["models"] or 0,
        ),
    ):
        lines.append(
            f"| {r['data']}, {r['interpreter'].upper()} "
            f"| {r['attack']}{', ' * bool(r['changed'])}{r['changed']} "
            f"| {100 * r['poison_rate']:.0f} % | {r['models'] or '—'} | {who(r)} "
            f"| {r['l1_mean']:.3f} ± {r['l1_std']:.3f} ({r['l1_unattacked']:.3f}) "
            f"| {r['l1_mean'] / r['l1_unattacked']:.2f} "
            f"| {r['jaccard_top20']:.2f} ({r['jaccard_top20_unattacked']:.2f}) "
            f"| {r['jaccard_half']:.2f} ({r['jaccard_half_unattacked']:.2f}) "
            f"| {100 * r['succeeded']:.0f} % | {100 * r['class_kept']:.1f} % "
            f"| {100 * r['victim_accuracy']:.2f} ({100 * r['clean_victim_accuracy']:.2f}) "
            f"| {percent(r.get('degenerate'))} |"
        )
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.0f} %"


def who(r: dict[str, Any]) -> str:
    """The victims, if not as the poison was made for."""
    if r["network"] not in ("mlp", "mobilenet_v2"):
        return f"another network ({r['network']})"
    if r["whole"]:
        return "all layers trained"
    if r["noise"]:
        return f"noise {r['noise']:g} on all samples"
    return "as trained for" if r["start"] == "clean model" else f"from {r['start']}"


def has_usual_models(r: Row) -> bool:
    """Is K the attack's own, where there is an attack that has one?"""
    usual = 1 if r["data"] == "dogs" else {"grad": 4, "cam": 8}[r["interpreter"]]
    return r["models"] in (None, usual)


def readme(tables: Mapping[str, list[Row]]) -> str:
    rows = [r for name in TABLES for r in tables[name]]
    lines = [
        "| data, interpreter | attack | L1 (paper) | un-attacked | Jaccard (paper) | un-attacked |",
        "|---|---|---|---|---|---|",
    ]
    main = [r for r in rows if who(r) == "as trained for" and r["poison_rate"] == 0.1]
    names = list(INTERPRETERS)
    for r in sorted(
        main,
        key=lambda r: (DATA.index(r["data"]), names.index(r["interpreter"]), r["attack"] != "wm"),
    ):
        shown = r["changed"] in ("", "categories stay") and has_usual_models(r)
        if r["attack"] in ("wm", "imf") and shown:
            l1, jaccard = PAPER_FIGURES[table_of(r["data"])][r["interpreter"], r["attack"]]
            lines.append(
                f"| {r['data']}, {r['interpreter'].upper()} "
                f"| {r['attack'].upper()}{', ' * bool(r['changed'])}{r['changed']} "
                f"| {r['l1_mean']:.2f} ({l1:.2f}) | {r['l1_unattacked']:.2f} "
                f"| {r['jaccard_top20']:.2f} ({jaccard:.2f}) "
                f"| {r['jaccard_top20_unattacked']:.2f} |"
            )
    return "\n".join(lines)


def figures(rows: list[Row]) -> list[Figure]:
    """IMF with 10 % of poisons, at victims as trained for; theirs are other data, so in shares.

    L1 as a share of WM's, beside the paper's share, and of un-attacked victims', within our bound;
    the Jaccard similarity above un-attacked victims'.
    """
    usual = [r for r in rows if who(r) == "as trained for" and has_usual_models(r)]
    wm = {
        (r["data"], r["interpreter"]): r["l1_mean"]
        for r in usual
        if r["attack"] == "wm" and r["poison_rate"] == 0.1
    }
    found = []
    for r in usual:
        same = r["attack"] == "imf" and r["poison_rate"] == 0.1
        if not same or r["changed"] not in ("", "categories stay"):
            continue
        where, interpreter = (r["data"], r["interpreter"]), r["interpreter"]
        theirs = PAPER_FIGURES[table_of(r["data"])]
        imf, mark = (theirs[interpreter, attack][0] for attack in ("imf", "wm"))
        paper = round(imf / mark, 2)
        part, changed = ("ablation", f", {r['changed']}") if r["changed"] else ("main", "")
        name = f"{r['data']}/{interpreter}/{part}/imf{changed}"
        l1, before = r["l1_mean"], r["jaccard_top20_unattacked"]
        floors = {"un-attacked": r["l1_unattacked"]}
        found.append(Figure(name, "L1", over_seeds([l1]), floors=floors))
        if where in wm:
            share = over_seeds([l1 / wm[where]])
            found.append(Figure(name, "L1 of WM's", share, paper, "lower", digits=2))
        of_unattacked = over_seeds([l1 / r["l1_unattacked"]])
        bound = MOST_OF_UNATTACKED
        found.append(Figure(name, "L1 of un-attacked", of_unattacked, bound, "lower", "our bound"))
        jaccard = over_seeds([r["jaccard_top20"]])
        found.append(Figure(name, "Jaccard, top 20 %", jaccard, before, by="un-attacked"))
    return found


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned:
    """A row: the cell on one data set, with one interpreter."""

    data: str
    interpreter: str
    part: str
    cell: Cell
    plan: Plan = Plan()
    usual: bool = True

    @property
    def row(self) -> str:
        cell = self.cell
        what = [cell.attack, cell.changed]
        if self.part == "victims":
            network = cell.victims.model.name if cell.victims.model else "mlp"
            victims = cell.victims
            what.append(
                who(
                    {
                        "network": network,
                        "noise": victims.noise,
                        "start": victims.start,
                        "whole": victims.whole,
                    }
                )
            )
        if self.part == "budget":
            what.append(f"{100 * cell.settings['poison_rate']:g} %")
        if self.part == "ensemble":
            what.append(f"K = {cell.settings['models']}")
        return f"{self.data}/{self.interpreter}/{self.part}/{', '.join(filter(None, what))}"

    @property
    def name(self) -> str:
        return f"zhang2021 {table_of(self.data)} {self.row}"

    @property
    def experiment(self) -> PoisoningExperiment:
        return experiment_of(self.data, self.interpreter, self.cell, self.plan.data)

    def known(self, rows: Sequence[Row]) -> bool:
        return known(self.data, self.interpreter, self.cell, self.experiment, rows)

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        experiment, victims, folder = self.experiment, self.cell.victims, self.plan.data
        screen.stage(self.row)
        scene = scene_of(self.data, self.interpreter, folder)
        clean = measured = unattacked(self.data, self.interpreter, folder, victims)
        if self.cell.attack != "none":
            made = poison(experiment, place.root, screen)
            sets = poison_sets(made)
            if any(
                not torch.equal(s.target.sample, t.sample)
                for s, t in zip(sets, scene.targets, strict=True)
            ):  # as after another number of threads, with which another clean model is trained
                raise InputError(
                    f"poison sets {made.path}: were made for other targets than the clean model "
                    "of this machine and --threads gives; remove the folder, or set --root"
                )
            measured = measure_victims(scene, sets, victims, experiment, screen).numbers
        return [row(self.data, self.interpreter, self.cell, experiment, measured, clean)]


@functools.lru_cache(maxsize=1)  # rows of the same data and interpreter follow one another
def scene_of(data: str, interpreter: str, folder: Path) -> Scene:
    if data == "nhanes1":
        women_of_nhanes(folder)
    return set_up(experiment_of(data, interpreter, Cell("imf", {}, Victims()), folder), Silent())


@functools.lru_cache(maxsize=8)
def unattacked(data: str, interpreter: str, folder: Path, victims: Victims) -> dict[str, Any]:
    """What victims of the clean set say: the same for all attacks."""
    first = experiment_of(data, interpreter, Cell("imf", {}, Victims()), folder)
    scene = scene_of(data, interpreter, folder)
    return measure_victims(scene, None, victims, first, Silent()).numbers


def cells_of(table: str, plan: Plan) -> Iterator[Poisoned]:
    for data in TABLES[table]:
        for interpreter in INTERPRETERS:
            first = experiment_of(data, interpreter, Cell("imf", {}, Victims()), plan.data)
            for part in PARTS:
                for cell in cells(data, part, first.victims, interpreter):
                    yield Poisoned(data, interpreter, part, cell, plan)


PAPER = Paper(
    "zhang2021",
    "Zhang, Gao & Su 2021, Data Poisoning Attacks Against Outcome Interpretations",
    tuple(
        Table(name, KEYS, functools.partial(cells_of, name), markdown, figures, seeded=False)
        for name in TABLES
    ),
    readme,
)
