"""A run is a folder: spec, provenance, numbers, curves, maps, gallery, model.

| file                | what                                                                 |
|---------------------|----------------------------------------------------------------------|
| spec.json           | the experiment, every setting written out                            |
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
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from trompe.files import read_json, real, strict_json, write_atomically, write_json
from trompe.interfaces import EpochRecord, InputError


class Listener(Protocol):
    """Hears of every step and of every whole epoch."""

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


def fingerprint(spec: Any) -> str:
    """Eight hex digits of a spec: the same settings give the same, changed ones another.

    A setting that is unset (None) does not count, so that a new one leaves finished runs valid.
    """
    text = json.dumps(_set(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _set(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {key: _set(value) for key, value in spec.items() if value is not None}
    return [_set(value) for value in spec] if isinstance(spec, list | tuple) else spec


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes one run's files."""

    path: Path

    @property
    def finished(self) -> bool:
        return (self.path / "numbers.json").is_file()

    def open(self, spec: dict[str, Any]) -> None:
        """Create the folder, or check that it belongs to the same spec."""
        file = self.path / "spec.json"
        if not file.exists():
            write_json(file, spec)
        elif fingerprint(read_json(file)) != fingerprint(strict_json(spec)):
            raise InputError(
                f"run folder {self.path}: holds a run with other settings (spec.json); choose "
                "another folder, or remove this one"
            )

    def discard_if_empty(self) -> None:
        """Remove the folder if it holds nothing but its spec."""
        if [file.name for file in self.path.iterdir()] == ["spec.json"]:
            (self.path / "spec.json").unlink()
            self.path.rmdir()

    def write(self, name: str, value: Any) -> None:
        """`value` as name.json."""
        write_json(self.path / f"{name}.json", value)

    def read(self, name: str) -> Any:
        if not (self.path / f"{name}.json").is_file():
            raise InputError(
                f"run folder {self.path}: has no {name}.json; it is no run, or one that has not "
                "finished (the same command goes on with it)"
            )
        return read_json(self.path / f"{name}.json")

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
            for record in self.read("history")
        )

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        whole = {key: value.contiguous().clone() for key, value in tensors.items()}  # none shared
        write_atomically(
            self.path / f"{name}.safetensors",
            lambda temporary: safetensors.torch.save_file(whole, temporary),
        )

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load_file(self.path / f"{name}.safetensors")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"run folder {self.path}: {name}.safetensors cannot be read ({error})"
            ) from error


class FileLogbook:
    """A Logbook that keeps its state in a file, atomically, and tells `listener` of each step.

    The number of threads is kept too: results are the same bit for bit only with the same one.
    """

    def __init__(self, file: Path, listener: Listener | None = None) -> None:
        self.file, self.listener = file, listener

    def load(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            torch.set_num_threads(state.pop("threads"))
        except Exception as error:  # a damaged pickle can end in any of Python's errors
            raise InputError(
                f"checkpoint {self.file}: is damaged or none of trompe's ({type(error).__name__}); "
                "remove it to start this training again"
            ) from error
        return state

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
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "device": _device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


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
