"""A kill at any moment leaves the old file or the new one, never half."""

import errno
import json
import math
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from trompe.files import (
    put_between,
    read_json,
    real,
    unite_rows,
    write_atomically,
    write_json,
)
from trompe.interfaces import InputError


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    file = tmp_path / "numbers.json"
    file.write_text("old")
    return file


def half_then(error: BaseException) -> Any:
    def write(temporary: Path) -> None:
        temporary.write_text("hal")
        raise error

    return write


def test_a_new_file_takes_the_place_of_the_old_one(old: Path) -> None:
    def write(temporary: Path) -> None:
        assert old.read_text() == "old"
        assert temporary.parent == old.parent  # so that replacing it is atomic
        temporary.write_text("new")
        assert old.read_text() == "old"

    write_atomically(old, write)
    assert old.read_text() == "new"
    assert names_in(old.parent) == ["numbers.json"]


def test_folders_are_made_as_needed(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "c.json"
    write_json(file, 1)
    assert read_json(file) == 1


def test_the_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", 1)
    assert (tmp_path / "c.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(1), TypeError("a mistake"), InputError("a bad setting")],
    ids=repr,
)
def test_an_exception_in_the_middle_leaves_the_old_file_alone(
    old: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        write_atomically(old, half_then(error))
    assert caught.value is error
    assert old.read_text() == "old"
    assert names_in(old.parent) == ["numbers.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed writing file: No space left on device"),
    ],
    ids=str,
)
def test_a_full_disk_is_told_and_leaves_the_old_file_alone(old: Path, error: Exception) -> None:
    with pytest.raises(InputError, match=r"numbers\.json: cannot be written") as caught:
        write_atomically(old, half_then(error))
    assert caught.value.__cause__ is error
    assert old.read_text() == "old"
    assert names_in(old.parent) == ["numbers.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_truly_full_device_is_told(old: Path) -> None:
    def write(temporary: Path) -> None:
        with open("/dev/full", "w") as full:
            full.write("x" * 100)

    with pytest.raises(InputError, match="No space left"):
        write_atomically(old, write)
    assert names_in(old.parent) == ["numbers.json"]


def test_a_disk_that_is_full_at_the_last_moment_is_told(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_json(old, 1)
    assert old.read_text() == "old"
    assert names_in(old.parent) == ["numbers.json"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"c\.json: cannot be written"):
        write_json(tmp_path / "taken" / "c.json", 1)
    with pytest.raises(InputError, match=r"c\.json: cannot be written"):
        write_json(tmp_path / "taken" / "deeper" / "c.json", 1)


def test_a_folder_in_the_files_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path / "c.json", 1)
    assert names_in(tmp_path) == ["c.json"]


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ä", True]}, [], "x", {}])
def test_json_comes_back_as_it_was(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_bytes().endswith(b"\n")


def test_numbers_that_json_does_not_have_become_null_and_are_read_as_nan(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": None}})

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no strict JSON")

    assert json.loads(file.read_text(), parse_constant=refused) == {
        "a": [1.5, None, [None]],
        "b": {"c": None, "d": None},
    }
    assert math.isnan(real(read_json(file)["a"][1]))
    assert real(1.5) == 1.5


def test_json_keeps_letters_of_all_languages_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", "Straße")
    assert "Straße".encode() in (tmp_path / "x.json").read_bytes()


def test_a_value_that_is_no_json_leaves_the_old_file_alone(old: Path) -> None:
    with pytest.raises(TypeError):
        write_json(old, {"a": object()})
    assert old.read_text() == "old"
    assert names_in(old.parent) == ["numbers.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} x'])
def test_a_damaged_file_is_told_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.json: does not exist"):
        read_json(tmp_path / "x.json")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


def test_rows_found_now_take_the_place_of_older_ones(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    first = [{"model": "b", "seed": 1, "fsr": 0.1}, {"model": "a", "seed": 0, "fsr": 0.2}]
    assert unite_rows(file, first, ("model", "seed")) == first
    again = {"model": "b", "seed": 1, "fsr": 0.3}
    new = {"model": "b", "seed": 0, "fsr": math.nan}
    rows = unite_rows(file, [again, new], ("model", "seed"), paper={"fsr": 0.5})
    assert [row["fsr"] for row in rows] == [0.3, 0.2, pytest.approx(math.nan, nan_ok=True)]
    kept = read_json(file)
    assert kept["paper"] == {"fsr": 0.5}
    assert [row["fsr"] for row in kept["rows"]] == [0.3, 0.2, None]


def test_a_block_is_put_between_its_own_markers() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n<!-- y:begin -->\n<!-- y:end -->\n"
    new = put_between(text, "x", "new")
    assert new == text.replace("old", "new")
    assert put_between(new, "y", "more") == new.replace("y:begin -->\n", "y:begin -->\nmore\n")


def _add_rows(file: Path, name: str, together: Barrier) -> None:
    together.wait(120)
    for number in range(40):
        unite_rows(file, [{"name": name, "number": number}], ("name", "number"))


def test_two_processes_that_add_rows_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    adding = [spawn.Process(target=_add_rows, args=(file, name, together)) for name in "ab"]
    for process in adding:
        process.start()
    for process in adding:
        process.join(120)
        assert process.exitcode == 0
    assert len(json.loads(file.read_text())["rows"]) == 80
