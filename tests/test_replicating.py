"""Which cells are run, what is recorded of them, and the pages made of the rows."""

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from trompe import replicating
from trompe.cli import main
from trompe.files import Row
from trompe.interfaces import InputError
from trompe.many import Place
from trompe.over_seeds import over_seeds
from trompe.replicating import (
    Cause,
    Figure,
    Paper,
    Plan,
    Results,
    Table,
    choose,
    misses,
    page,
    paper_names,
    read_paper,
    replicate,
    same_settings,
    to_run,
)
from trompe.screen import Screen


@dataclass(frozen=True)
class Doubling:
    """Counts to twice its number; "broken" cannot."""

    row: str
    number: int
    seed: int = 0
    usual: bool = True

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def known(self, rows: Sequence[Row]) -> bool:
        own = {"row": self.row, "seed": self.seed, "number": self.number}
        return any(own.items() <= r.items() for r in rows)

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        if self.row == "broken":
            raise InputError("number 13: cannot be doubled")
        twice = 2 * self.number
        return [{"row": self.row, "seed": self.seed, "number": self.number, "twice": twice}]


def cells(plan: Plan) -> Iterator[Doubling]:
    for seed in plan.seeds or (0,):
        yield Doubling("one", 1, seed)
        yield Doubling("two", 2, seed)
        yield Doubling("two/inverted", -2, seed)
        yield Doubling("rare", 1000, seed, usual=False)


def markdown(rows: list[Row]) -> str:
    return "".join(f"| {r['row']} | {r['twice']} |\n" for r in rows)


def figures(rows: list[Row]) -> list[Figure]:
    return [Figure(r["row"], "twice", over_seeds([r["twice"]]), 3.0) for r in rows]


TABLE = Table("table1", ("row", "seed"), cells, markdown, figures)
PAPER = Paper(
    "paper",
    "A paper",
    (TABLE, replace(TABLE, name="table2", seeded=False, small=True)),
    lambda tables: f"{len(tables['table1'])} rows",
)


def names(chosen: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {table: [cell.name for cell in some] for table, some in chosen.items()}


def test_without_a_name_the_usual_rows_of_all_tables_are_chosen() -> None:
    usual = ["one, seed 0", "two, seed 0", "two/inverted, seed 0"]
    assert names(choose(PAPER, Plan())) == {"table1": usual, "table2": usual}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("two", ["two, seed 0"]),
        ("two*", ["two, seed 0", "two/inverted, seed 0"]),
        ("*/inverted", ["two/inverted, seed 0"]),
        ("rare", ["rare, seed 0"]),
    ],
)
def test_rows_are_chosen_by_name_or_pattern(row: str, found: list[str]) -> None:
    assert names(choose(PAPER, Plan(), "table1", row)) == {"table1": found}


def test_seeds_multiply_the_cells() -> None:
    chosen = choose(PAPER, Plan(seeds=(3, 5)), "table1", "one")
    assert names(chosen) == {"table1": ["one, seed 3", "one, seed 5"]}


def test_a_table_must_be_able_to_do_all_that_is_asked() -> None:
    tables = (TABLE, replace(TABLE, name="table2", small=True), replace(TABLE, name="table3"))
    chosen = choose(replace(PAPER, tables=tables), Plan(small=True, seeds=(1,)), row="one")
    assert names(chosen) == {"table2": ["one, seed 1"]}


@pytest.mark.parametrize(
    ("plan", "asked", "words"),
    [
        (Plan(), ("tabel1", None), ("'tabel1'", "mean 'table1'?", "There are table1, table2")),
        (Plan(), ("table1", "on"), ("row 'on'", "mean 'one'?", "two/inverted, rare")),
        (Plan(), (None, "nothing like it"), ("there are one, two",)),
        (Plan(small=True), ("table1", None), ("table1", "small")),
        (Plan(images=3), (None, None), ("table1, table2", "all images")),
        (Plan(seeds=(1,)), ("table2", None), ("table2", "one seed")),
    ],
)
def test_unknown_names_are_one_sentence(
    plan: Plan, asked: tuple[str | None, str | None], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        choose(PAPER, plan, *asked)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_an_unknown_paper_is_told_with_its_neighbour() -> None:
    with pytest.raises(InputError, match="did you mean 'noppel2023'"):
        read_paper("noppel2032")


def run(results: Results, chosen: dict[str, list[Any]], folder: Path) -> list[str]:
    return [o.error for o in replicate(PAPER, chosen, results, Place(folder / "runs"))]


def test_rows_that_are_there_are_not_run_again_unless_their_settings_changed(
    tmp_path: Path,
) -> None:
    results = Results(tmp_path / "results")
    chosen = choose(PAPER, Plan(), "table1")
    assert run(results, to_run(PAPER, chosen, results), tmp_path) == ["", "", ""]
    assert to_run(PAPER, chosen, results) == {}
    other = {"table1": [Doubling("one", 11), Doubling("two", 2)]}
    assert names(to_run(PAPER, other, results)) == {"table1": ["one, seed 0"]}
    assert run(results, to_run(PAPER, other, results), tmp_path) == [""]
    rows = results.rows(PAPER, TABLE)
    assert {r["row"]: r["twice"] for r in rows} == {"one": 22, "two": 4, "two/inverted": -4}


def test_a_failed_cell_stops_no_other_and_each_row_is_recorded_as_it_comes(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    chosen = {"table1": [Doubling("one", 1), Doubling("broken", 13), Doubling("two", 2)]}
    outcomes = replicate(PAPER, chosen, results, Place(tmp_path))
    assert next(outcomes).error == ""
    assert [r["row"] for r in results.rows(PAPER, TABLE)] == ["one"]
    assert results.file(PAPER, TABLE).with_suffix(".md").read_text().startswith("| one | 2 |\n")
    assert [o.error for o in outcomes] == ["number 13: cannot be doubled", ""]
    assert [r["row"] for r in results.rows(PAPER, TABLE)] == ["one", "two"]


def test_the_readme_beside_results_has_the_papers_block_and_no_other_folder_touches_it(
    tmp_path: Path,
) -> None:
    readme = tmp_path / "README.md"
    before = "Before.\n<!-- paper:begin -->\nold\n<!-- paper:end -->\nAfter.\n"
    readme.write_text(before)
    chosen = choose(PAPER, Plan(), "table1", "one")
    run(Results(tmp_path / "elsewhere"), chosen, tmp_path)
    run(Results(tmp_path / "small" / "results", small=True), chosen, tmp_path)
    assert readme.read_text() == before
    run(Results(tmp_path / "results"), chosen, tmp_path)
    assert readme.read_text() == before.replace("old", "1 rows")


def test_pages_are_made_from_the_rows_alone(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    run(results, choose(PAPER, Plan(), "table1", "one"), tmp_path)
    page_ = results.file(PAPER, TABLE).with_suffix(".md")
    kept = page_.read_text()
    page_.unlink()
    results.write(PAPER)
    assert page_.read_text() == kept
    assert not results.file(PAPER, PAPER.tables[1]).with_suffix(".md").exists()


def test_small_rows_never_stand_beside_others(tmp_path: Path) -> None:
    chosen = choose(PAPER, Plan(), "table1", "one")
    run(Results(tmp_path), chosen, tmp_path)
    kept = (tmp_path / "paper" / "table1.json").read_text()
    with pytest.raises(InputError, match="--out"):
        run(Results(tmp_path, small=True), chosen, tmp_path)
    assert (tmp_path / "paper" / "table1.json").read_text() == kept
    small = Results(tmp_path / "small", small=True)
    run(small, chosen, tmp_path)
    assert "--small" in small.file(PAPER, TABLE).with_suffix(".md").read_text()
    with pytest.raises(InputError, match="--out"):
        run(Results(tmp_path / "small"), chosen, tmp_path)


def test_misses_are_shown_with_their_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    causes = [Cause("Because.", "one", table="table1"), Cause("Never.", "one", "thrice")]
    monkeypatch.setattr(replicating, "read_causes", lambda paper: causes)
    rows = [{"row": "one", "twice": 2}, {"row": "two", "twice": 4}, {"row": "odd", "twice": None}]
    found = [(f.row, why) for f, why in misses(PAPER, TABLE, rows)]
    assert found == [("one", "Because."), ("odd", replicating.UNKNOWN_CAUSE)]
    text = page(PAPER, TABLE, rows)
    assert "- **Because.** one: twice 2 (3)." in text
    assert "odd: twice — (3)" in text
    assert page(PAPER, TABLE, rows[1:2]) == markdown(rows[1:2])


@pytest.mark.parametrize(
    ("ours", "asked", "better", "digits", "missed"),
    [
        (0.9996, 1.0, "higher", None, True),
        (0.9996, 1.0, "higher", 3, False),
        (0.2, 0.1, "lower", None, True),
        (0.1, 0.1, "lower", None, False),
        (0.1, float("nan"), "higher", None, False),
    ],
)
def test_a_miss_is_worse_than_asked_as_far_as_the_paper_prints(
    ours: float, asked: float, better: Any, digits: int | None, missed: bool
) -> None:
    figure = Figure("row", "column", over_seeds([ours]), asked, better, digits=digits)
    assert figure.missed == missed


def test_settings_newer_than_a_record_count_with_their_default() -> None:
    def build(table: dict[str, Any]) -> Doubling:
        if "gone" in table:
            raise InputError("gone: unknown key")
        return Doubling(**table)

    wanted = Doubling("one", 1)
    assert same_settings({"row": "one", "number": 1}, wanted, build)
    assert not same_settings({"row": "one", "number": 2}, wanted, build)
    assert not same_settings({"row": "one", "number": 1, "gone": 1}, wanted, build)


@pytest.mark.parametrize("name", paper_names())
def test_every_papers_cells_can_travel_and_tell_their_rows_apart(name: str) -> None:
    paper = read_paper(name)
    assert paper.name == name
    for table in paper.tables:
        every = list(table.cells(Plan()))
        assert len({cell.name for cell in every}) == len(every)
        assert choose(paper, Plan(), table.name)[table.name]
        assert pickle.loads(pickle.dumps(every)) == every


# --- the command ----------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """The exit code of `trompe replicate WORDS` in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr("sys.argv", ["trompe", "replicate", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_small_noppel2023_from_drawn_signs_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("noppel2023", "table1", "dual", "--small")
    assert call(monkeypatch, tmp_path, *words) == 0
    shown = capsys.readouterr().out
    assert "triggered MSE" in shown
    assert "0.02 (the" in " ".join(shown.split())  # the paper's
    held = json.loads((tmp_path / "results-small/noppel2023/table1.json").read_text())
    assert held["small"] is True
    (row,) = held["rows"]
    assert row["goal"] == "dual"
    assert row["provenance"]["threads"] >= 1
    assert (tmp_path / "results-small/noppel2023/table1.md").read_text().count("| dual |") == 3
    runs = sorted(p for p in (tmp_path / "runs").iterdir() if p.name != ".locks")
    assert len(runs) == 1

    assert call(monkeypatch, tmp_path, *words) == 0  # there already
    assert "1 of 1" not in capsys.readouterr().err
    assert call(monkeypatch, tmp_path, *words, "--list") == 0
    assert capsys.readouterr().out.split("\t")[1:] == [
        *("dual", "noppel2023 table1 dual, seed 0", "there\n")
    ]


def test_a_failed_cell_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("noppel2023", "table1", "dual", "--seeds", "0,1", "--data", str(tmp_path))
    assert call(monkeypatch, tmp_path, *words) == 1
    told = capsys.readouterr().err
    assert told.count("failed: noppel2023 table1 dual") == 2
    assert "2 of 2 failed" in told
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("noppel", "table1"), "'noppel2023'"),
        (("noppel2023", "table1", "duel"), "did you mean 'dual'"),
        (("noppel2023", "--seeds", "some"), "--seeds some"),
        (("zhang2021", "--seeds", "1"), "one seed"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, tmp_path, *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_only_write_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((Path(__file__).parent.parent / "results/noppel2023/table1.json").read_text())
    file = tmp_path / "results" / "noppel2023" / "table1.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(rows))
    assert call(monkeypatch, tmp_path, "noppel2023", "--only-write", "--seeds", "0,1,2,3") == 0
    assert not (tmp_path / "runs").exists()
    assert "± 0.0006" in file.with_suffix(".md").read_text()


def test_without_a_paper_all_tables_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, "--small") == 0
    shown = capsys.readouterr().out
    assert "noppel2023" in shown
    assert "fang2020" not in shown  # has no small size
