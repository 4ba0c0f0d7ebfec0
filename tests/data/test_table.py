"""Tables: files and data frames, whole and broken."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from trompe.data._splits import stratified_split
from trompe.data.table import Table, table_sets
from trompe.interfaces import InputError, TableSet

ROWS = 200


def patients(**columns: Any) -> pd.DataFrame:
    """200 rows, every fourth died; `columns` are added or replaced."""
    dice = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "id": np.arange(ROWS),
            "age": dice.normal(70, 8, ROWS),
            "site": dice.choice(["hip", "spine", "wrist"], ROWS),
            "smokes": dice.integers(0, 2, ROWS),
            "died": np.where(np.arange(ROWS) % 4 == 0, "yes", "no"),
        }
    )
    return frame.assign(**columns)


def sets(frame: pd.DataFrame, **settings: Any) -> tuple[TableSet, TableSet]:
    settings = {"leave_out": ("id",), "clip": 0.0, **settings}
    return table_sets(frame, settings.pop("outcome", "died"), **settings)


def split_of(frame: pd.DataFrame, share: float = 0.9, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.from_numpy((frame["died"] == "yes").to_numpy().astype(np.int64))
    return stratified_split(labels, share, seed)


def column(data: TableSet, name: str) -> Tensor:
    return data.features[:, data.feature_names.index(name)]


def with_gaps(frame: pd.DataFrame, name: str, rows: list[int]) -> pd.DataFrame:
    frame = frame.astype({name: object if frame[name].dtype.kind in "OT" else float})
    frame.loc[rows, name] = np.nan
    return frame


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def to_file(content: pd.DataFrame | str | bytes, name: str = "bones.csv") -> str:
        file = tmp_path / name
        if isinstance(content, pd.DataFrame):
            content.to_csv(file, index=False)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    return to_file


# --- what comes out -------------------------------------------------------------------------------


def test_columns_become_numbers_in_0_1_with_names_and_kinds() -> None:
    train, test = sets(patients(), name="bones")
    for data in (train, test):
        assert data.name == "bones"
        assert data.feature_names == ("age", "site=hip", "site=spine", "site=wrist", "smokes")
        assert data.numeric.tolist() == [True, False, False, False, False]  # 0 and 1: no and yes
        assert data.features.dtype == torch.float32
        assert data.labels.dtype == torch.int64
        assert data.class_names == ("no", "yes")
        assert data.features.min() == 0
        assert data.features.max() == 1
    assert column(train, "age").aminmax() == (0, 1)
    assert (train.features[:, 1:4].sum(1) == 1).all()


def test_rows_are_split_by_class_and_keep_their_labels() -> None:
    frame = patients()
    train, test = sets(frame, held_out=0.2, split_seed=3)
    for data, rows in zip((train, test), split_of(frame, 0.8, 3), strict=True):
        chosen = frame.iloc[rows.numpy()]
        assert data.labels.tolist() == (chosen["died"] == "yes").astype(int).tolist()
        assert column(data, "smokes").tolist() == chosen["smokes"].tolist()
        assert column(data, "site=hip").tolist() == (chosen["site"] == "hip").astype(int).tolist()
    assert len(test) == 40
    assert test.labels.sum() == 10


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_training_rows_alone_set_the_scale(clip: float) -> None:
    frame = patients()
    first, second = (rows.numpy() for rows in split_of(frame))
    frame.loc[second[:2], "age"] = [-1000.0, 1000.0]
    low, high = np.quantile(frame["age"][first], [clip, 1 - clip])
    train, test = sets(frame, clip=clip)
    for data, rows in ((train, first), (test, second)):
        expected = np.clip((frame["age"][rows] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(column(data, "age"), expected, atol=1e-6)
    assert column(test, "age")[:2].tolist() == [0, 1]
    assert (column(train, "age") == 0).sum() == (1 if clip == 0 else 18)


def test_clipping_never_makes_a_rare_mark_constant() -> None:
    rare = np.zeros(ROWS)
    rare[[0, 1, 2, 3, 50, 51, 52, 53]] = [1, 0, 2, 0, 1, 2, 0, 1]
    train, _ = sets(patients(rare=rare), clip=0.1)
    assert column(train, "rare").unique().tolist() == [0, 0.5, 1]
    assert train.numeric[train.feature_names.index("rare")]


def test_a_missing_number_is_the_training_median_and_a_mark() -> None:
    frame = patients()
    first, second = split_of(frame)
    gaps = [int(first[5]), int(first[9]), int(second[3])]
    frame = with_gaps(frame, "age", gaps)
    train, test = sets(frame)
    assert train.feature_names[:2] == ("age", "age missing")
    assert train.numeric[:2].tolist() == [True, False]
    median = column(train, "age")[[i for i in range(len(first)) if i not in (5, 9)]].median()
    assert column(train, "age")[[5, 9]].tolist() == [median, median]
    assert column(test, "age")[3] == median
    assert column(train, "age missing").nonzero().flatten().tolist() == [5, 9]
    assert column(test, "age missing").nonzero().flatten().tolist() == [3]


def test_a_missing_yes_or_no_becomes_one_of_them() -> None:
    frame = patients()
    first, _ = split_of(frame)
    frame.loc[first[:90].numpy(), "smokes"] = 0
    frame.loc[first[90:].numpy(), "smokes"] = 1
    train, _ = sets(with_gaps(frame, "smokes", [int(first[0]), int(first[179])]))
    assert set(column(train, "smokes").tolist()) == {0, 1}


def test_what_is_missing_in_test_rows_only_gets_no_mark() -> None:
    frame = patients()
    frame = with_gaps(with_gaps(frame, "age", [int(split_of(frame)[1][0])]), "site", [8])
    train, _ = sets(with_gaps(frame, "site", [int(split_of(frame)[1][1])]), columns=("age",))
    assert train.feature_names == ("age",)


def test_a_missing_category_is_none_of_them_and_a_mark() -> None:
    frame = patients()
    first, _ = split_of(frame)
    train, _ = sets(with_gaps(frame, "site", [int(first[7])]))
    names = ("site=hip", "site=spine", "site=wrist", "site missing")
    assert train.feature_names[1:5] == names
    assert train.features[7, 1:5].tolist() == [0, 0, 0, 1]
    assert not train.numeric[1:5].any()


def test_a_category_that_training_rows_do_not_have_is_none_of_them() -> None:
    frame = patients()
    frame.loc[int(split_of(frame)[1][0]), "site"] = "jaw"
    train, test = sets(frame)
    assert train.feature_names == test.feature_names
    assert "site=jaw" not in train.feature_names
    assert test.features[0, 1:4].tolist() == [0, 0, 0]


def test_numbers_can_be_categories() -> None:
    ward = np.resize([10, 2, 3], ROWS).astype(float)
    train, _ = sets(patients(ward=ward), columns=("ward",), categories=("ward",))
    assert train.feature_names == ("ward=2", "ward=3", "ward=10")
    assert not train.numeric.any()


def test_text_that_names_few_values_is_a_category_numbers_among_them_or_not() -> None:
    train, _ = sets(patients(grade=np.resize(["12", "abc", "7"], ROWS)), columns=("grade",))
    assert train.feature_names == ("grade=12", "grade=7", "grade=abc")


def test_text_that_holds_numbers_only_is_a_number() -> None:
    train, _ = sets(patients(age=[str(60 + i / 10) for i in range(ROWS)]), columns=("age",))
    assert train.feature_names == ("age",)
    assert train.numeric.all()


def test_numbers_of_hundreds_of_digits_are_texts() -> None:
    one, other = (int(digit * 400) for digit in "89")
    train, _ = sets(patients(sex=[one, other] * (ROWS // 2)))
    assert f"sex={other}" in train.feature_names


def test_a_named_category_may_have_many_values() -> None:
    ward = np.resize([f"ward {i}" for i in range(40)], ROWS)
    train, _ = sets(patients(ward=ward), columns=("ward",), categories=("ward",))
    assert len(train.feature_names) == 40


@pytest.mark.parametrize("gaps", [0, 5])
def test_truth_values_are_categories(gaps: int) -> None:
    fell = [None] * gaps + [True, False] * 100
    train, _ = sets(patients(fell=pd.Series(fell[:ROWS])), columns=("fell",))
    assert train.feature_names == ("fell=False", "fell=True", "fell missing")[: 3 if gaps else 2]


def test_a_data_frames_own_types_are_understood() -> None:
    frame = patients(
        ward=pd.Categorical(np.resize([3, 1, 2], ROWS)),
        falls=pd.array([None, None, *range(ROWS - 2)], dtype="Int64"),
        decimal=pd.Series([1.5, "7", *np.arange(ROWS - 2) / 8], dtype=object),
        grade=pd.Categorical(np.resize(range(40), ROWS)),
        born=pd.date_range("1920", periods=ROWS),
    )
    train, _ = sets(frame.rename(columns={"ward": 7}), leave_out=("id", "born", "site", "age"))
    assert train.feature_names[1:7] == ("7=1", "7=2", "7=3", "falls", "falls missing", "decimal")
    assert train.feature_names[7:] == tuple(f"grade={i}" for i in range(40))
    with pytest.raises(InputError, match="'born': holds 200 different texts"):
        sets(frame)


def test_columns_and_leave_out_choose_features() -> None:
    train, _ = sets(patients(), columns=("smokes", "age", "id"))
    assert train.feature_names == ("age", "smokes")  # in the table's order


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1.0, 0.0], ("0", "1")),
        ([10, 9], ("9", "10")),
        ([True, False], ("False", "True")),
        (["b", "a"], ("a", "b")),
    ],
)
def test_classes_are_sorted_values(values: list[Any], names: tuple[str, ...]) -> None:
    train, test = sets(patients(died=np.resize(values, ROWS)))
    assert train.class_names == test.class_names == names
    assert int(train.labels.sum()) == 90


def test_rows_without_outcome_are_dropped_on_wish() -> None:
    train, test = sets(with_gaps(patients(), "died", [3, 9]), drop_without_outcome=True)
    assert len(train) + len(test) == ROWS - 2


def test_the_data_frame_is_left_alone() -> None:
    frame = with_gaps(patients(), "age", [3])
    before = frame.copy()
    sets(frame, clip=0.1)
    pd.testing.assert_frame_equal(frame, before)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bones.csv", "bones.csv.gz"])
def test_a_file_gives_what_its_data_frame_gives(write: Callable[..., str], name: str) -> None:
    frame = with_gaps(patients(), "age", [3, 60])
    file = write(frame, name)
    source = Table(file, "died", leave_out=("id",), held_out=0.3, split_seed=5)
    expected = table_sets(frame, "died", leave_out=("id",), held_out=0.3, split_seed=5)
    for data, wanted in zip((source.train(), source.test()), expected, strict=True):
        torch.testing.assert_close(data.features, wanted.features)
        assert data.labels.tolist() == wanted.labels.tolist()
        assert data.feature_names == wanted.feature_names
        assert data.name == "bones"


def test_a_file_is_read_once_until_it_changes(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read_csv = [], pd.read_csv
    monkeypatch.setattr(pd, "read_csv", lambda *a, **k: reads.append(1) or read_csv(*a, **k))
    file = write(patients())
    source = Table(file, "died", leave_out=["id"])  # type: ignore[arg-type]
    source.train(), source.test(), source.train()
    assert len(reads) == 1
    write(patients()[:120])
    os.utime(file, ns=(1, 1))
    assert len(source.train()) == 108
    assert len(reads) == 2


def test_other_marks_of_missing_values_are_read_as_such(write: Callable[..., str]) -> None:
    age = [str(60 + i / 10) for i in range(ROWS)]
    age[1], age[2] = ".A", "-9"
    file = write(patients(age=age))
    train = Table(file, "died", columns=("age",), missing=(".A", "-9")).train()
    assert train.feature_names == ("age", "age missing")
    assert column(train, "age missing").sum() == 2


# --- what is refused ------------------------------------------------------------------------------

COUNTED = [f"p{i}" for i in range(ROWS)]


@pytest.mark.parametrize(
    ("columns", "settings", "told"),
    [
        ({}, {"outcome": "dead"}, r"outcome = 'dead': .*no such column; did you mean 'died'\?"),
        ({}, {"outcome": "xyz"}, "no such column; its columns are id, age, site, smokes, died"),
        ({}, {"leave_out": ("agee",)}, "leave_out = 'agee': .*did you mean 'age'"),
        ({}, {"columns": ("age", "sight")}, "columns = 'sight': .*did you mean 'site'"),
        ({}, {"categories": ("smoke",)}, "categories = 'smoke': .*did you mean 'smokes'"),
        ({}, {"columns": ("died",)}, "no column is left as a feature"),
        ({"land": "NL"}, {}, "column 'land': is 'NL' in all 180 training rows; .*leave_out"),
        ({"land": 3}, {}, "column 'land': is '3' in all 180 training rows; .*leave_out"),
        ({"land": np.nan}, {}, "column 'land': all .* missing; .*leave_out"),
        ({"age": np.resize([1.0, 2, np.inf], ROWS)}, {}, "column 'age', row 3: is inf"),
        ({"name": COUNTED}, {}, "column 'name': holds 200 different texts.*leave_out.*categories"),
        ({"age": ["77"] * 3 + ["abc"] + COUNTED[4:]}, {}, "column 'age', row 4: is 'abc'.*number"),
        ({"died": "no"}, {}, "column 'died': is 'no' in all rows"),
        ({"died": ["yes"] + ["no"] * 199}, {}, "column 'died': class 'yes' has 1 row"),
        ({"died": np.arange(ROWS)}, {}, "column 'died': class '0' has 1 row .* 200 classes"),
        ({}, {"held_out": 0.999}, "held_out = 0.999: .*class 'no'.*training"),
        ({}, {"held_out": 0.0}, "held_out = 0.0: must lie between 0 and 1"),
        ({}, {"held_out": 1.0}, "held_out = 1.0: must lie between 0 and 1"),
        ({}, {"held_out": float("nan")}, "held_out = nan: must lie between 0 and 1"),
        ({}, {"clip": 0.5}, r"clip = 0.5: must be at least 0 and less than 0\.5"),
        ({}, {"clip": -0.1}, "clip = -0.1: must be at least 0"),
    ],
)
def test_what_cannot_be_used_is_named(
    columns: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        sets(patients(**columns), **settings)


def test_a_column_twice_is_refused() -> None:
    frame = patients()
    frame.columns = ["id", "age", "age", "smokes", "died"]
    with pytest.raises(InputError, match="two columns are called 'age'"):
        sets(frame)


def test_one_number_and_gaps_is_no_number() -> None:
    frame = with_gaps(patients(mark=1), "mark", [3, 9])
    with pytest.raises(
        InputError, match=r"column 'mark': is '1' in all .*not missing; .*categories"
    ):
        sets(frame)
    train, _ = sets(frame, categories=("mark",), columns=("mark",))
    assert train.feature_names == ("mark=1", "mark missing")


@pytest.mark.parametrize("name", ["age", "site"])
def test_missing_values_are_refused_on_wish(name: str) -> None:
    frame = with_gaps(patients(), name, [11, 30])
    with pytest.raises(InputError, match=rf"column '{name}', row 12: .*missing \(2 rows\)"):
        sets(frame, on_missing="error")


def test_rows_without_outcome_are_counted() -> None:
    with pytest.raises(InputError, match=r"'died': 2 rows .*first row 4.*drop_without_outcome"):
        sets(with_gaps(patients(), "died", [3, 9]))
    with pytest.raises(InputError, match="'died': no row has a value"):
        sets(patients(died=np.nan), drop_without_outcome=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("a,b\n", "holds no rows"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "cannot be read as CSV"),
        ('a,b\n1,2\n1,2,"\n', "cannot be read as CSV"),
        ("a,died\n1,2,3\n4,5,6\n", "more values than its header has names"),
        ("a,died\n0,2,3\n4,5,6\n", "more values than its header has names"),
        ("a,died,died\n0,no,no\n1,yes,yes\n", "two columns are called 'died'; rename one"),
        ("a;died\n1;2\n", "'died': .*its one column is 'a;died'; separate columns by commas"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    write: Callable[..., str], content: str | bytes, told: str
) -> None:
    file = write(content)
    with pytest.raises(InputError, match=told) as caught:
        Table(file, "died").train()
    assert file in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: no such file; correct data\.file"):
        Table(str(tmp_path / "none.csv"), "died").train()
    with pytest.raises(InputError, match="no such file"):
        Table(str(tmp_path), "died").test()


def test_a_broken_archive_is_named(write: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"bones\.csv\.gz: cannot be read as CSV"):
        Table(write("a,b\n1,2\n", "bones.csv.gz"), "died").train()
    half = gzip.compress(b"a,died\n" + b"1,no\n2,yes\n" * 999)
    damaged = bytearray(half)
    damaged[20:30] = bytes(10)
    with pytest.raises(InputError, match=r"bones\.csv\.gz: cannot be read as CSV"):
        Table(write(bytes(damaged), "bones.csv.gz"), "died").train()


def test_a_file_names_itself_in_every_sentence(write: Callable[..., str]) -> None:
    file = write(patients())
    with pytest.raises(InputError, match="did you mean 'died'") as caught:
        Table(file, "dead").train()
    assert file in str(caught.value)


@pytest.mark.parametrize("settings", [{"held_out": 0.0}, {"clip": 0.7}])
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must"):
        Table("bones.csv", "died", **settings)


def test_features_of_no_and_yes_that_hardly_any_training_row_has_are_left_out() -> None:
    """One row of a hundred says what nobody else does: as a category, as missing, as a number."""
    n = 400
    age = pd.Series(np.arange(n, dtype=float))
    frame = pd.DataFrame(
        {
            "age": age.where(age != 7),  # one is missing
            "ward": ["odd" if i < 3 else ("left", "right")[i % 2] for i in range(n)],
            "alarm": [float(i == 9) for i in range(n)],
            "died": [("no", "yes")[i // 2 % 2] for i in range(n)],
        }
    )
    kept = table_sets(frame, "died", held_out=0.25, rare=0.02)[0]
    assert kept.feature_names == ("age", "ward=left", "ward=right")
    every = table_sets(frame, "died", held_out=0.25, rare=0.0)[0]
    assert set(every.feature_names) > {"ward=odd", "age", "ward=left"}
    assert len(every.feature_names) > len(kept.feature_names)
    columns = [every.feature_names.index(name) for name in kept.feature_names]
    assert torch.equal(every.features[:, columns], kept.features)
    with pytest.raises(InputError, match=r"data\.rare = 0\.6"):
        table_sets(frame, "died", rare=0.6)
    with pytest.raises(InputError, match=r"data\.rare = 0\.02: leaves no column"):
        table_sets(frame, "died", columns=("alarm",), held_out=0.25, rare=0.02, split_seed=1)
