"""Many run folders: list, choose, compare, remove, rename."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trompe import catalog, runs
from trompe.classifier import ModelSpec
from trompe.clean_models import HonestTraining
from trompe.cli import main
from trompe.data.image_folder import ImageFolder
from trompe.experiment import read_experiment, run_folder
from trompe.interfaces import InputError
from trompe.measure_victims import victims_name
from trompe.poisoning import Victims, read_poisoning
from trompe.run_list import choose, differences, headline, list_runs, remove, rename_old
from trompe.runs import FileLogbook, RunFolder

ATTACK: dict[str, Any] = {
    "name": "dual",
    "data": {"kind": "signs", "size": 24},
    "attack": {
        "kind": "explanation_aware_backdoors",
        "goals": [
            {
                "trigger": {"kind": "rectangle"},
                "label": 3,
                "wanted_map": {"kind": "border", "k": 1},
            }
        ],
    },
}
POISON: dict[str, Any] = {
    "name": "poison",
    "data": {"kind": "breast_cancer"},
    "attack": {
        "kind": "interpretation_poisoning",
        "explainer": {"kind": "input_gradient"},
        "wanted_map": {"kind": "scattered"},
    },
}


def spec_of(**changes: Any) -> dict[str, Any]:
    spec = catalog.describe(read_experiment({**ATTACK, **changes}))
    return json.loads(json.dumps(spec))


def condition(name: str, accuracy: float, distance: float, success: float | None) -> dict[str, Any]:
    means = {"accuracy": accuracy, "map_distance": distance, "attack_success": success}
    return {"name": name, "metrics": {k: {"mean": v} for k, v in means.items() if v is not None}}


def attack_run(root: Path, called: str, finished: bool = True, **changes: Any) -> RunFolder:
    """A run's folder, without its tensors."""
    folder = RunFolder(root / called)
    folder.open(spec_of(**changes))
    if finished:
        folder.write("provenance", {"started": f"2026-01-0{called[-1]}T10:00:00+00:00"})
        rows = [condition("clean", 0.91, 0.2, None), condition("triggered", 0.5, 0.05, 0.97)]
        folder.write("numbers", {"conditions": rows})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two finished attacks, one interrupted after 2 of 4 epochs, poison, a clean model, garbage."""
    root = tmp_path / "runs"
    light = {**ATTACK["attack"], "weight": 0.7}
    attack_run(root, "dual-s0-1", seed=0)
    attack_run(root, "dual-s1-2", seed=1, attack=light)
    training = {**ATTACK["attack"], "training": {"epochs": 4}}
    stopped = attack_run(root, "stopped-s0-3", False, name="stopped", attack=training)
    state = {"model": {"w": torch.ones(3)}, "history": [(1, {}, {}, 1.0), (2, {}, {}, 1.0)]}
    FileLogbook(stopped.path / "checkpoint.pt").save(state)
    poison = RunFolder(root / "poison-s0-4")
    poison.open(catalog.describe(read_poisoning(POISON)))
    poison.write("provenance", {"started": "2026-01-04T10:00:00+00:00"})
    poison.write("numbers", {"targets": 2, "poisons": 26, "poison_rate": 0.05})
    poison.write("victims-12", {"succeeded": 1, "poisoned": {"l1": 0.1, "victim_accuracy": 0.9}})
    clean = RunFolder(root / "clean" / "signs-resnet20-s7-5")
    spec = {"data": spec_of()["data"], "model": {}, "honest": {"training": {"epochs": 5}}}
    clean.open({**spec, "seed": 7})
    clean.write("provenance", {"started": "2026-01-05T10:00:00+00:00"})
    clean.write("numbers", {"test_accuracy": 0.88})
    (root / "broken-s0-6").mkdir()
    (root / "broken-s0-6" / "spec.json").write_bytes(b"\x00garbage")
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("no run")
    return root


def names(runs: list[Any]) -> list[str]:
    return [run.name for run in runs]


def test_all_kinds_and_states_are_listed(root: Path) -> None:
    found = {run.name: run for run in list_runs([root])}
    assert {name: (run.kind, run.told_state) for name, run in found.items()} == {
        "dual-s0-1": ("attack", "finished"),
        "dual-s1-2": ("attack", "finished"),
        "stopped-s0-3": ("attack", "interrupted at epoch 2 of 4"),
        "poison-s0-4": ("poison", "finished"),
        "signs-resnet20-s7-5": ("clean model", "finished"),
        "broken-s0-6": ("", "damaged"),
    }
    assert found["signs-resnet20-s7-5"].seed == 7
    files = (root / "poison-s0-4").rglob("*")
    assert found["poison-s0-4"].size == sum(file.stat().st_size for file in files)
    shown = [headline(found["dual-s0-1"], title) for title in ("accuracy", "ASR", "map MSE")]
    assert shown == ["0.9100", "0.9700", "0.0500"]
    assert headline(found["signs-resnet20-s7-5"], "accuracy") == "0.8800"


def test_the_newest_come_first(root: Path) -> None:
    finished = choose(list_runs([root]), ["state=finished"])
    assert [name[-1] for name in names(finished)] == ["5", "4", "2", "1"]


def test_a_run_at_work_is_said_to_be(root: Path) -> None:
    stopped = root / "stopped-s0-3"
    with RunFolder(stopped).alone():
        (run,) = list_runs([stopped])
        assert run.told_state == "being made now, at epoch 2 of 4"
        assert remove(run) == f"{stopped}: kept, a process works on it"
    assert (stopped / "spec.json").exists()
    (run,) = list_runs([stopped])
    assert run.state == "interrupted"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("spec.json", "[]"),
        ("spec.json", "3"),
        ("spec.json", '{"attack": 3}'),
        ("spec.json", "{}"),
        ("numbers.json", "{}"),
        ("numbers.json", '{"conditions": [{"name": 1, "metrics": 3}]}'),
        ("provenance.json", "{"),
        ("inputs.json", "{"),
    ],
)
def test_damaged_files_are_a_state_not_an_error(root: Path, file: str, content: str) -> None:
    (root / "dual-s0-1" / file).write_text(content)
    (run,) = list_runs([root / "dual-s0-1"])
    assert run.state == "damaged"


def test_a_damaged_checkpoint_tells_no_epoch(root: Path) -> None:
    (root / "stopped-s0-3" / "checkpoint.pt").write_bytes(b"junk")
    (run,) = list_runs([root / "stopped-s0-3"])
    assert run.told_state == "interrupted"


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        (["state=finished", "kind=attack"], {"1", "2"}),
        (["attack.weight=0.70"], {"2"}),
        (["attack.weight=0.*", "seed=1"], {"2"}),
        (["name=dual"], {"1", "2"}),
        (["name=*-s0-?"], {"1", "3", "4", "6"}),
        (["kind=clean*"], {"5"}),
        (["attack.goals.0.label=3", "reference=none"], {"1", "2", "3"}),
        (["state=damaged"], {"6"}),
        (["seed=99"], set()),
    ],
)
def test_runs_are_chosen_by_what_they_are(root: Path, filters: list[str], chosen: set[str]) -> None:
    assert {name[-1] for name in names(choose(list_runs([root]), filters))} == chosen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attack.wieght=1", r"no run has 'attack\.wieght'; did you mean 'attack\.weight'\?"),
        ("attack.weight", r"must read KEY=VALUE"),
        ("zzzzzzz=1", r"no run has 'zzzzzzz'; spec\.json in a run's folder shows"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_named(root: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        choose(list_runs([root]), [text])


def test_runs_differ_in_what_is_not_the_same(root: Path) -> None:
    found = list_runs([root / "dual-s0-1", root / "dual-s1-2"])
    assert differences(found) == {"attack.weight": ["0.7", "0.9"], "seed": ["1", "0"]}


def test_runs_of_other_data_in_the_same_place_differ(tmp_path: Path) -> None:
    for name in "ab":
        RunFolder(tmp_path / name).open(spec_of(), {"data.root": name * 64})
    ((key, values),) = differences(list_runs([tmp_path])).items()
    assert (key, sorted(values)) == ("contents of data.root", ["a" * 12, "b" * 12])


# --- names of earlier versions --------------------------------------------------------------------


def old_name(spec: Any) -> str:
    text = json.dumps(runs._counted(spec, {}), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def renamed(root: Path) -> list[str]:
    said: list[str] = []
    rename_old(list_runs([root]), said.append)
    return said


def test_old_attack_runs_get_the_names_of_today(tmp_path: Path) -> None:
    experiment = read_experiment(ATTACK)
    old = attack_run(tmp_path, f"dual-s0-{old_name(spec_of())}", False)
    assert renamed(tmp_path) == [f"{old.path}: kept, it is not finished"]
    old.write("numbers", {"conditions": []})
    (said,) = renamed(tmp_path)
    new = run_folder(experiment, tmp_path)
    assert said == f"{old.path}: is now {new.path.name}"
    assert new.read("spec") == spec_of()
    assert not old.path.exists()
    assert renamed(tmp_path) == []
    attack_run(tmp_path, old.path.name)
    assert renamed(tmp_path) == [f"{old.path}: kept, as {new.path.name} is there already"]
    with old.alone():
        assert renamed(tmp_path) == [f"{old.path}: kept, a process works on it"]
    assert old.path.exists()


def test_old_clean_models_are_named_after_their_data(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.jpg").write_bytes(b"picture")
    data = ImageFolder(str(tmp_path / "pets"))
    settings = {"data": data, "model": ModelSpec(), "honest": HonestTraining(), "seed": 0}
    spec = json.loads(json.dumps(catalog.describe(settings)))
    old = tmp_path / "runs" / "clean" / f"pets-resnet20-s0-{old_name(spec)}"
    RunFolder(old).open(spec)
    RunFolder(old).write("numbers", {"test_accuracy": 0.9})
    (tmp_path / "pets").rename(tmp_path / "away")
    (said,) = renamed(tmp_path / "runs")
    assert said.startswith(f"{old}: kept; data folder")
    (tmp_path / "away").rename(tmp_path / "pets")
    renamed(tmp_path / "runs")
    inputs = catalog.contents(settings)
    new = RunFolder(old.with_name(f"pets-resnet20-s0-{runs.fingerprint(spec, inputs)}"))
    assert new.inputs == inputs
    assert set(inputs) == {"data.root"}


def test_old_poisons_keep_their_victims(tmp_path: Path) -> None:
    spec = json.loads(json.dumps(catalog.describe(read_poisoning(POISON))))
    old = RunFolder(tmp_path / f"poison-s0-{old_name(spec)}")
    old.open(spec)
    old.write("numbers", {"targets": 2, "poisons": 26, "poison_rate": 0.05})
    victims = json.loads(json.dumps(catalog.describe(Victims(count=3))))
    digest = old_name(victims)
    measured = {"spec": victims, "succeeded": 1, "poisoned": {"l1": 0, "victim_accuracy": 1}}
    old.write(f"victims-{digest}", measured)
    (old.path / f"victims-{digest}.safetensors").touch()
    (old.path / f"maps-{digest}.png").touch()
    renamed(tmp_path)
    (new,) = tmp_path.glob("poison-*")
    name = victims_name(Victims(count=3))
    assert len(new.name.rpartition("-")[2]) == 12
    assert {file.name for file in new.iterdir()} == {
        "spec.json",
        "numbers.json",
        f"{name}.json",
        f"{name}.safetensors",
        f"{name.replace('victims', 'maps')}.png",
    }


def test_a_name_that_is_not_made_from_the_settings_is_left(root: Path) -> None:
    before = {path.name for path in root.iterdir()}
    assert renamed(root) == []
    assert {path.name for path in root.iterdir()} == before


# --- the command ----------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`trompe runs` beside the folder runs/: the exit code and all it said."""

    def done(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trompe", "runs", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err

    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("COLUMNS", "200")
    return done


def test_the_command_lists(call: Call) -> None:
    code, said = call()
    assert code == 0
    assert "6 runs" in said
    (line,) = [line for line in said.splitlines() if "dual-s1-2" in line]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[:5] == ["dual-s1-2", "attack", "finished", "1", "2026-01-02 10:00"]
    assert cells[6:] == ["0.9100", "0.9700", "0.0500"]
    code, said = call("runs", "--interrupted")
    assert code == 0
    assert "stopped-s0-3" in said
    assert "dual" not in said


def test_the_command_compares(call: Call) -> None:
    code, said = call("--compare", "runs/dual-s0-1", "runs/dual-s1-2")
    assert code == 0
    rows = {c[1].strip(): c[2:4] for line in said.splitlines() if len(c := line.split("│")) > 4}
    assert [cell.strip() for cell in rows["attack.weight"]] == ["0.7", "0.9"]
    assert [cell.strip() for cell in rows["triggered: ASR"]] == ["0.9700", "0.9700"]
    assert "attack.goals.0.label" not in rows
    code, said = call("--compare", "--filter", "seed=99")
    assert code == 2
    assert "0 runs found; name or filter at least two" in said


def test_the_command_removes_what_is_filtered(call: Call, root: Path) -> None:
    with RunFolder(root / "dual-s1-2").alone():
        code, said = call("--delete", "--filter", "name=dual", "--yes")
    assert code == 0
    assert "runs/dual-s0-1: removed" in said
    assert "runs/dual-s1-2: kept, a process works on it" in said
    left = {path.name for path in root.iterdir()}
    assert "dual-s0-1" not in left
    assert {"dual-s1-2", "poison-s0-4", "clean", "notes"} <= left
    assert not any(name.startswith(".removed") for name in left)
    code, said = call("--delete", "runs/broken-s0-6", "--yes")
    assert code == 0
    assert not (root / "broken-s0-6").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--delete", "--yes"], "does not say which"),
        (["--delete", "runs", "--yes"], "does not say which"),
        (["runs/notes", "--delete", "--filter", "name=*", "--yes"], "folder runs/notes: is no run"),
        (["nowhere"], "folder nowhere: there is no such folder"),
        (["--delete", "--compare"], "give one of --compare, --delete and --rename"),
    ],
)
def test_the_command_removes_nothing_that_was_not_meant(
    call: Call, root: Path, words: list[str], expected: str
) -> None:
    before = sorted(root.rglob("*"))
    code, said = call(*words)
    assert code == 2
    assert expected in " ".join(said.split())
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("answer", "code", "gone"), [("y\n", 0, True), ("n\n", 0, False), ("", 2, False)]
)
def test_the_command_asks_before_it_removes(
    call: Call, root: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, gone: bool
) -> None:
    (root.parent / "answer").write_text(answer)
    with open(root.parent / "answer") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        ended, said = call("--delete", "runs/dual-s0-1")
    assert ended == code
    assert "Remove 1 runs, 0.0 MB?" in said
    assert (root / "dual-s0-1").exists() != gone


def test_the_command_renames(call: Call, root: Path) -> None:
    old = attack_run(root, f"dual-s0-{old_name(spec_of())}")
    code, said = call("--rename")
    assert code == 0
    assert "is now dual-s0-" in said
    assert not old.path.exists()
