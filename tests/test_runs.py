"""A run's folder and the checkpoint of a training."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trompe import runs
from trompe.interfaces import EpochRecord, InputError
from trompe.run_shapes import Epoch
from trompe.runs import FileLogbook, Held, RunFolder, fingerprint, provenance

SPEC: dict[str, Any] = {"name": "x", "attack": {"kind": "a", "weight": 0.9, "goals": [None, 1]}}


# --- fingerprint ----------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_fingerprint() -> None:
    reordered = {"attack": {"goals": [None, 1], "weight": 0.9, "kind": "a"}, "name": "x"}
    assert fingerprint(SPEC) == fingerprint(reordered)
    assert fingerprint(SPEC) == fingerprint(json.loads(json.dumps(SPEC)))
    assert len(fingerprint(SPEC)) == 12
    int(fingerprint(SPEC), 16)


@pytest.mark.parametrize(
    "changed",
    [{**SPEC, "name": "y"}, {**SPEC, "attack": {**SPEC["attack"], "weight": 0.91}}, {}],
)
def test_changed_settings_give_another(changed: dict[str, Any]) -> None:
    assert fingerprint(changed) != fingerprint(SPEC)


def test_a_setting_that_is_unset_does_not_count_so_new_ones_leave_old_runs_valid() -> None:
    newer = {**SPEC, "clip": None, "attack": {**SPEC["attack"], "last_beta": None}}
    assert fingerprint(newer) == fingerprint(SPEC)


DATA = {"data": {"root": "here", "size": 8}, "goals": [{"file": "a"}, {"file": "b"}]}


def test_what_lies_in_a_file_counts_not_where_it_is() -> None:
    inputs = {"data.root": "1234", "goals.1.file": "5678"}
    moved = {"data": {"root": "there", "size": 8}, "goals": [{"file": "a"}, {"file": "c"}]}
    assert fingerprint(moved) != fingerprint(DATA)
    assert fingerprint(moved, inputs) == fingerprint(DATA, inputs)
    assert fingerprint(DATA, {**inputs, "data.root": "1235"}) != fingerprint(DATA, inputs)
    assert fingerprint({**moved, "goals": DATA["goals"][:1]}, inputs) != fingerprint(DATA, inputs)


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "x")
    run.open(SPEC)
    return run


def test_opening_keeps_the_spec(folder: RunFolder) -> None:
    assert folder.read("spec") == SPEC
    assert not folder.finished


def test_the_same_run_can_be_opened_again(folder: RunFolder) -> None:
    folder.write("history", [])
    RunFolder(folder.path).open(json.loads(json.dumps(SPEC)))
    assert folder.read("history", list[Epoch]) == []


def test_a_folder_of_another_run_is_refused_and_left_alone(folder: RunFolder) -> None:
    before = (folder.path / "spec.json").read_bytes()
    with pytest.raises(InputError, match="other settings"):
        folder.open({**SPEC, "name": "y"})
    assert (folder.path / "spec.json").read_bytes() == before


def test_a_folder_of_other_inputs_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.open(DATA, {"data.root": "1234"})
    with pytest.raises(InputError, match=r"other data or weights \(inputs\.json\)"):
        run.open(DATA, {"data.root": "1235"})
    assert run.inputs == {"data.root": "1234"}


def test_a_folder_says_where_its_inputs_were_moved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.open(DATA, {"data.root": "1234"})
    moved = {**DATA, "data": {"root": "there", "size": 8}}
    run.open(moved, {"data.root": "1234"})
    assert run.read("spec") == moved


def test_a_folder_that_does_not_know_its_inputs_learns_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.open(DATA)
    run.open(DATA, {"data.root": "1234"})
    assert run.inputs == {"data.root": "1234"}
    with pytest.raises(InputError, match="other settings"):
        run.open({**DATA, "seed": 1}, {"data.root": "1234"})


def test_what_a_kill_left_is_cleared_by_the_next_one_to_work_there(folder: RunFolder) -> None:
    (folder.path / "poison-00").mkdir()
    litter = [".checkpoint.pt.abcd_123", "poison-00/.poison.json.00000000"]
    kept = [".mine", ".gitignore", "checkpoint.pt"]
    for name in (*litter, *kept):
        (folder.path / name).touch()
    with folder.alone():
        assert not any((folder.path / name).exists() for name in litter)
    assert all((folder.path / name).exists() for name in kept)
    folder.write("numbers", {})
    folder.open(SPEC)  # killed between its numbers and the end
    assert not (folder.path / "checkpoint.pt").exists()


def test_one_at_a_time_works_on_a_run(folder: RunFolder) -> None:
    assert not folder.held
    with folder.alone():
        assert folder.held
        with pytest.raises(Held, match="another process"), RunFolder(folder.path).alone(wait=False):
            pass
        with RunFolder(folder.path.with_name("y")).alone(wait=False):
            pass
    assert not folder.held
    with folder.alone(wait=False):
        pass


def test_a_folder_with_a_damaged_spec_is_refused(folder: RunFolder) -> None:
    (folder.path / "spec.json").write_text("{")
    with pytest.raises(InputError, match=r"spec\.json"):
        folder.open(SPEC)


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder(tmp_path / "x").open(SPEC)


def test_settings_that_json_cannot_say_are_the_same_again(tmp_path: Path) -> None:
    for _ in range(2):
        RunFolder(tmp_path / "x").open({"clip": math.inf})


def test_a_run_with_numbers_is_finished(folder: RunFolder) -> None:
    folder.write("numbers", {"a": 1})
    assert folder.finished
    assert folder.read("numbers") == {"a": 1}


def test_a_missing_part_is_named(folder: RunFolder) -> None:
    with pytest.raises(InputError, match=r"has no numbers\.json"):
        folder.read("numbers")
    with pytest.raises(InputError, match=r"has no spec\.json"):
        RunFolder(folder.path / "nowhere").read("spec")


def test_a_folder_is_discarded_only_if_it_holds_nothing_but_its_spec(folder: RunFolder) -> None:
    folder.write("history", [])
    folder.discard_if_empty()
    assert folder.read("spec") == SPEC
    (folder.path / "history.json").unlink()
    folder.discard_if_empty()
    assert not folder.path.exists()


def test_tensors_come_back_as_they_were(folder: RunFolder) -> None:
    tensors = {
        "maps": torch.rand(3, 4, 5).transpose(1, 2),  # not contiguous
        "expanded": torch.rand(1, 2).expand(3, 2),
        "labels": torch.tensor([1, 2]),
        "images": torch.zeros(2, 3, dtype=torch.uint8),
    }
    folder.write_tensors("evidence", tensors)
    read = folder.read_tensors("evidence")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert all(read[key].dtype == tensors[key].dtype for key in tensors)


def test_epochs_come_back_and_what_is_to_be_looked_at_is_kept_beside_them(
    folder: RunFolder,
) -> None:
    plain = EpochRecord(1, {"prediction": 0.5}, {"score": 1.5}, 2.0)
    folder.write_history([plain])
    assert folder.read_history() == (plain,)
    assert not (folder.path / "timeline.safetensors").exists()
    folder.write_history([plain._replace(measured={"score": math.nan})])
    assert folder.read("history", list[Epoch])[0]["measured"] == {"score": None}
    assert math.isnan(folder.read_history()[0].measured["score"])
    maps = torch.rand(2, 3, 3)
    folder.write_history([plain, plain._replace(epoch=2, shown={"maps": maps})])
    assert [record.epoch for record in folder.read_history()] == [1, 2]
    assert torch.equal(folder.read_tensors("timeline")["2.maps"], maps)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x10\0\0\0\0\0\0\0{}"])
def test_missing_or_damaged_tensors_are_told(folder: RunFolder, content: bytes | None) -> None:
    if content is not None:
        (folder.path / "evidence.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"evidence\.safetensors cannot be read"):
        folder.read_tensors("evidence")


def test_what_files_lack_is_told(folder: RunFolder) -> None:
    folder.write_tensors("evidence", {"clean.maps": torch.zeros(2)})
    assert folder.read_tensors("evidence").keys() == {"clean.maps"}
    with pytest.raises(InputError, match=r"evidence\.safetensors: lacks 'clean\.scores'"):
        folder.read_tensors("evidence")["clean.scores"]
    logbook = FileLogbook(folder.path / "checkpoint.pt")
    logbook.save({"history": []})
    loaded = logbook.load()
    assert loaded == {"history": []}
    with pytest.raises(InputError, match=r"checkpoint\.pt: lacks 'model'.*; remove it to start"):
        loaded["model"]


# --- the logbook ----------------------------------------------------------------------------------


def state_of_a_training() -> dict[str, Any]:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(1, 2)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {"last_epoch": 3, "_last_lr": [0.1]},
        "generator": torch.Generator().get_state(),
        "history": [(1, {"prediction": 0.5}, {"score": 1.5}, 2.0)],
    }


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = state_of_a_training()
    FileLogbook(tmp_path / "checkpoint.pt").save(state)
    loaded = FileLogbook(tmp_path / "checkpoint.pt").load()
    assert loaded is not None
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert torch.equal(loaded["generator"], state["generator"])
    moments = [s["optimizer"]["state"][0]["exp_avg"] for s in (loaded, state)]
    assert torch.equal(*moments)
    assert [EpochRecord(*r) for r in loaded["history"]] == [
        EpochRecord(1, {"prediction": 0.5}, {"score": 1.5}, 2.0)
    ]


def test_without_a_file_there_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    assert FileLogbook(tmp_path / "checkpoint.pt").load() is None


def test_the_number_of_threads_is_kept(tmp_path: Path) -> None:
    logbook = FileLogbook(tmp_path / "checkpoint.pt")
    torch.set_num_threads(2)
    logbook.save(state_of_a_training())
    torch.set_num_threads(1)
    logbook.load()
    assert torch.get_num_threads() == 2


class Executed:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "another file", "no table", "evil"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, damage: str) -> None:
    file, marker = tmp_path / "checkpoint.pt", tmp_path / "marker"
    logbook = FileLogbook(file)
    logbook.save(state_of_a_training())
    if damage in ("empty", "junk", "cut"):
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "junk": b"junk", "cut": whole[: len(whole) // 2]}[damage])
    else:
        torch.save(
            {"another file": {"a": 1}, "no table": [1], "evil": Executed(marker)}[damage], file
        )
    with pytest.raises(InputError, match="remove it") as caught:
        logbook.load()
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)  # one sentence
    assert not marker.exists()
    assert file.exists()


def test_a_failed_save_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logbook = FileLogbook(tmp_path / "checkpoint.pt")
    logbook.save(state_of_a_training())
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be written"):
        logbook.save(state_of_a_training())
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.heard.append((epoch, step, steps, dict(terms)))

    def epoch(self, record: EpochRecord) -> None:
        self.heard.append(record)


def test_the_listener_hears_of_every_step_and_epoch(tmp_path: Path) -> None:
    listener = Listener()
    logbook = FileLogbook(tmp_path / "checkpoint.pt", listener)
    logbook.step(1, 2, 3, {"prediction": 0.5})
    logbook.save(state_of_a_training())
    record = EpochRecord(1, {"prediction": 0.5}, {"score": 1.5}, 2.0)
    assert listener.heard == [(1, 2, 3, {"prediction": 0.5}), record]


def test_a_closed_logbook_leaves_no_checkpoint(tmp_path: Path) -> None:
    logbook = FileLogbook(tmp_path / "checkpoint.pt")
    logbook.close()
    logbook.save(state_of_a_training())
    logbook.close()
    assert list(tmp_path.iterdir()) == []


# --- provenance -----------------------------------------------------------------------------------


def test_provenance_says_where_and_with_what_in_plain_json() -> None:
    made = json.loads(json.dumps(provenance(torch.device("cpu"))))
    assert made["torch"] == torch.__version__
    assert made["threads"] == 1
    assert made["device"]
    for key in ("trompe", "torchvision", "python", "commit", "command", "started", "cores"):
        assert key in made


def test_the_command_is_told_without_where_things_lie_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["replicate", "table1", "a/b", "--data", "/one/machines/data", "--root=/its/runs/"]
    monkeypatch.setattr("sys.argv", ["/one/bin/trompe", *words])
    made = provenance(torch.device("cpu"))
    assert made["command"] == "trompe replicate table1 a/b --data data --root=runs"


def test_the_commit_is_unknown_outside_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git either
    runs._commit.cache_clear()
    assert provenance(torch.device("cpu"))["commit"] == ""
    runs._commit.cache_clear()


def test_the_commit_is_that_of_the_code_which_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = provenance(torch.device("cpu"))["commit"]
    monkeypatch.setenv("PATH", "")
    assert provenance(torch.device("cpu"))["commit"] == before
