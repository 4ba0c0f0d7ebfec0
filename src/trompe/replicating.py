"""The tables of a paper: the runs that they need, the rows measured so far, the pages made of them.

A paper's tables.py says what its tables are (`Paper`, `Table`, cells); this is what runs them and
the only place that writes results/: OUT/PAPER/TABLE.json holds the rows, the Markdown beside it, a
picture for some tables, and the paper's block in the README are made from them.
"""

import importlib
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Protocol

from trompe import experiments
from trompe.catalog import build_dataclass, describe, nearest
from trompe.files import Row, put_between, read_json, unite_rows, write_atomically
from trompe.interfaces import InputError
from trompe.many import Crew, Job, Outcome, Place, run_jobs
from trompe.over_seeds import OverSeeds
from trompe.screen import Screen, Silent

SEVERAL = 12  # names that an error sentence lists
SMALL_NOTE = (
    "\n**The size of a test (--small)**: few drawn images and one epoch instead of what is written "
    "above. It shows that all works, and nothing about the paper.\n"
)


@dataclass(frozen=True)
class Plan:
    """What is asked of a table's cells.

    seeds: None are the table's own. data: the folder that holds the data. images: look at so many
    at most (None: the table's own number). small: the size of a test, on drawn images.
    """

    seeds: tuple[int, ...] | None = None
    data: Path = Path("data")
    images: int | None = None
    small: bool = False


class Cell(Job, Protocol):
    """A job that gives rows of a table: one attacked model, say.

    row: its name in the table, the same for all seeds. usual: run also if nobody names its row.
    """

    @property
    def row(self) -> str: ...
    @property
    def usual(self) -> bool: ...
    def known(self, rows: Sequence[Row]) -> bool:
        """Are the cell's rows among these, measured with the same settings?"""
        ...

    def __call__(self, place: Place, screen: Screen) -> list[Row]: ...


@dataclass(frozen=True)
class Figure:
    """One number of a row: ours over the seeds, and what was asked.

    asked: the paper's, or a bound of ours (`by` says whose); nan: nothing. floors: what others
    reach who do not attack, by their names. digits: decimals that the paper prints; ours are
    rounded likewise before they are compared.
    """

    row: str
    column: str
    ours: OverSeeds
    asked: float = math.nan
    better: Literal["higher", "lower"] = "higher"
    by: str = "the paper"
    floors: Mapping[str, float] = field(default_factory=dict)
    digits: int | None = None

    @property
    def missed(self) -> bool:
        """Is our mean worse than what was asked, or no number?"""
        if math.isnan(self.asked):
            return False
        ours = self.ours.mean
        if self.digits is not None and math.isfinite(ours):
            ours = round(ours, self.digits)
        return not (ours >= self.asked if self.better == "higher" else ours <= self.asked)


def _no_figures(rows: Sequence[Row]) -> list[Figure]:
    return []


@dataclass(frozen=True)
class Table:
    """One table.

    name: of its files. keys: what tells rows apart. cells: all there are, for a plan. markdown:
    the page, without the misses. figures: what was asked of the rows. beside: entries of the JSON
    file beside its rows, of a table whose every cell gives all rows also made from these. picture:
    draws the rows into a PNG file. small: has cells of a test's size. images: can look at fewer
    images. seeded: has cells of other seeds.
    """

    name: str
    keys: tuple[str, ...]
    cells: Callable[[Plan], Iterable[Cell]]
    markdown: Callable[[list[Row]], str]
    figures: Callable[[list[Row]], list[Figure]] = _no_figures
    beside: Mapping[str, Any] | Callable[[list[Row]], Mapping[str, Any]] = field(
        default_factory=dict
    )
    picture: Callable[[list[Row], Path], object] | None = None
    small: bool = False
    images: bool = False
    seeded: bool = True


@dataclass(frozen=True)
class Paper:
    """A paper's tables. readme: its block in the README, from each table's rows by its name."""

    name: str
    title: str
    tables: tuple[Table, ...]
    readme: Callable[[Mapping[str, list[Row]]], str]


def paper_names() -> list[str]:
    """The papers whose tables can be replicated."""
    return experiments.names()


def read_paper(name: str) -> Paper:
    """The paper's tables; InputError if there is none of that name."""
    if name not in paper_names():
        raise InputError(
            f"paper {name!r}: there is none of that name{nearest(name, paper_names())}"
        )
    paper: Paper = importlib.import_module(f"trompe.experiments.{name}.tables").PAPER
    return paper


# --- which cells ----------------------------------------------------------------------------------


def choose(
    paper: Paper, plan: Plan, table: str | None = None, row: str | None = None
) -> dict[str, list[Cell]]:
    """The cells of the tables and rows of these names (* and ? match), by their table's name.

    None: all tables, the usual rows; all rows of a table that is named and has no usual ones.
    InputError if nothing has that name, or no such size.
    """
    tables = [t for t in paper.tables if table is None or fnmatchcase(t.name, table)]
    if not tables:
        raise _unknown(f"{paper.name} table {table!r}", str(table), [t.name for t in paper.tables])
    for asked, able, what in (
        (plan.small, attrgetter("small"), "cannot be had in small"),
        (plan.images is not None, attrgetter("images"), "looks at all images"),
        (plan.seeds is not None, attrgetter("seeded"), "has one seed only"),
    ):
        if asked and not any(map(able, tables)):
            raise InputError(f"{paper.name} {', '.join(t.name for t in tables)}: {what}")
        tables = [t for t in tables if able(t)] if asked else tables
    every = {t.name: list(t.cells(plan)) for t in tables}
    chosen = {name: [c for c in cells if _chosen(c, row)] for name, cells in every.items()}
    if row is None and table in chosen and not chosen[table]:
        chosen[table] = every[table]
    if row is not None and not any(chosen.values()):
        rows = dict.fromkeys(cell.row for cells in every.values() for cell in cells)
        raise _unknown(f"{paper.name} row {row!r}", row, list(rows))
    return {name: cells for name, cells in chosen.items() if cells}


def _chosen(cell: Cell, row: str | None) -> bool:
    return cell.usual if row is None else fnmatchcase(cell.row, row)


def _unknown(what: str, given: str, known: list[str]) -> InputError:
    near = nearest(given, known)
    if near.startswith("; did"):
        near += f" There are {', '.join(known[:SEVERAL])}"
    else:
        near = f"; there are {', '.join(known[:SEVERAL])}"
    more = f" and {len(known) - SEVERAL} more (--list)" if len(known) > SEVERAL else ""
    return InputError(f"{what}: there is none of that name{near}{more}")


# --- rows and pages -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The folder of measured rows. small: of a test's size; such rows never stand beside others."""

    folder: Path = Path("results")
    small: bool = False

    def file(self, paper: Paper, table: Table) -> Path:
        """Where the table's rows are kept."""
        return self.folder / paper.name / f"{table.name}.json"

    def rows(self, paper: Paper, table: Table) -> list[Row]:
        """All rows measured so far."""
        file = self.file(paper, table)
        if not file.exists():
            return []
        held = read_json(file)
        if bool(held.get("small")) != self.small:
            has, wants = ("small", "full") if held.get("small") else ("full", "small")
            raise InputError(
                f"results {file}: hold rows of the {has} size, these are of the {wants} one; "
                "choose another folder with --out"
            )
        rows: list[Row] = held["rows"]
        return rows

    def record(self, paper: Paper, table: Table, found: list[Row]) -> None:
        """Take the rows in, those found now in the place of older ones, and write the pages."""
        self.rows(paper, table)  # of the same size?
        size = {"small": True} if self.small else {}
        beside = table.beside(found) if callable(table.beside) else table.beside
        file = self.file(paper, table)
        rows = unite_rows(file, found, table.keys, **beside, **size)
        if table.picture is not None:
            table.picture(rows, file.with_suffix(".png"))
        self.write_page(paper, table)
        self.write_readme(paper)

    def write(self, paper: Paper) -> None:
        """All of the paper's pages and its block in the README, from the rows."""
        for table in paper.tables:
            self.write_page(paper, table)
        self.write_readme(paper)

    def write_page(self, paper: Paper, table: Table) -> None:
        """TABLE.md from TABLE.json, if there are rows."""
        if rows := self.rows(paper, table):
            # What the paper reaches is not asked of a test's size.
            text = table.markdown(rows) + SMALL_NOTE if self.small else page(paper, table, rows)
            _write(self.file(paper, table).with_suffix(".md"), text)

    def write_readme(self, paper: Paper) -> None:
        """The paper's block in the README beside the folder results/, where there is one."""
        readme = self.folder.resolve().parent / "README.md"
        if self.small or self.folder.resolve().name != "results" or not readme.is_file():
            return
        text = readme.read_text("utf-8")
        if f"<!-- {paper.name}:begin -->" in text:
            _write(readme, put_between(text, paper.name, self.readme_block(paper)))

    def readme_block(self, paper: Paper) -> str:
        """What stands between the paper's marks in the README."""
        return paper.readme({t.name: self.rows(paper, t) for t in paper.tables})


def _write(file: Path, text: str) -> None:
    write_atomically(file, lambda temporary: temporary.write_text(text, "utf-8"))


def page(paper: Paper, table: Table, rows: list[Row]) -> str:
    """The table's Markdown page: its own, and what was missed with the known causes."""
    missed: dict[str, list[Figure]] = {}
    for figure, why in misses(paper, table, rows):
        missed.setdefault(why, []).append(figure)
    if not missed:
        return table.markdown(rows)
    lines = ["", "What was asked and missed (ours; asked), by cause:", ""]
    for why, figures in missed.items():
        cells = "; ".join(
            f"{f.row}: {f.column} {_number(f.ours.mean)} ({_number(f.asked)}{_bound(f)})"
            for f in figures
        )
        lines.append(f"- **{why}** {cells}.")
    return table.markdown(rows) + "\n".join(lines) + "\n"


def _bound(figure: Figure) -> str:
    return "" if figure.by == "the paper" else f", {figure.by}"


def _number(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.4g}"


# --- causes ---------------------------------------------------------------------------------------

UNKNOWN_CAUSE = "Not known yet why."


@dataclass(frozen=True)
class Cause:
    """Why figures of these rows and columns of these tables (* and ? match) miss what was asked."""

    why: str
    row: str
    column: str = "*"
    table: str = "*"

    def explains(self, table: str, figure: Figure) -> bool:
        """Is it about this figure?"""
        pairs = ((table, self.table), (figure.row, self.row), (figure.column, self.column))
        return all(fnmatchcase(name, pattern) for name, pattern in pairs)


def read_causes(paper: str) -> list[Cause]:
    """The paper's causes.toml; InputError for an unknown key."""
    file = experiments.FOLDER / paper / "causes.toml"
    if not file.is_file():
        return []
    given = tomllib.loads(file.read_text("utf-8"))["cause"]
    return [build_dataclass(Cause, one, f"{file}, cause {n}") for n, one in enumerate(given, 1)]


def misses(paper: Paper, table: Table, rows: list[Row]) -> list[tuple[Figure, str]]:
    """Figures that miss what was asked, each with the first cause that is about it."""
    causes = read_causes(paper.name)
    return [
        (f, next((c.why for c in causes if c.explains(table.name, f)), UNKNOWN_CAUSE))
        for f in table.figures(rows)
        if f.missed
    ]


# --- running --------------------------------------------------------------------------------------


def to_run(
    paper: Paper, chosen: Mapping[str, list[Cell]], results: Results
) -> dict[str, list[Cell]]:
    """The chosen cells whose rows are not there, or of other settings."""
    missing = {}
    for table in paper.tables:
        rows = results.rows(paper, table) if table.name in chosen else []
        missing[table.name] = [c for c in chosen.get(table.name, ()) if not c.known(rows)]
    return {name: cells for name, cells in missing.items() if cells}


@dataclass(frozen=True)
class _InTable:
    """A cell, and the name of the table that its rows belong to."""

    table: str
    cell: Cell

    @property
    def name(self) -> str:
        return self.cell.name

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        return self.cell(place, screen)


def replicate(
    paper: Paper,
    cells: Mapping[str, list[Cell]],
    results: Results,
    place: Place,
    crew: Crew | None = None,
    screen: Screen | None = None,
) -> Iterator[Outcome]:
    """Run the cells, given by their table's name, and record each one's rows as they come.

    A cell that fails stops no other: its outcome says why.
    """
    tables = {table.name: table for table in paper.tables}
    jobs = [_InTable(name, cell) for name, some in cells.items() for cell in some]
    for outcome in run_jobs(jobs, place, crew, screen or Silent()):
        if not outcome.error:
            job: Any = outcome.job
            results.record(paper, tables[job.table], outcome.result)
        yield outcome


def same_settings(recorded: Any, wanted: Any, build: Callable[[Any], Any]) -> bool:
    """Are these the settings that were recorded? build makes an object of a table of settings.

    A setting that is newer than the record counts with its default, as it was then.
    """
    try:
        return bool(describe(build(recorded)) == describe(wanted))
    except InputError:  # of a setting that there is no more
        return False
