"""Run folders together: which there are, how they differ, which to remove.

A root holds runs, and in its folder clean/ the clean models. Only small files are read, so that a
thousand runs are listed in seconds.
"""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from trompe import catalog
from trompe.classifier import ModelSpec
from trompe.experiment import Experiment
from trompe.files import read_json, real, write_json
from trompe.interfaces import InputError
from trompe.measure_victims import victims_name
from trompe.poisoning import PoisoningExperiment, Victims
from trompe.run_shapes import Provenance
from trompe.runs import Held, RunFolder, fingerprint

Kind = Literal["attack", "poison", "clean model", ""]
State = Literal["finished", "interrupted", "running", "damaged"]

_REMOVED = ".removed-"  # in front of the name of a run that is being removed


@dataclass(frozen=True)
class Run:
    """What is said of one run.

    epoch: the last whole one of an unfinished training, and how many it shall have; None where
    that is not known. started: date and time (UTC, ISO 8601). size: bytes. numbers: the headlines.
    """

    folder: RunFolder
    kind: Kind
    state: State
    spec: dict[str, Any]
    inputs: dict[str, str]
    numbers: dict[str, float]
    epoch: tuple[int | None, int | None]
    started: str
    size: int

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def seed(self) -> int | None:
        return self.spec.get("seed")

    @property
    def told_state(self) -> str:
        """The state in words, with the epoch of an unfinished run."""
        now, last = self.epoch
        at = "" if now is None else f" at epoch {now}" + ("" if last is None else f" of {last}")
        words = {"running": f"being made now{at and ','}{at}", "interrupted": f"interrupted{at}"}
        return words.get(self.state, self.state)


def list_runs(places: Sequence[Path]) -> list[Run]:
    """The runs in the given folders, which may be runs themselves; the newest first.

    InputError for a folder that is not there, or holds files but no run.
    """
    runs = []
    for folder in dict.fromkeys(folder for place in places for folder in _folders(place)):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            runs.append(_read(folder))
    return sorted(runs, key=lambda run: (run.started, run.name), reverse=True)


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise InputError(f"folder {place}: there is no such folder; name one that holds runs")
    if _is_run(place):
        return [place]
    inside = [folder for root in (place, place / "clean") for folder in _inside(root)]
    found = [folder for folder in inside if _is_run(folder)]
    if not found and any(path.is_file() for path in place.iterdir()):
        raise InputError(f"folder {place}: is no run (it has no spec.json) and holds none")
    return found


def _inside(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _is_run(folder: Path) -> bool:
    return (folder / "spec.json").is_file()


def _read(path: Path) -> Run:
    folder, size = RunFolder(path), _size(path)
    touched = datetime.fromtimestamp((path / "spec.json").stat().st_mtime, UTC)
    started = touched.isoformat(timespec="seconds")
    try:
        spec = folder.read("spec")
        kind = _kind_of(spec)
        inputs = folder.inputs
        if (path / "provenance.json").is_file():
            started = folder.read("provenance", Provenance).get("started", started)
        epoch = _last_epoch(path / "checkpoint.pt"), _epochs(spec)
        if folder.finished:
            numbers = _numbers_of(kind, folder)
            return Run(folder, kind, "finished", spec, inputs, numbers, epoch, started, size)
    except (InputError, LookupError, TypeError, AttributeError, ValueError):
        return Run(folder, "", "damaged", {}, {}, {}, (None, None), started, size)
    state: State = "running" if folder.held else "interrupted"
    return Run(folder, kind, state, spec, inputs, {}, epoch, started, size)


def _size(path: Path) -> int:
    """Of all files below, in bytes; those that vanish meanwhile are left out."""
    size = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                inside = entry.is_dir(follow_symlinks=False)
                size += _size(Path(entry.path)) if inside else entry.stat().st_size
    return size


def _kind_of(spec: Any) -> Kind:
    if "target_seed" in spec:
        return "poison"
    if "attack" in spec:
        return "attack"
    if {"data", "model", "honest", "seed"} <= spec.keys():
        return "clean model"
    raise ValueError("no spec of any run")


def _last_epoch(checkpoint: Path) -> int | None:
    """Of a training's checkpoint, without reading its weights; None if there is none."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(state["history"][-1][0])
    except Exception:  # a damaged pickle can end in any of Python's errors
        return None


def _epochs(spec: Mapping[str, Any]) -> int | None:
    """How many epochs a run's own training shall have; None for one that does not say."""
    maker = spec["attack"] if "attack" in spec else spec["honest"]
    told = maker.get("epochs", (maker.get("training") or {}).get("epochs"))
    return told if isinstance(told, int) else None


# --- numbers --------------------------------------------------------------------------------------

HEADLINES = {"accuracy": "accuracy", "ASR": "attack_success", "map MSE": "map_distance"}


def _numbers_of(kind: Kind, folder: RunFolder) -> dict[str, float]:
    """A finished run's headline numbers by name.

    Of an attack for each condition ("triggered: ASR"), of poisons also those of their victims.
    """
    numbers = folder.read("numbers")
    if kind == "clean model":
        return {"accuracy": real(numbers["test_accuracy"])}
    if kind == "attack":
        return {
            f"{row['name']}: {title}": real(row["metrics"][metric]["mean"])
            for title, metric in HEADLINES.items()
            for row in numbers["conditions"]
            if metric in row["metrics"]
        }
    found = {name: float(numbers[name]) for name in ("targets", "poisons", "poison_rate")}
    for file in sorted(folder.path.glob("victims-*.json")):
        victims = read_json(file)
        found[f"{file.stem}: succeeded"] = real(victims["succeeded"])
        found[f"{file.stem}: map L1"] = real(victims["poisoned"]["l1"])
        found[f"{file.stem}: accuracy"] = real(victims["poisoned"]["victim_accuracy"])
    return found


def headline(run: Run, title: str) -> str:
    """A run's "accuracy", "ASR" or "map MSE" for a table; "" if it has none.

    The accuracy is that on clean images; of the others there can be one a trigger.
    """
    if run.kind == "poison":
        return ""
    found = {name: value for name, value in run.numbers.items() if name.endswith(title)}
    if title == "accuracy":
        found = dict(list(found.items())[:1])
    elif lied := {name: value for name, value in found.items() if not name.startswith("clean")}:
        found = lied
    return " ".join(f"{value:.4f}" for value in found.values())


# --- choosing and comparing -----------------------------------------------------------------------


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """A nested table as dotted keys: {"attack.goals.0.label": 3}."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{key}.{name}" if key else str(name))
    return found


def choose(runs: Sequence[Run], filters: Sequence[str]) -> list[Run]:
    """The runs for which all of KEY=VALUE hold.

    A key is name, kind, state, or a setting as in spec.json, dotted. In a value * and ? stand for
    any text and any letter. InputError for a key that no run has.
    """
    chosen = list(runs)
    for text in filters:
        key, found, wanted = (part.strip() for part in text.partition("="))
        if not found:
            raise InputError(f"--filter {text}: must read KEY=VALUE, such as attack.weight=0.9")
        known = {known for run in runs for known in _facts(run)}
        if runs and key not in known:
            raise InputError(f"--filter {text}: no run has {key!r}{_nearest(key, known)}")
        chosen = [run for run in chosen if _matches(_facts(run).get(key, ()), wanted)]
    return chosen


def _nearest(key: str, known: set[str]) -> str:
    near = catalog.nearest(key, known)
    return near if "did you mean" in near else "; spec.json in a run's folder shows its settings"


def _facts(run: Run) -> dict[str, tuple[Any, ...]]:
    """What can be asked of a run: each key's values, one of which must match."""
    facts = {key: (value,) for key, value in flat(run.spec).items()}
    name = (run.name, *facts.get("name", ()))  # the folder's, or the experiment's
    return {**facts, "name": name, "kind": (run.kind,), "state": (run.state, run.told_state)}


def _matches(values: Sequence[Any], wanted: str) -> bool:
    return any(fnmatch.fnmatchcase(shown(v), wanted) or _same_number(v, wanted) for v in values)


def _same_number(value: Any, wanted: str) -> bool:
    """1e-3 and 0.001 are the same."""
    try:
        return not isinstance(value, bool | str | None) and float(value) == float(wanted)
    except (TypeError, ValueError):
        return False


def shown(value: Any) -> str:
    """A setting's value as in an experiment's file."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which the runs differ: each run's value, "" where it has no such setting.

    "contents of data.root" is a hash: files may differ that are called the same.
    """
    tables = []
    for run in runs:
        table = {key: shown(value) for key, value in flat(run.spec).items()}
        held = {f"contents of {key}": digest[:12] for key, digest in run.inputs.items()}
        tables.append(table | held)
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, "") for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


# --- removing and renaming ------------------------------------------------------------------------


def remove(run: Run) -> str:
    """Remove a run's folder unless a process works on it; what was done, in one sentence.

    A kill in the middle leaves no half run: the folder first gets a name that is no run's.
    """
    path = run.folder.path
    if path.is_symlink():
        return f"{path}: kept, it is a link; remove it yourself"
    try:
        with run.folder.alone(wait=False):
            for left in path.parent.glob(f"{_REMOVED}*"):
                shutil.rmtree(left, ignore_errors=True)
            aside = path.parent / f"{_REMOVED}{path.name}"
            path.rename(aside)
            shutil.rmtree(aside)
    except Held:
        return f"{path}: kept, a process works on it"
    return f"{path}: removed"


def rename_old(runs: Sequence[Run], say: Callable[[str], None]) -> None:
    """Give finished runs of earlier versions the name that they would have today.

    Those versions did not look at what lies in data and weights files: it is taken to be what they
    were made from. Nor did they lock what they worked on, so unfinished runs keep their names. say:
    hears of each run that has an old name what was done.
    """
    for run in runs:
        prefix, _, digest = run.name.rpartition("-")
        if run.state == "damaged" or not _is_old(digest, run.spec):
            continue
        path = run.folder.path
        if run.state != "finished":
            say(f"{path}: kept, it is not finished")
            continue
        try:
            inputs = run.inputs or _contents(run, str(path / "spec.json"))
            new = path.parent / f"{prefix}-{fingerprint(run.spec, inputs)}"
            with run.folder.alone(wait=False):
                if new.exists():
                    say(f"{path}: kept, as {new.name} is there already")
                    continue
                if run.kind == "poison":
                    _rename_victims(path)
                if inputs:
                    write_json(path / "inputs.json", inputs)
                path.rename(new)
                say(f"{path}: is now {new.name}")
        except Held:
            say(f"{path}: kept, a process works on it")
        except InputError as error:
            say(f"{path}: kept; {error}")


def _is_old(digest: str, spec: Any) -> bool:
    """Was a name made from this spec by an earlier version, from its settings alone?"""
    return digest == fingerprint(spec)[:8]


def _contents(run: Run, where: str) -> dict[str, str]:
    if run.kind == "clean model":
        data = catalog.build("data", run.spec["data"], f"{where}.data")
        model = catalog.build_dataclass(ModelSpec, run.spec["model"], f"{where}.model")
        return catalog.contents({"data": data, "model": model})
    kind = Experiment if run.kind == "attack" else PoisoningExperiment
    return catalog.contents(catalog.build_dataclass(kind, run.spec, where))


def _rename_victims(path: Path) -> None:
    """Their files' names end in a hash, too; the numbers are renamed last."""
    for file in path.glob("victims-*.json"):
        spec = read_json(file)["spec"]
        digest = file.stem.removeprefix("victims-")
        if not _is_old(digest, spec):
            continue
        new = victims_name(catalog.build_dataclass(Victims, spec, str(file)))
        new = new.removeprefix("victims-")
        for old in (f"maps-{digest}.png", f"victims-{digest}.safetensors", file.name):
            if (path / old).is_file():
                (path / old).rename(path / old.replace(digest, new))
