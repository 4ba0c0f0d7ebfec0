"""A study hands out each point once, to all that ask."""

import itertools
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from optuna.trial import TrialState

from trompe.interfaces import InputError
from trompe.studies import (
    Search,
    Study,
    error_of,
    reaching,
    state_of,
    without_password,
)

GRID = Search({"x": [1, 2, 3], "y": ["a", "b"]})
FEW = Search({"x": [1, 2]}, pruning=False)
BEAT = 0.05

New = Callable[..., Study]


def opener(storage: str, name: str) -> New:
    return lambda search=GRID: Study(storage, name, search, 0, BEAT)


@pytest.fixture
def new(tmp_path: Path) -> New:
    """Opens the same study again and again, as one search after the other does."""
    return opener(str(tmp_path / "study.log"), "study")


@pytest.fixture(params=["file", "postgresql"])
def anywhere(request: pytest.FixtureRequest, new: New, tmp_path: Path) -> New:
    """The same, in a file and in a database."""
    if request.param == "file":
        return new
    return opener(request.getfixturevalue("postgresql"), tmp_path.name)


def finish(study: Study, score: float = 1.0, **how: Any) -> dict[str, Any]:
    trial = study.ask()
    assert trial is not None
    study.tell(trial.number, score, {}, **how)
    return trial.params


def all_of(study: Study, found: list[dict[str, Any]]) -> None:
    while (trial := study.ask()) is not None:
        found.append(trial.params)
        study.tell(trial.number, 0.0, {})


def distinct(points: list[dict[str, Any]]) -> set[Any]:
    return {tuple(sorted(point.items())) for point in points}


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(BEAT)


def test_a_grid_is_tried_once_and_in_random_order(new: New) -> None:
    study, found = new(), []
    all_of(study, found)
    assert len(found) == len(distinct(found)) == 6
    assert [point["x"] for point in found] != sorted(point["x"] for point in found)
    assert study.done
    assert not study.left


def test_searches_that_ask_at_once_get_each_point_once(anywhere: New) -> None:
    studies, found = (
        [anywhere() for _ in range(4)],
        list[list[dict[str, Any]]]([] for _ in range(4)),
    )
    threads = [
        threading.Thread(target=all_of, args=pair) for pair in zip(studies, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    points = list(itertools.chain.from_iterable(found))
    assert len(points) == len(distinct(points)) == 6
    assert all(study.done for study in studies)


def test_a_limit_takes_a_part_of_the_grid(new: New) -> None:
    study, found = new(Search({"x": [1, 2, 3], "y": ["a", "b"]}, trials=4)), []
    all_of(study, found)
    assert len(found) == len(distinct(found)) == 4


def test_what_a_dead_search_had_is_handed_out_again(anywhere: New) -> None:
    dead, alive = anywhere(FEW), anywhere(FEW)
    lost = dead.ask()
    assert lost is not None
    other = finish(alive)
    assert alive.ask() is None
    assert not alive.done

    wait_for(lambda: alive.take_back() or alive.left)
    again = alive.ask()
    assert again is not None
    assert again.params == lost.params != other
    alive.tell(again.number, 2.0, {})
    assert alive.done
    assert [trial.value for trial in alive.points()] == [2.0, 1.0]

    dead.tell(lost.number, 3.0, {"epochs": 9})  # it was only slow: too late
    assert [trial.value for trial in alive.points()] == [2.0, 1.0]


def test_what_a_living_search_has_is_left_to_it(anywhere: New) -> None:
    first, second = anywhere(FEW), anywhere(FEW)
    with first.alive():
        had = first.ask()
        assert had is not None
        finish(second)
        beats = set()

        def many_beats() -> bool:
            second.take_back()
            beats.add(second.study.user_attrs[first.me])
            return len(beats) > 10  # more than are missed before a search counts as dead

        wait_for(many_beats)
        assert not second.left
        first.tell(had.number, 1.0, {})
    assert second.done


def test_a_search_that_ended_leaves_its_points_at_once(new: New) -> None:
    first, second = new(FEW), new(FEW)
    with first.alive():
        left = first.ask()
    second.take_back()
    again = second.ask()
    assert left is not None
    assert again is not None
    assert again.params == left.params


def test_of_two_repetitions_the_first_counts(new: New) -> None:
    dead, first, second = new(FEW), new(FEW), new(FEW)
    with dead.alive():
        dead.ask()
    first.take_back()
    again = first.ask()
    assert again is not None
    second._repeat(first.study.get_trials()[0])  # it had looked a moment before
    other = second.ask()
    assert other is not None
    assert distinct([again.params, other.params]) == {(("x", 1),), (("x", 2),)}
    assert first.ask() is second.ask() is None
    first.tell(again.number, 1.0, {})
    second.tell(other.number, 2.0, {})
    assert first.done
    assert [trial.value for trial in first.points()] == [1.0, 2.0]


def test_a_trial_beyond_the_last_point_is_void(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = new(FEW), new(FEW)
    finish(first)
    finish(first)
    answers = iter([True, False])  # a point was left when it looked, and gone when it asked
    with monkeypatch.context() as patch:
        patch.setattr(Study, "left", property(lambda self: next(answers)))
        assert second.ask() is None
    assert len(second.points()) == 2
    assert second.done


def test_a_search_killed_between_two_steps_of_taking_back_loses_nothing(new: New) -> None:
    dead, alive = new(FEW), new(FEW)
    lost = dead.ask()
    assert lost is not None
    dead.study.tell(lost.number, state=TrialState.FAIL)  # and was killed before the repetition
    finish(alive)
    assert not alive.done
    assert state_of(alive.points()[0]) == "running"
    wait_for(lambda: alive.take_back() or alive.left)
    assert finish(alive) == lost.params
    assert alive.done


def test_a_failed_point_is_tried_again_if_it_may_go_well(new: New) -> None:
    study = new(FEW)
    final = finish(study, error="diverged")
    broken = finish(study, error="disk full", final=False)
    assert study.done
    assert {error_of(trial) for trial in study.points()} == {"diverged", "disk full"}
    study.take_back()
    assert study.done
    study.take_back(failed=True)
    assert not study.done
    assert finish(study) == broken != final
    assert study.done
    assert {state_of(trial) for trial in study.points()} == {"complete", "failed"}


def test_tpe_draws_from_ranges_and_searches_do_not_draw_the_same(anywhere: New) -> None:
    ranges = {"x": {"low": 1e-4, "high": 1e-1, "log": True}, "n": {"low": 1, "high": 9}}
    search = Search({**ranges, "z": [True, False]}, sampler="tpe", trials=12)
    found = list[dict[str, Any]]()
    for _ in range(3):  # a search that begins again draws on
        study = anywhere(search)
        for _ in range(4):
            found.append(finish(study, score=float(len(found))))
    assert anywhere(search).done
    assert len(distinct(found)) == 12
    assert all(1e-4 <= point["x"] <= 1e-1 and isinstance(point["n"], int) for point in found)


def test_a_point_among_the_worse_half_is_hopeless(anywhere: New) -> None:
    search = Search({"x": [1, 2, 3, 4]}, unpruned=2)
    study = anywhere(search)
    for score in (1.0, 2.0):
        trial = study.ask()
        assert trial is not None
        ticket = study.ticket(trial)
        assert not ticket.report(1, score)
        assert not ticket.report(2, 0.5)
        study.tell(trial.number, 0.5, {})
    good, bad = study.ask(), study.ask()
    assert good is not None
    assert bad is not None
    assert not study.ticket(good).report(1, 1.4)
    assert study.ticket(bad).report(1, 1.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert study.ticket(bad).report(1, 1.6)  # a job that is done again tells it again
    study.tell(bad.number, 1.6, {}, pruned=True)
    assert not study.ticket(bad).report(2, 9.0)  # nobody waits for it
    assert [state_of(trial) for trial in study.points()][2:] == ["running", "pruned"]


# --- what is said to the user ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"parameters": {}}, "parameters: is empty"),
        ({"parameters": {"x": []}}, r"parameters\.x = \[\]: must be a list"),
        ({"parameters": {"x": 3}}, r"parameters\.x = 3: must be a list"),
        ({"parameters": {"x": [[1]]}}, r"parameters\.x: holds more than"),
        ({"parameters": {"x": {"low": 0, "high": 1}}}, r"parameters\.x: is a range.*tpe"),
        (
            {"parameters": {"x": {"low": 2, "high": 1}}, "sampler": "tpe", "trials": 1},
            r"parameters\.x: is no range",
        ),
        (
            {"parameters": {"x": {"low": 1.0, "high": 2.0, "lg": 1}}, "sampler": "tpe"},
            r"parameters\.x: is no range.*lg",
        ),
        ({"parameters": {"x": [1]}, "sampler": "tpe"}, "trials: is missing"),
        ({"parameters": {"x": [1]}, "trials": 0}, "trials = 0"),
        ({"parameters": {"x": [1]}, "keep": 0.0}, r"keep = 0\.0"),
        ({"parameters": {"x": [1]}, "unpruned": 0}, "unpruned = 0"),
        ({"parameters": {"x": [1]}, "names": {"y": "z"}}, r"names\.y: is none"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Search(**settings)


def test_parameters_are_called_by_the_last_part_of_their_key_if_that_is_clear() -> None:
    search = Search({"a.x": [1], "a.n": [1], "b.n": [1], "c": [1]}, names={"c": "lambda"})
    assert [search.name(key) for key in search.parameters] == ["x", "a.n", "b.n", "lambda"]


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("postgresql://me:secret@127.0.0.1:9/x", "127.0.0.1:9/x: cannot be used.*refused"),
        ("nosuch://me:secret@there/x", "there/x: cannot be used"),
        ("mysql+pymysql://me:secret@there/x", "needs a package that is not there.*pymysql"),
        ("/proc/no/study.log", "cannot be written"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_sentence(storage: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        Study(storage, "x", GRID, 0)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_database_that_goes_away_is_one_sentence(postgresql: str) -> None:
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("create database gone")
        study = Study(postgresql.replace("/postgres?", "/gone?"), "x", GRID, 0)
        connection.execute("drop database gone with (force)")
    with (
        pytest.raises(InputError, match=r"cannot be used.*does not exist") as raised,
        reaching(postgresql),
    ):
        study.ask()
    assert "\n" not in str(raised.value)


def test_passwords_are_left_out() -> None:
    text = "trompe search x.toml --storage postgresql://me:s3cr:et@host/db --root runs"
    expected = "trompe search x.toml --storage postgresql://me:***@host/db --root runs"
    assert without_password(text) == expected
    assert without_password("sqlite:///runs/a:b@c") == "sqlite:///runs/a:b@c"
