"""A data frame -> rows of numbers in [0, 1], fitted on its training rows."""

import difflib
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pandas.api.types import infer_dtype, is_numeric_dtype

from trompe.data._splits import check_held_out, stratified_split
from trompe.interfaces import InputError, TableSet

OnMissing = Literal["median", "error"]

_MOST_TEXTS = 30  # a column of more different texts is a name, a date or a remark
# What pandas calls values that may all be numbers; truth values, dates and its categories are not.
_MAY_BE_NUMBERS = {
    "integer",
    "floating",
    "mixed-integer-float",
    "mixed-integer",
    "mixed",
    "string",
}


def table_sets(
    frame: pd.DataFrame,
    outcome: str,
    *,
    leave_out: Collection[str] = (),
    columns: Collection[str] | None = None,
    categories: Collection[str] = (),
    held_out: float = 0.1,
    split_seed: int = 0,
    clip: float = 0.005,
    rare: float = 0.005,
    on_missing: OnMissing = "median",
    drop_without_outcome: bool = False,
    name: str = "table",
    where: str = "",
) -> tuple[TableSet, TableSet]:
    """A data frame's training and held-out rows; the settings are those of `Table`.

    name: what the sets are called. where: what error sentences call the table, else its name.
    Rows count from 1. Raises InputError for settings and columns that cannot be used.
    """
    check_held_out(held_out)
    check_clip(clip)
    check_rare(rare)
    where = where or f"table {name!r}"
    frame = frame.rename(columns=str).reset_index(drop=True)
    chosen = _features(frame, outcome, leave_out, columns, categories, where)
    given = frame[outcome].notna()
    _check_outcome_given(given, outcome, drop_without_outcome, where)
    frame = frame[given]
    labels, class_names = _classes(frame[outcome], f"{where}, column {outcome!r}")
    first, second = stratified_split(labels, 1 - held_out, split_seed)
    _check_trained(labels[first], class_names, held_out, where)

    training = np.zeros(len(frame), dtype=bool)
    training[first.numpy()] = True
    named = set(categories)
    features: list[_Feature] = []
    for column in chosen:
        here = f"{where}, column {column!r}"
        is_named = column in named or isinstance(frame[column].dtype, pd.CategoricalDtype)
        features += _encode(frame[column], training, is_named, clip, on_missing, here)
    features = [f for f in features if f.numeric or not _is_rare(f.values[training], rare)]
    if not features:
        raise InputError(
            f"{where}, data.rare = {rare}: leaves no column; in each of them fewer training rows "
            "differ from the others; lower it"
        )
    whole = TableSet(
        torch.from_numpy(np.stack([f.values for f in features], 1).astype(np.float32)),
        labels,
        class_names,
        name,
        tuple(f.name for f in features),
        torch.tensor([f.numeric for f in features]),
    )
    return whole.subset(first), whole.subset(second)


def check_clip(clip: float) -> None:
    """InputError for a share of clipped values at each end that leaves nothing between."""
    if not 0 <= clip < 0.5:
        raise InputError(f"data.clip = {clip}: must be at least 0 and less than 0.5")


def check_rare(rare: float) -> None:
    """InputError for a share of rows that no column of no and yes could have."""
    if not 0 <= rare < 0.5:
        raise InputError(f"data.rare = {rare}: must be at least 0 and less than 0.5")


# --- columns and rows -------------------------------------------------------------------------


def _features(
    frame: pd.DataFrame,
    outcome: str,
    leave_out: Collection[str],
    columns: Collection[str] | None,
    categories: Collection[str],
    where: str,
) -> list[str]:
    """The columns that are features, in the table's order. All names given must be columns."""
    known = list(frame.columns)
    if len(frame) == 0:
        raise InputError(f"{where}: holds no rows; give at least two a class")
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"{where}: two columns are called {twice!r}; rename one")
    leave_out, columns = set(leave_out), None if columns is None else set(columns)
    given = {
        "outcome": {outcome},
        "leave_out": leave_out,
        "columns": columns or (),
        "categories": categories,
    }
    for setting, names in given.items():
        for unknown in sorted(set(names) - set(known)):
            raise InputError(
                f"{where}, data.{setting} = {unknown!r}: no such column{_nearest(unknown, known)}"
            )
    chosen = [
        c
        for c in known
        if c != outcome and c not in leave_out and (columns is None or c in columns)
    ]
    if not chosen:
        raise InputError(
            f"{where}: no column is left as a feature; correct data.columns and data.leave_out"
        )
    return chosen


def _nearest(given: str, known: list[str]) -> str:
    if len(known) == 1:
        return f"; its one column is {known[0]!r}; separate columns by commas"
    near = difflib.get_close_matches(given, known, 1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    more = f" and {len(known) - 60} more" if len(known) > 60 else ""
    return f"; its columns are {', '.join(known[:60])}{more}"


def _check_outcome_given(given: pd.Series, outcome: str, drop: bool, where: str) -> None:
    if not given.any():
        raise InputError(f"{where}, column {outcome!r}: no row has a value; name another outcome")
    if not given.all() and not drop:
        raise InputError(
            f"{where}, column {outcome!r}: {int((~given).sum())} rows have no value, the first row "
            f"{_row(~given)}; fill them in, or set data.drop_without_outcome = true"
        )


def _classes(outcome: pd.Series, where: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Labels int64 (n,) and the classes' names, in the order of the values."""
    texts, names = _texts(outcome)
    if len(names) < 2:
        raise InputError(f"{where}: is {names[0]!r} in all rows; an outcome needs two classes")
    counts = texts.value_counts()
    rare = next((name for name in names if counts[name] < 2), None)
    if rare is not None:
        raise InputError(
            f"{where}: class {rare!r} has 1 row only (of {len(texts)}, in {len(names)} classes); "
            "the outcome must name classes of 2 rows or more"
        )
    codes = pd.Categorical(texts, categories=list(names)).codes
    return torch.from_numpy(codes.astype(np.int64)), names


def _check_trained(
    trained: torch.Tensor, class_names: tuple[str, ...], held_out: float, where: str
) -> None:
    there = set(trained.tolist())
    lost = next((name for label, name in enumerate(class_names) if label not in there), None)
    if lost is not None:
        raise InputError(
            f"{where}, data.held_out = {held_out}: leaves no row of class {lost!r} for training; "
            "lower it"
        )


# --- one column -------------------------------------------------------------------------------


class _Feature(NamedTuple):
    name: str
    values: np.ndarray  # (n,), in [0, 1]
    numeric: bool  # False: 0 and 1 stand for no and yes


def _encode(
    column: pd.Series,
    training: np.ndarray,
    is_named: bool,
    clip: float,
    on_missing: OnMissing,
    where: str,
) -> list[_Feature]:
    """A column as one feature, or one for each of its values; and one for its missing values."""
    missing = column.isna()
    if missing[training].all():
        raise InputError(
            f"{where}: all values of the training rows are missing; put it into data.leave_out"
        )
    if missing.any() and on_missing == "error":
        raise InputError(
            f"{where}, row {_row(missing)}: the value is missing ({int(missing.sum())} rows); fill "
            'it in, or set data.on_missing = "median"'
        )
    numbers = None if is_named else _numbers(column)
    if numbers is None:
        features = _categories(column, training, is_named, where)
    else:
        features = [_scaled(numbers, training, clip, where)]
    if missing[training].any():
        features.append(_Feature(f"{column.name} missing", missing.to_numpy(float), False))
    return features


def _is_rare(values: np.ndarray, rare: float) -> bool:
    """Do fewer rows than this share say yes, or fewer say no?"""
    share = float(values.mean())
    return min(share, 1 - share) < rare


def _numbers(column: pd.Series) -> pd.Series | None:
    """The column as floats, nan where it is missing; None if it holds anything but numbers."""
    if infer_dtype(column, skipna=True) not in _MAY_BE_NUMBERS:
        return None
    if not is_numeric_dtype(column.dtype):
        # A text that reads as no number becomes nan, as a missing one does.
        try:
            parsed = pd.to_numeric(column.astype(object), errors="coerce")
        except OverflowError:  # hundreds of digits: a name, not a number
            return None
        if (parsed.isna() & column.notna()).any():
            return None
        column = parsed
    return column.astype("Float64").astype(float)


def _scaled(numbers: pd.Series, training: np.ndarray, clip: float, where: str) -> _Feature:
    """Numbers clipped and brought to [0, 1] by what the training rows hold."""
    infinite = np.isinf(numbers)
    if infinite.any():
        raise InputError(
            f"{where}, row {_row(infinite)}: is {numbers[infinite].iloc[0]}; correct it, or leave "
            "the field empty where the value is not known"
        )
    seen = numbers[training].dropna()
    _check_varies(seen.map(_text), training, where)
    # A value that occurs, not a mean of two: what is yes or no stays so.
    filled = numbers.fillna(seen.quantile(0.5, interpolation="lower"))
    low, high = seen.quantile([clip, 1 - clip])
    if low == high:  # nearly all rows hold the same: the others are what it is about
        low, high = seen.min(), seen.max()
    values = (filled.clip(low, high) - low) / (high - low)
    return _Feature(str(numbers.name), values.to_numpy(), seen.nunique() > 2)


def _categories(
    column: pd.Series, training: np.ndarray, is_named: bool, where: str
) -> list[_Feature]:
    """One feature for each value that the training rows hold."""
    texts, names = _texts(column)
    if not is_named and len(names) > _MOST_TEXTS:
        words = texts.notna() & pd.to_numeric(texts, errors="coerce").isna()
        if 0 < words.sum() < texts.notna().sum():
            raise InputError(
                f"{where}, row {_row(words)}: is {texts[words].iloc[0]!r}, where other rows hold a "
                "number; correct it, or put it into data.missing if it stands for a missing value, "
                "or the column into data.leave_out"
            )
        raise InputError(
            f"{where}: holds {len(names)} different texts, too many for categories; put it into "
            "data.leave_out, or into data.categories if it is one nonetheless"
        )
    seen = texts[training]
    if not seen.isna().any():
        _check_varies(seen, training, where)
    return [
        _Feature(f"{column.name}={value}", (texts == value).to_numpy(float), False)
        for value in names
        if (seen == value).any()
    ]


def _check_varies(seen: pd.Series, training: np.ndarray, where: str) -> None:
    """InputError if the training rows hold one value only (as text, missing ones left out)."""
    if seen.nunique() > 1:
        return
    value, rows = seen.iloc[0], int(training.sum())
    if len(seen) == rows:
        raise InputError(
            f"{where}: is {value!r} in all {rows} training rows; put it into data.leave_out"
        )
    raise InputError(
        f"{where}: is {value!r} in all training rows where it is not missing; put it into "
        "data.categories if a missing value has a meaning, else into data.leave_out"
    )


def _texts(column: pd.Series) -> tuple[pd.Series, tuple[str, ...]]:
    """Values as text (missing ones stay so), and the different ones: numbers by size, then words.

    A column of whole numbers becomes floats when a value is missing; 1.0 reads "1" nonetheless.
    """
    present = column.dropna()
    different = sorted(present.unique(), key=_order)
    texts = present.map(_text).astype(object).reindex(column.index)
    return texts, tuple(dict.fromkeys(_text(value) for value in different))


def _order(value: Any) -> tuple[bool, Any, str]:
    is_word = not isinstance(value, int | float | np.number)
    return is_word, 0 if is_word else value, str(value)


def _text(value: Any) -> str:
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def _row(chosen: pd.Series) -> int:
    """The number of the first chosen row, counted from 1 as the table was given."""
    return int(chosen.idxmax()) + 1
