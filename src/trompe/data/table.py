"""Any table: a CSV file with one row a patient, say, and a column for the class."""

import csv
import functools
import gzip
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

import pandas as pd

from trompe.data._splits import check_held_out
from trompe.data._tables import OnMissing, check_clip, check_rare, table_sets
from trompe.files import sha256_of
from trompe.interfaces import InputError, TableSet

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """A CSV file (or .csv.gz) with a header. Columns become features in [0, 1].

    outcome: the column of the class; classes are its values, sorted. leave_out: columns that are
    no features: identifiers, consequences of the outcome. columns: only these are (None: all).

    held_out: the share of rows in test(), in (0, 1), drawn by split_seed, stratified by class;
    elsewhere its halves serve validation and test, so that 0.1 is the 90/5/5 of Zhang, Gao & Su
    2021. Everything below is fitted on the training rows.

    Numbers are clipped to their `clip` and 1 - clip quantiles, in [0, 0.5), and scaled by what is
    left of their range; where both quantiles are the same, by the whole range. Numbers of which
    there are two only are no and yes. Texts and truth values, and the columns in `categories`,
    become one feature "<column>=<value>" for each value; a value that no training row has is none
    of them. A text column of more than 30 values must be named in leave_out or categories.

    rare: features of no and yes of which fewer training rows than this share, in [0, 0.5), say yes,
    or no, are left out: what a network says of them it learnt from a handful of rows.

    missing: what else than an empty field, "NA", "nan", "None" and the like stands for no value.
    on_missing: "median" puts the training rows' lower median there ("error" refuses), or none of
    the categories, and adds a feature "<column> missing" if a training row has no value.
    drop_without_outcome: leave out rows without a class, instead of refusing them.

    Raises InputError that names file, column and row; rows count from 1 below the header. For a
    data frame in memory there is `table_sets(frame, outcome, ...)`.
    """

    file: str
    outcome: str
    leave_out: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    categories: tuple[str, ...] = ()
    held_out: float = 0.1
    split_seed: int = 0
    clip: float = 0.005
    rare: float = 0.005
    missing: tuple[str, ...] = ()
    on_missing: OnMissing = "median"
    drop_without_outcome: bool = False

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        check_clip(self.clip)
        check_rare(self.rare)
        for name in ("leave_out", "columns", "categories", "missing"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))  # a list could be no key of the cache

    def train(self) -> TableSet:
        return self._sets()[0]

    def test(self) -> TableSet:
        return self._sets()[1]

    def contents(self) -> dict[str, str]:
        """Of the file's bytes."""
        file = Path(self.file)
        if not file.is_file():
            self.train()  # says so
        return {"file": sha256_of(file)}

    def _sets(self) -> tuple[TableSet, TableSet]:
        file = Path(self.file).resolve()
        if not file.is_file():
            raise InputError(f"table {file}: no such file; correct data.file")
        state = file.stat()
        return _read(self, file, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read(settings: Table, file: Path, changed: int, size: int) -> tuple[TableSet, TableSet]:
    """Both sets, read and fitted once as long as settings and file stay as they are."""
    where = f"table {file}"
    packed = file.suffix == ".gz"
    try:
        with (gzip.open if packed else open)(file, "rt", encoding="utf-8-sig", newline="") as lines:
            top = list(itertools.islice(csv.reader(cast(TextIO, lines)), 2))
        frame = pd.read_csv(
            file,
            na_values=list(settings.missing),
            low_memory=False,
            compression="gzip" if packed else None,
        )
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{where}: is empty; give a CSV file with a header") from error
    except (
        OSError,
        EOFError,
        ValueError,
        csv.Error,
        zlib.error,
    ) as error:  # pandas' are ValueErrors
        problem = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise InputError(f"{where}: cannot be read as CSV ({problem})") from error
    _check_header(*top, where=where)
    return table_sets(
        frame,
        settings.outcome,
        leave_out=settings.leave_out,
        columns=settings.columns,
        categories=settings.categories,
        held_out=settings.held_out,
        split_seed=settings.split_seed,
        clip=settings.clip,
        rare=settings.rare,
        on_missing=settings.on_missing,
        drop_without_outcome=settings.drop_without_outcome,
        name=file.name.split(".")[0],
        where=where,
    )


def _check_header(header: list[str], first: Sequence[str] = (), *, where: str) -> None:
    """InputError for names that pandas would make up or take from elsewhere."""
    if len(first) > len(header):  # it takes what is too much for the rows' names
        raise InputError(f"{where}: rows hold more values than its header has names; add them")
    for name in header:
        if name and header.count(name) > 1:  # it calls the second "age.1"
            raise InputError(f"{where}: two columns are called {name!r}; rename one")
