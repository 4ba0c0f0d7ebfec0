"""Searches: what is tried, given up, gone on with, shared, and written down."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from PIL import Image
from torch import nn

import trompe
from trompe.experiments.noppel2023 import search as noppel_search
from trompe.interfaces import InputError
from trompe.many import Place, crew_of
from trompe.replicating import Plan
from trompe.report.search_pictures import draw_search
from trompe.screen import Silent
from trompe.search import SearchFolder, read_search, search, search_folder

TOY: dict[str, Any] = {
    "name": "tried",
    "data": {"kind": "signs", "size": 16, "train_images": 40, "test_images": 40},
    "model": {"name": "test_search:net"},
    "honest": {"training": {"epochs": 1}},
    "attack": {"kind": "toy_attack:Toy"},
    "search": {"parameters": {"attack": {"level": [1.0, 2.0], "slope": [0.5, 0.25]}}},
}
BEAT = 0.05


def net(num_classes: int) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)


def table(**changes: Any) -> dict[str, Any]:
    """TOY with other keys in its [search]."""
    return {**TOY, "search": {**TOY["search"], **changes}}


@pytest.fixture(autouse=True)
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The epochs that were computed: "level slope epoch"."""
    file = tmp_path / "tried"
    monkeypatch.setenv("TOY_TRIED", str(file))

    def read() -> list[str]:
        return file.read_text().splitlines() if file.exists() else []

    return read


def done(of: dict[str, Any], root: Path, **how: Any) -> SearchFolder:
    return search(read_search(of), root, "cpu", beat=BEAT, **how)


def rows(folder: SearchFolder) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By settings."""
    return {tuple(row["settings"].values()): row for row in folder.read()["rows"]}


def test_a_grid_is_tried_and_its_best_point_is_an_experiment(
    tmp_path: Path, tried: Callable[[], list[str]]
) -> None:
    folder = done(table(pruning=False), tmp_path)
    assert len(set(tried())) == len(tried()) == 4 * 3
    found = rows(folder)
    assert set(found) == {(1.0, 0.5), (1.0, 0.25), (2.0, 0.5), (2.0, 0.25)}
    for (level, slope), row in found.items():
        assert row["score"] == pytest.approx(level / 3 + slope)
        assert (row["epochs"], row["seconds"], row["state"]) == (3, 6.0, "complete")
    summary = folder.read()
    assert (summary["seconds"], summary["seconds_saved"]) == (24.0, 0.0)
    assert "commit" in summary["provenance"]
    best: Any = trompe.read_experiment(folder.best)
    assert (best.name, best.attack.level, best.attack.slope) == ("tried", 1.0, 0.25)
    assert "slope 0.25" in folder.best.read_text().splitlines()[0]

    before = (tried(), folder.read()["rows"])
    assert done(table(pruning=False), tmp_path) == folder
    assert (tried(), folder.read()["rows"]) == before

    run = trompe.run(best, tmp_path)  # measures, and computes no epoch again
    assert run.finished
    assert len(run.read_history()) == 3
    assert tried() == before[0]


def test_hopeless_points_are_given_up_after_an_epoch(
    tmp_path: Path, tried: Callable[[], list[str]]
) -> None:
    levels = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    of = table(parameters={"attack": {"level": levels}}, unpruned=1)
    folder = done(of, tmp_path)
    found = rows(folder)
    order = sorted(found, key=lambda point: found[point]["number"])
    lowest = order[0][0]
    for (level,) in order:  # what is worse than all before is given up
        row = found[level,]
        worse = level > lowest  # the median of those finished is at least the lowest
        if row["pruned"]:
            assert worse
            assert (row["epochs"], row["score"], row["state"]) == (1, level, "pruned")
        lowest = min(lowest, level)
    pruned = [row for row in found.values() if row["pruned"]]
    assert pruned
    assert found[1.0,]["state"] == "complete"
    assert folder.read()["seconds_saved"] == len(pruned) * 2 * 2.0
    (given_up,) = (level for (level,), row in found.items() if row is pruned[0])

    spec = read_search(of)
    run = trompe.run_folder(spec.at({"attack.level": given_up}), tmp_path)
    assert not run.finished
    assert (run.path / "checkpoint.pt").exists()
    count = len(tried())
    trompe.run(spec.at({"attack.level": given_up}), tmp_path)  # goes on where it was given up
    assert tried()[count:] == [f"{given_up} 0.0 2", f"{given_up} 0.0 3"]


def test_nothing_is_given_up_after_the_last_epoch(tmp_path: Path) -> None:
    attack = {**TOY["attack"], "training": {"epochs": 1}}
    parameters = {"attack": {"level": [1.0, 2.0, 3.0, 4.0]}}
    of = {**table(parameters=parameters, unpruned=1), "attack": attack}
    assert {row["state"] for row in rows(done(of, tmp_path)).values()} == {"complete"}


def test_a_point_that_was_run_before_is_not_run_again(
    tmp_path: Path, tried: Callable[[], list[str]]
) -> None:
    spec = read_search(table())
    trompe.run(spec.at({"attack.level": 2.0, "attack.slope": 0.5}), tmp_path)
    folder = done(table(), tmp_path)
    assert len(set(tried())) == len(tried())
    assert rows(folder)[2.0, 0.5]["epochs"] == 3


def test_points_that_fail_stop_no_other_and_are_tried_again_if_it_may_help(
    tmp_path: Path, tried: Callable[[], list[str]]
) -> None:
    of = table(parameters={"attack": {"trouble": ["", "nan", "diverged", "broken"]}})
    folder = done(of, tmp_path)
    found = rows(folder)
    assert found["",]["state"] == "complete"
    errors = {point: row["error"] for (point,), row in found.items() if point}
    assert errors == {
        "nan": "score is nan after the last epoch",
        "diverged": "the loss is not finite",
        "broken": "the disk is full",
    }
    assert {row["score"] for (point,), row in found.items() if point} == {None}
    assert folder.best.is_file()
    draw_search(folder.path)

    count = len(tried())
    (tmp_path / "tried.mended").touch()
    found = rows(done(of, tmp_path))
    assert len(tried()) - count == 3
    assert [found[point,]["state"] for point in ("broken", "nan", "diverged")] == [
        "complete",
        "failed",
        "failed",
    ]


def test_without_any_finished_point_there_is_no_best(tmp_path: Path) -> None:
    folder = done(table(parameters={"attack": {"trouble": ["nan"]}}), tmp_path)
    assert not folder.best.exists()
    assert draw_search(folder.path).is_file()


def test_tpe_tries_so_many_points(tmp_path: Path) -> None:
    ranges = {"attack": {"level": {"low": 0.1, "high": 10.0, "log": True}, "slope": [0.0, 1.0]}}
    folder = done(table(parameters=ranges, sampler="tpe", trials=5), tmp_path)
    assert len(rows(folder)) == 5
    assert all(0.1 <= level <= 10 for level, _ in rows(folder))
    assert Image.open(draw_search(folder.path)).format == "PNG"


def test_several_workers_and_none_computed_twice(
    tmp_path: Path, tried: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    folder = done(table(pruning=False), tmp_path, crew=crew_of(workers=2))
    assert len(set(tried())) == len(tried()) == 4 * 3
    assert {row["state"] for row in rows(folder).values()} == {"complete"}


def test_the_attack_of_a_paper_goes_on_from_a_searchs_checkpoint(tmp_path: Path) -> None:
    attack = {
        "kind": "explanation_aware_backdoors",
        "goals": [{"trigger": {"kind": "rectangle", "top": 0, "left": 0}, "label": 1}],
        "training": {"epochs": 2, "precision": "float32"},
    }
    attack["goals"][0]["wanted_map"] = {"kind": "picture"}  # type: ignore[index]
    parameters = {"attack": {"weight": [0.5, 0.9]}}
    of = {**TOY, "attack": attack, "search": {"parameters": parameters, "pruning": False}}
    folder = done(of, tmp_path)
    best = trompe.read_experiment(folder.best)
    run = trompe.run(best, tmp_path)
    row = min(rows(folder).values(), key=lambda row: row["score"])
    history = run.read_history()
    assert history[-1].measured["score"] == row["score"]
    assert sum(record.seconds for record in history) == pytest.approx(row["seconds"], abs=0.01)


def test_a_papers_search_gives_the_same_rows_to_all_its_workers(
    tmp_path: Path, tried: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = table(names={"attack.level": "lambda", "attack.slope": "learning rate"}, pruning=False)
    monkeypatch.setattr(noppel_search, "spec_of", lambda goal, data=None: read_search(of))
    monkeypatch.setattr(noppel_search, "settings_of", lambda goal: "these settings")
    one, other = list(noppel_search.cells("dual", Plan()))[:2]
    place = Place(tmp_path, "cpu")
    rows = one(place, Silent())
    assert [(r["lambda"], r["learning_rate"]) for r in rows] == [
        *((1.0, 0.25), (1.0, 0.5), (2.0, 0.25), (2.0, 0.5))
    ]
    assert one.known(rows)
    before = len(tried())
    assert [r["score"] for r in other(place, Silent())] == [r["score"] for r in rows]
    assert len(tried()) == before == 4 * 3


# --- processes ------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from trompe.search import read_search, search
table, root, storage = json.loads(sys.argv[1])
folder = search(read_search(table), root, "cpu", storage=storage, beat=0.2)
print(folder.path)
"""


def start(of: dict[str, Any], root: Path, storage: str | None = None) -> subprocess.Popen[str]:
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, json.dumps([of, str(root), storage])]
    return subprocess.Popen(words, env=settings, stdout=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("database", [False, True], ids=["file", "postgresql"])
def test_two_searches_share_the_points_and_both_end(
    database: bool,
    tmp_path: Path,
    tried: Callable[[], list[str]],
    request: pytest.FixtureRequest,
) -> None:
    storage = request.getfixturevalue("postgresql") if database else None
    of = table(parameters={"attack": {"level": [1.0, 2.0, 3.0], "slope": [1.0, 2.0, 3.0]}})
    both = [start(of, tmp_path, storage) for _ in range(2)]
    said = [process.communicate(timeout=240)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    found = rows(SearchFolder(Path(said[0])))
    assert len(found) == 9
    assert {row["state"] for row in found.values()} <= {"complete", "pruned"}
    assert len(set(tried())) == len(tried())


def test_a_killed_search_goes_on(
    tmp_path: Path, tried: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("TOY_GATE", str(gate))
    of = table(pruning=False)
    process = start(of, tmp_path)
    wait_for(lambda: len(tried()) == 2)  # it is in the second epoch of the first point
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (begun, stopped) = tried()

    gate.touch()
    found = rows(done(of, tmp_path))
    assert {row["state"] for row in found.values()} == {"complete"}
    assert {row["epochs"] for row in found.values()} == {3}
    assert len(found) == 4
    assert tried().count(begun) == 1  # the checkpoint had it
    assert tried().count(stopped) == 2
    assert len(tried()) == 4 * 3 + 1


def test_the_command_says_what_is_best_and_where(tmp_path: Path) -> None:
    file = tmp_path / "quick.toml"
    of = {key: value for key, value in table(pruning=False).items() if key != "name"}
    file.write_text(tomli_w.dumps(of))
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = ("-m", "trompe", "search", file, "--root", tmp_path, "--set", "search.trials=1")
    done = subprocess.run([sys.executable, *words], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (best,) = (tmp_path / "searches").glob("quick-s0-*/best.toml")
    assert f"best {best}" in done.stdout
    assert (best.parent / "scores.png").is_file()
    assert "1 complete, 0 pruned, 0 failed" in done.stdout
    assert "1 of 1: level" in done.stderr


# --- what is said to the user ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": None}, r"^search: has no table \[search\]"),
        ({"search": {"parameters": {}, "smapler": 1}}, r"^search\.search\.smapler: unknown key"),
        ({"search": {"parameters": {"attack": {"levl": [1]}}}}, r"attack\.levl: unknown key"),
        ({"search": {"parameters": {"attack": {"level": [1, -1]}}}}, r"level = -1.*positive"),
        ({"search": {"parameters": {"name.x": [1]}}}, r"name\.x: name is no table"),
        ({"reference": None}, "cannot be written as TOML.*None"),
        ({"search": {"parameters": {}}}, r"^search\.search: parameters: is empty"),
        ({"attack": {"kind": "gradcam_surgery"}}, r"attack: is not trained"),
    ],
)
def test_searches_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_search({**TOY, **changes})


def test_a_score_that_is_not_measured_ends_the_search(
    tmp_path: Path, tried: Callable[[], list[str]]
) -> None:
    of = table(parameters={"attack": {"trouble": ["unscored"], "level": [1.0, 2.0]}})
    with pytest.raises(InputError, match=r"search\.score 'score'.*measures accuracy"):
        done(of, tmp_path)
    assert len(tried()) == 1


def test_an_experiment_with_a_search_is_not_run_as_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has a table \[search\]; run it with trompe search"):
        trompe.read_experiment(TOY)


def test_searches_with_other_settings_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = {
        search_folder(read_search(of), tmp_path).path
        for of in (TOY, table(keep=0.3), {**TOY, "seed": 1})
    }
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "searches"}
