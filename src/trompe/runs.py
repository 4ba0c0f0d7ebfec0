"""A run is a folder: spec, provenance, numbers, curves, maps, gallery, model.

| file                | what                                                                 |
|---------------------|----------------------------------------------------------------------|
| spec.json           | the experiment, every setting written out                            |
| inputs.json         | what lies in the files that the spec names (absent if it names none) |
| provenance.json     | commit, versions, hardware, command, times                           |
| numbers.json        | what was measured (written last: a run with it is finished)          |
| history.json        | per epoch: mean loss terms, what was measured, seconds               |
| evidence.safetensors| scores and maps per condition: metrics can be computed again         |
| gallery.safetensors | a few images and their maps, for the report                          |
| timeline.safetensors| maps of a few images after each epoch, where the attack keeps them   |
| classes.json        | the classes' names                                                   |
| architecture.json   | modules that the manipulated model has and the reference has not     |
| model.safetensors   | the manipulated model, with model.json                               |
| checkpoint.pt       | while training: the state after the last whole epoch                 |

In numbers.json and history.json null stands for nan: a number of which there is none.

A run is a value: its folder's name ends in a hash of the spec, in which what lies in a file or
folder stands in the place of its path (see `contents` in catalog.py). So changed data or weights
make another run, and the same ones elsewhere the same run; neither the clock nor a file's date
counts. One process at a time works on a run (`RunFolder.alone`); the others wait, and read it.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from trompe.files import (
    clear_temporaries,
    read_json,
    real,
    strict_json,
    write_atomically,
    write_json,
)
from trompe.interfaces import EpochRecord, InputError, TrompeError
from trompe.ranks import count, on_first
from trompe.run_shapes import Epoch, check_shape
from trompe.screen import Screen, Silent

Inputs = Mapping[str, str]  # a setting that names a file -> a hash of what lies there
NO_INPUTS: Inputs = MappingProxyType({})


class Listener(Protocol):
    """Hears of every step and of every whole epoch."""

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


def fingerprint(spec: Any, inputs: Inputs = NO_INPUTS) -> str:
    """Twelve hex digits of a spec: the same settings give the same, changed ones another.

    A setting that is unset (None) does not count, so that a new one leaves finished runs valid. Of
    one that names a file, what lies there counts, not where it is.
    """
    text = json.dumps(_counted(spec, inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counted(spec: Any, inputs: Inputs, key: str = "") -> Any:
    """What of a spec, or of its part at `key`, makes the run what it is."""
    if key in inputs:
        return inputs[key]
    dot = f"{key}." if key else ""
    if isinstance(spec, dict):
        given = {name: value for name, value in spec.items() if value is not None}
        return {name: _counted(value, inputs, f"{dot}{name}") for name, value in given.items()}
    if isinstance(spec, list | tuple):
        return [_counted(value, inputs, f"{dot}{number}") for number, value in enumerate(spec)]
    return spec


class Held(TrompeError):
    """Another process works on the run."""


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes one run's files."""

    path: Path

    @property
    def finished(self) -> bool:
        return (self.path / "numbers.json").is_file()

    @property
    def lock(self) -> FileLock:
        """The operating system's lock on this run: it ends with the process that holds it.

        Its file stays when the lock is released, as others may be waiting at it.
        """
        return FileLock(self.path.parent / ".locks" / f"{self.path.name}.lock")

    @property
    def held(self) -> bool:
        """Is a process at work on this run?"""
        lock = self.lock
        if not Path(lock.lock_file).exists():
            return False
        try:
            with lock.acquire(blocking=False):
                return False
        except Timeout:
            return True
        except OSError:  # we could not work on it ourselves
            return False

    @contextlib.contextmanager
    def alone(self, screen: Screen | None = None, wait: bool = True) -> Iterator[None]:
        """Inside, no other process works on this run; waits until none does, and says so.

        wait False: raises Held instead.
        """
        lock = self.lock
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                if not wait:
                    raise Held(f"{self.path}: another process works on it") from None
                waiting = f"{self.path}: another process works on it; waiting"
                (screen or Silent()).note(waiting)
                lock.acquire()
        except OSError as error:
            raise InputError(
                f"file {lock.lock_file}: cannot be written ({error}); choose another folder or "
                "make room there"
            ) from error
        try:
            if not self.finished:  # whoever wrote here was killed
                clear_temporaries(self.path)
            yield
        finally:
            lock.release()

    def open(self, spec: dict[str, Any], inputs: Inputs = NO_INPUTS) -> None:
        """Create the folder, or check that it belongs to the same spec and inputs.

        Where the inputs lie may have changed: the folder then says where they are now.
        """
        if self.finished:  # a kill right after its last file leaves this one
            (self.path / "checkpoint.pt").unlink(missing_ok=True)
        file = self.path / "spec.json"
        if file.exists():
            before, now = read_json(file), strict_json(spec)
            # A folder of an earlier version does not say what its inputs held.
            then = self.inputs or inputs
            if fingerprint(before, then) != fingerprint(now, inputs):
                raise InputError(
                    f"run folder {self.path}: holds a run with other settings (spec.json) or of "
                    "other data or weights (inputs.json); choose another folder, or remove this one"
                )
            if fingerprint(before) == fingerprint(now) and then == self.inputs:
                return
        if inputs:
            self.write("inputs", inputs)
        self.write("spec", spec)

    @property
    def inputs(self) -> dict[str, str]:
        """What inputs.json says; empty if there is none."""
        file = self.path / "inputs.json"
        found: dict[str, str] = self.read("inputs", dict[str, str]) if file.is_file() else {}
        return found

    def check_inputs(self, there: Inputs, since: str) -> None:
        """InputError for files that no longer hold what they did when the run was made."""
        for key, digest in self.inputs.items():
            if key in there and there[key] != digest:
                raise InputError(
                    f"{key}: what lies there has changed since {since} "
                    f"({self.path / 'inputs.json'}); bring it back, or make the run again"
                )

    def discard_if_empty(self) -> None:
        """Remove the folder if it holds nothing but its spec."""
        if {file.name for file in self.path.iterdir()} <= {"spec.json", "inputs.json"}:
            for file in sorted(self.path.iterdir(), reverse=True):  # the spec first
                file.unlink()
            self.path.rmdir()

    def write(self, name: str, value: Any) -> None:
        """`value` as name.json."""
        write_json(self.path / f"{name}.json", value)

    def read(self, name: str, shape: Any = dict[str, Any]) -> Any:
        """What name.json holds. InputError if it is missing or not of that shape (run_shapes)."""
        if not (self.path / f"{name}.json").is_file():
            raise InputError(
                f"run folder {self.path}: has no {name}.json; it is no run, or one that has not "
                "finished (the same command goes on with it)"
            )
        file = self.path / f"{name}.json"
        mend = "bring it back, or make the run again"
        return check_shape(read_json(file), shape, f"file {file}", mend)

    def write_history(self, history: Sequence[EpochRecord]) -> None:
        """Epochs as history.json, and what is to be looked at as timeline.safetensors."""
        fields = ("epoch", "terms", "measured", "seconds")
        self.write("history", [{name: getattr(r, name) for name in fields} for r in history])
        timeline = {f"{r.epoch}.{name}": v for r in history for name, v in r.shown.items()}
        if timeline:
            self.write_tensors("timeline", timeline)

    def read_history(self) -> tuple[EpochRecord, ...]:
        """The epochs of history.json, without what is to be looked at."""
        return tuple(
            EpochRecord(
                record["epoch"],
                {name: real(value) for name, value in record["terms"].items()},
                {name: real(value) for name, value in record["measured"].items()},
                record["seconds"],
            )
            for record in self.read("history", list[Epoch])
        )

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        whole = {key: value.contiguous().clone() for key, value in tensors.items()}  # none shared
        write_atomically(
            self.path / f"{name}.safetensors",
            lambda temporary: safetensors.torch.save_file(whole, temporary),
        )

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        mend = "bring it back, or make the run again"
        try:
            found = safetensors.torch.load_file(self.path / f"{name}.safetensors")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"run folder {self.path}: {name}.safetensors cannot be read ({error}); {mend}"
            ) from error
        return _Held(found, f"run folder {self.path}: {name}.safetensors", mend)


class _Held(dict[str, Any]):
    """What a file holds. InputError for what it ought to hold and does not."""

    def __init__(self, held: Mapping[str, Any], file: str, mend: str) -> None:
        super().__init__(held)
        self.file, self.mend = file, mend

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.file}: lacks {key!r}, it is damaged or too old; {self.mend}")


@contextlib.contextmanager
def alone_together(folder: RunFolder, screen: Screen | None = None) -> Iterator[None]:
    """`folder.alone` for all processes that share a run (ranks.py); the first holds the lock."""
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(folder.alone(screen)))
        yield


class FileLogbook:
    """A Logbook that keeps its state in a file, atomically, and tells `listener` of each step.

    The number of threads is kept too: results are the same bit for bit only with the same one.
    """

    def __init__(self, file: Path, listener: Listener | None = None) -> None:
        self.file, self.listener = file, listener

    def load(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        mend = "remove it to start this training again"
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            torch.set_num_threads(state.pop("threads"))
        except Exception as error:  # a damaged pickle can end in any of Python's errors
            raise InputError(
                f"checkpoint {self.file}: is damaged or none of trompe's ({type(error).__name__}); "
                f"{mend}"
            ) from error
        return _Held(state, f"checkpoint {self.file}", mend)

    def save(self, state: dict[str, Any]) -> None:
        state = {**state, "threads": torch.get_num_threads()}
        write_atomically(self.file, lambda temporary: torch.save(state, temporary))
        if self.listener is not None:
            self.listener.epoch(EpochRecord(*state["history"][-1]))

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        if self.listener is not None:
            self.listener.step(epoch, step, steps, terms)

    def close(self) -> None:
        """The training is done and its results are kept elsewhere."""
        self.file.unlink(missing_ok=True)


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was made."""
    return {
        "trompe": importlib.metadata.version("trompe"),
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *map(_anywhere, sys.argv[1:])]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "device": _device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": count(),
    }


def _anywhere(word: str) -> str:
    """A word of a command; an absolute path, which only this machine has, by its last name."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word


@functools.cache  # the code that was loaded, not what has been edited since
def _commit() -> str:
    """The commit of the code that runs, "+changes" if its files differ, "" if unknown."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno", "--", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
