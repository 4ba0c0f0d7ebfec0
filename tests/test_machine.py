"""What the machine offers."""

import errno
import tempfile
from pathlib import Path

import pytest
import torch

from trompe import machine
from trompe.interfaces import InputError


@pytest.fixture(autouse=True)
def same_threads_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.choose_threads() == torch.get_num_threads() == 3
    assert machine.choose_threads(2) == torch.get_num_threads() == 2
    with pytest.raises(InputError, match="threads = 0"):
        machine.choose_threads(0)


@pytest.mark.parametrize(("load", "expected"), [(0.2, 4), (2.6, 1), (99.0, 1)])
def test_busy_cores_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, load: float, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0, 0))
    assert machine.choose_threads() == expected


def test_a_device_that_is_not_there_is_one_sentence() -> None:
    assert machine.choose_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device 'gpu7'"):
        machine.choose_device("gpu7")


def test_precision_is_as_told_and_auto_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert machine.resolve_precision("float32", cpu) == "float32"
    assert machine.resolve_precision("bfloat16", cpu) == "bfloat16"
    for able, expected in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert machine.resolve_precision("auto", cpu) == expected


def test_memory_is_the_machines_or_the_containers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = [tmp_path / name for name in ("none", "max", "less", "more")]
    for file, text in zip(limits[1:], ("max", "5000000", "9" * 20), strict=True):
        file.write_text(text + "\n")
    monkeypatch.setattr(machine, "_GROUP_LIMITS", (str(limits[0]), str(limits[1])))
    whole = machine.memory()
    assert 10**8 < whole < 10**15
    monkeypatch.setattr(machine, "_GROUP_LIMITS", [str(file) for file in limits])
    assert machine.memory() == 5_000_000


@pytest.mark.parametrize(("have", "in_file"), [(16 * 4 * 60, False), (16 * 4 * 60 - 1, True)])
def test_large_tensors_lie_in_a_file_without_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, have: int, in_file: bool
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: have)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = machine.room((3, 4, 5))
    values = torch.rand(3, 4, 5)
    tensor[:] = values
    assert torch.equal(tensor, values)
    assert (str(tmp_path) in Path("/proc/self/maps").read_text()) == in_file
    assert not list(tmp_path.iterdir())
    del tensor
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_told_before_the_process_dies_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(machine, "memory", lambda: 1)
    monkeypatch.setattr(machine.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"no room for 2\.0 GB.*No space left.*TMPDIR"):
        machine.room((1000, 1000, 500))
