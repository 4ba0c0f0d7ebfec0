"""What the machine offers."""

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
