"""Searching an experiment's settings: which of its keys to change, and which values are best.

A search is an experiment's TOML file with a table [search] (see `Search` in studies.py). It keeps
its results in a folder below ROOT/searches:

| file        | what                                                                          |
|-------------|-------------------------------------------------------------------------------|
| search.json | every point: settings, epochs, score, state; time spent and saved; provenance |
| best.toml   | the experiment with the best point's settings, as `trompe attack` takes it    |
| study.log   | Optuna's journal of the study, if it is not kept in a database                |

A point is tried in the folder of the run that has its settings, and scored on the images for
choices alone. Nothing is measured for a report: `trompe attack best.toml` goes on where the point
ended, at its checkpoint, and does that. A point that was run before is not run again.
"""

import contextlib
import copy
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from optuna.trial import FrozenTrial, Trial

from trompe import catalog
from trompe.classifier import Classifier
from trompe.experiment import (
    Experiment,
    Sets,
    attack_alone,
    clean_model,
    experiment_table,
    logbook_of,
    read_experiment,
    read_sets,
    run_folder,
    set_key,
)
from trompe.files import read_json, write_atomically, write_json
from trompe.interfaces import Diverged, EpochRecord, InputError
from trompe.machine import choose_device
from trompe.many import Crew, Outcome, Place, run_jobs
from trompe.runs import fingerprint, provenance
from trompe.screen import Screen, Silent
from trompe.studies import (
    BEAT,
    Search,
    Study,
    Ticket,
    error_of,
    reaching,
    state_of,
    without_password,
)


@dataclass(frozen=True)
class SearchSpec:
    """An experiment's table without [search], and what is searched."""

    table: Mapping[str, Any]
    search: Search
    where: str

    def at(self, settings: Mapping[str, Any]) -> Experiment:
        """The experiment at a point. InputError for a setting that cannot be."""
        return read_experiment(self.table_at(settings), self.where)

    def table_at(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Its table."""
        table = copy.deepcopy(dict(self.table))
        for key, value in settings.items():
            set_key(table, key, value)
        return table


def read_search(source: Path | str | Mapping[str, Any], where: str = "") -> SearchSpec:
    """A search from a TOML file or its table.

    InputError if it is none, or if one of its values does not fit the experiment.
    """
    if isinstance(source, Mapping):
        table, where = copy.deepcopy(dict(source)), where or "search"
    else:
        table, where = experiment_table(source), where or str(source)
    settings = table.pop("search", None)
    if not isinstance(settings, dict):
        raise InputError(
            f"{where}: has no table [search]; give it one, or run it with trompe attack"
        )
    for name in ("parameters", "names"):
        settings[name] = dict(_flat(settings.get(name, {})))
    search: Search = catalog.build_dataclass(Search, settings, f"{where}.search")
    spec = SearchSpec(table, search, where)
    try:
        tomli_w.dumps(table)
    except TypeError as error:
        raise InputError(
            f"{where}: cannot be written as TOML, as best.toml is ({error})"
        ) from error
    if not hasattr(spec.at({}).attack, "training"):
        raise InputError(f"{where}.attack: is not trained, so that no epoch of it has a score")
    for key, values in search.parameters.items():
        ends = (values["low"], values["high"]) if isinstance(values, Mapping) else values
        for value in ends:
            spec.at({key: value})
    return spec


def _flat(table: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys: TOML reads `attack.weight = [1]` as a table in a table."""
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


@dataclass(frozen=True)
class SearchFolder:
    """Reads a search's files."""

    path: Path

    def read(self) -> dict[str, Any]:
        """search.json; InputError if there is none."""
        found: dict[str, Any] = read_json(self.path / "search.json")
        return found

    @property
    def best(self) -> Path:
        """The experiment with the best point's settings."""
        return self.path / "best.toml"


def search_folder(spec: SearchSpec, root: Path | str = "runs") -> SearchFolder:
    """Where `search` keeps a search: named after the experiment and a hash of both."""
    of_experiment = run_folder(spec.at({}), root).path.name
    digest = fingerprint(catalog.describe(spec.search))
    return SearchFolder(Path(root) / "searches" / f"{of_experiment}-{digest}")


def search(
    spec: SearchSpec,
    root: Path | str = "runs",
    device: str = "auto",
    crew: Crew | None = None,
    storage: str | None = None,
    screen: Screen | None = None,
    beat: float = BEAT,
) -> SearchFolder:
    """Try the points that nobody has tried, and write down all; returns when none is left.

    storage: a database's URL where several searches, also on other machines, share the points; by
    default a file in the search's folder, which those on this machine share. An interrupted search
    goes on; points that a killed one had are tried again once its heart has not beaten for a
    minute. beat: seconds between beats.
    Raises InputError for settings that fit no data or storage; a point that fails stops no other.
    """
    screen = screen or Silent()
    folder = search_folder(spec, root)
    storage = storage or str((folder.path / "study.log").absolute())
    made = provenance(choose_device(device))
    made["command"] = without_password(made["command"])
    base = spec.at({})
    with reaching(storage):
        study = Study(storage, folder.path.name, spec.search, base.seed, beat)
        if not study.done:
            start_of(base, root, device, screen)  # says what is wrong before a point is taken
        with study.alive():
            study.take_back(failed=True)
            while not study.done:
                study.take_back()
                if study.left:
                    jobs = _points(spec, study)
                    for outcome in run_jobs(jobs, Place(Path(root), device), crew, screen):
                        point: Any = outcome.job
                        _tell(study, point, outcome)
                        rows = _write(folder, spec, study, made)
                        screen.note(_line(spec, rows, point))
                else:
                    screen.stage("waiting for the points that another search has")
                    time.sleep(beat)
        _write(folder, spec, study, made)
    return folder


class Tried(NamedTuple):
    """What came of a point. score: after the last epoch, nan if it is not known."""

    score: float
    epochs: int
    seconds: float
    pruned: bool
    error: str
    measured: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A job: one point's attack, to its last epoch or until it is hopeless."""

    name: str
    experiment: Experiment
    ticket: Ticket
    number: int

    def __call__(self, place: Place, screen: Screen) -> Tried:
        folder = run_folder(self.experiment, place.root)
        scores = _Scores(self, screen)
        error, pruned = "", False
        try:
            with folder.alone(screen):
                if folder.finished:
                    with contextlib.suppress(Pruned):
                        scores.take_in(folder.read_history())
                else:
                    logbook = logbook_of(folder, scores)
                    state = logbook.load() or {"history": ()}  # an interrupted attempt goes on
                    scores.take_in([EpochRecord(*record) for record in state["history"]])
                    start = start_of(self.experiment, place.root, place.device, screen)
                    screen.stage(self.name)
                    attack_alone(
                        self.experiment,
                        folder,
                        start.reference,
                        start.sets.train,
                        start.sets.selecting,
                        logbook,
                    )
        except Pruned:
            pruned = True
        except Diverged as problem:
            error = str(problem)
        if not error and not pruned and not math.isfinite(scores.last):
            error = f"{self.ticket.search.score} is {scores.last} after the last epoch"
        seconds = sum(record.seconds for record in scores.heard)
        measured = tuple(scores.heard[-1].measured) if scores.heard else ()
        return Tried(scores.last, len(scores.heard), seconds, pruned, error, measured)


class Pruned(Exception):
    """A point is hopeless; its run keeps the checkpoint and can go on."""


class _Scores:
    """Hears of each epoch, tells the study its score, and stops a hopeless point."""

    def __init__(self, point: Point, screen: Screen) -> None:
        self.point, self.screen = point, screen
        self.epochs, self.name = _epochs(point.experiment), point.ticket.search.score
        self.heard: list[EpochRecord] = []

    @property
    def last(self) -> float:
        return self.heard[-1].measured.get(self.name, math.nan) if self.heard else math.nan

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.screen.step(epoch, step, steps, terms)

    def epoch(self, record: EpochRecord) -> None:
        self.screen.epoch(record)
        self.take_in((record,))

    def take_in(self, records: Sequence[EpochRecord]) -> None:
        """Raises Pruned if the point is hopeless after the last of these epochs, but not if the
        training is over then.
        """
        hopeless = False
        for record in records:
            self.heard.append(record)
            unknown = self.name not in record.measured
            hopeless = unknown or self.point.ticket.report(record.epoch, self.last)
        if hopeless and self.heard[-1].epoch < self.epochs:
            raise Pruned


class Start(NamedTuple):
    """What a point's attack starts from."""

    sets: Sets
    reference: Classifier


def start_of(experiment: Experiment, root: Path | str, device: str, screen: Screen) -> Start:
    """Data and reference, read once for all points that share them."""
    described = {**catalog.describe(experiment), "attack": None}
    key = _StartKey(json.dumps(described, sort_keys=True), str(root), device, experiment, screen)
    return _start_of(key)


@dataclass(frozen=True)
class _StartKey:
    """Equal for experiments that differ in the attack alone."""

    described: str
    root: str
    device: str
    experiment: Experiment = field(compare=False)
    screen: Screen = field(compare=False)


@functools.lru_cache(maxsize=1)
def _start_of(key: _StartKey) -> Start:
    experiment, screen, device = key.experiment, key.screen, choose_device(key.device)
    sets = read_sets(experiment, screen)
    reference = clean_model(
        experiment, sets.train, sets.test, "reference", key.root, device, screen
    )
    return Start(sets, reference)


def _points(spec: SearchSpec, study: Study) -> Iterator[Point]:
    """Jobs, one by one as there are seats for them."""
    while (trial := study.ask()) is not None:
        experiment = spec.at(trial.params)
        yield Point(_named(spec, trial), experiment, study.ticket(trial), trial.number)


def _named(spec: SearchSpec, trial: Trial | FrozenTrial) -> str:
    """A point's settings in a line."""
    return ", ".join(f"{n} {_plain(v)}" for n, v in _settings(spec, trial.params).items())


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(spec: SearchSpec, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A point's settings under the names that tables and pictures have for them, in their order."""
    keys = [key for key in spec.search.parameters if key in parameters]
    return {spec.search.name(key): parameters[key] for key in keys}


def _tell(study: Study, point: Point, outcome: Outcome) -> None:
    if outcome.error:  # a full disk, a killed worker: the next call tries again
        study.tell(point.number, math.nan, {}, error=outcome.error, final=False)
        return
    tried: Tried = outcome.result
    notes = {"epochs": tried.epochs, "seconds": tried.seconds, "score": _finite(tried.score)}
    wanted = study.search.score
    if tried.epochs and wanted not in tried.measured:
        study.tell(point.number, math.nan, notes, error="has no score", final=False)
        raise InputError(
            f"search.score {wanted!r}: is not measured after an epoch; this attack measures "
            f"{', '.join(tried.measured) or 'nothing'}"
        )
    study.tell(point.number, tried.score, notes, tried.pruned, tried.error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(
    folder: SearchFolder, spec: SearchSpec, study: Study, made: dict[str, Any]
) -> list[dict[str, Any]]:
    """search.json and best.toml, as the study is now; the rows."""
    trials = study.points()
    rows = [_row(spec, trial) for trial in trials]
    epochs, seconds = (sum(row[name] for row in rows) for name in ("epochs", "seconds"))
    left = sum(
        _epochs(spec.at(trial.params)) - row["epochs"]
        for trial, row in zip(trials, rows, strict=True)
        if row["pruned"]
    )
    write_json(
        folder.path / "search.json",
        {
            "name": spec.table["name"],
            "points": spec.search.points,
            "seconds": round(seconds, 1),
            "seconds_saved": round(left * seconds / epochs, 1) if epochs else 0.0,
            "rows": rows,
            "search": catalog.describe(spec.search),
            "experiment": catalog.describe(spec.at({})),
            "provenance": made,
        },
    )
    finished = [trial for trial in trials if state_of(trial) == "complete"]
    if finished:
        _write_best(folder.best, spec, min(finished, key=_value), len(finished))
    return rows


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # it is complete
    return trial.value


def _row(spec: SearchSpec, trial: FrozenTrial) -> dict[str, Any]:
    state, notes = state_of(trial), trial.user_attrs
    row = {
        "number": trial.number,
        "settings": _settings(spec, trial.params),
        "epochs": notes.get("epochs", 0),
        "pruned": state == "pruned",
        "score": notes.get("score"),
        "state": state,
        "seconds": round(notes.get("seconds", 0.0), 2),
    }
    return {**row, "error": error_of(trial)} if error_of(trial) else row


def _write_best(file: Path, spec: SearchSpec, best: FrozenTrial, count: int) -> None:
    above = (
        f"# The best of {count} points that were tried to the end: {_named(spec, best)}.\n"
        f"# {spec.search.score} {_value(best):.6g} on the images for choices.\n"
    )
    text = above + tomli_w.dumps(spec.table_at(best.params))
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _epochs(experiment: Experiment) -> int:
    attack: Any = experiment.attack
    return int(attack.training.epochs)


def _line(spec: SearchSpec, rows: list[dict[str, Any]], point: Point) -> str:
    """What became of a point."""
    over = sum(row["state"] in ("complete", "pruned", "failed") for row in rows)
    (row,) = (row for row in rows if row["number"] == point.number)
    score = "no score" if row["score"] is None else f"score {row['score']:.4f}"
    state = f": {row['error']}" if "error" in row else " (pruned)" if row["pruned"] else ""
    plural = "s" if row["epochs"] != 1 else ""
    ended = f"{score} after {row['epochs']} epoch{plural}{state}"
    return f"{over} of {spec.search.points}: {point.name}: {ended}"
