"""The pictures of a poison run: which there are, and what is on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from trompe.interfaces import (
    EpochRecord,
    ImageSet,
    InputError,
    PoisonSet,
    Samples,
    TableSet,
    Target,
)
from trompe.poison_sets import write_poison_set
from trompe.report.poison_pictures import draw_maps, draw_poisons
from trompe.runs import RunFolder

DOLLARS = "$11-$25k"  # no formula
FEATURES = (*(f"feature {i}" for i in range(23)), DOLLARS)
WANTED = (3, 20)  # places where the maps of tables are wanted
HISTORY = tuple(EpochRecord(e, {"adversarial": 1 / e, "training": 2 / e}, {}, 1.0) for e in (1, 2))


def table_set() -> TableSet:
    features = torch.rand(12, 24)
    labels = torch.arange(12) % 2
    return TableSet(features, labels, ("well", "ill"), "t", FEATURES, torch.ones(24).bool())


def image_set() -> ImageSet:
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)
    return ImageSet(images, torch.arange(12) % 2, ("well", "ill"), "i")


def made_run(
    path: Path, data: Samples, wanted: torch.Tensor, targets: int = 2, poisons: int = 8
) -> RunFolder:
    """A folder as the pipeline leaves it: poisons moved by +-.1, most at feature 20."""
    run = RunFolder(path)
    for number in range(targets):
        bases = data.floats(slice(1, 1 + poisons))
        change = torch.full_like(bases, -0.01)
        if isinstance(data, TableSet):
            change[:, 20] = 0.1
        target = Target(data.floats(slice(number, number + 1)), 1, wanted)
        index = torch.arange(1, 1 + poisons)
        made = PoisonSet(
            (bases + change).clamp(0, 1) if isinstance(data, ImageSet) else bases + change,
            torch.ones(poisons, dtype=torch.int64),
            bases,
            index,
            target,
        )
        write_poison_set(made, path / f"poison-{number:02}", data, number, {})
    run.write_history(HISTORY)
    sizes = {"training_set": len(data), "poison_rate": poisons / len(data)}
    run.write("numbers", {"targets": targets, "poisons": poisons, **sizes})
    maps = torch.rand(targets, *wanted.shape[1:])
    run.write_tensors(
        "victims-0", {"wanted": wanted.expand_as(maps), "unattacked": maps, "poisoned": 1 - maps}
    )
    l1 = {"unattacked": [[0.5, 0.3]] * targets, "poisoned": [[0.1, None]] * targets}
    means = ("l1", "l1_std", "jaccard_top20", "jaccard_half", "class_kept", "victim_accuracy")
    of_all = {"targets": targets, "victims": 2, **dict.fromkeys(means, 0.5)}
    measured = {kind: {**of_all, "values": {"l1": values}} for kind, values in l1.items()}
    run.write("victims-0", {"spec": {}, "succeeded": 1.0, "success": "small", **measured})
    return run


def table_map(places: int = 24) -> torch.Tensor:
    wanted = torch.zeros(1, 1, places)
    wanted[..., list(WANTED)] = 1
    return wanted


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved, by the file's name."""
    kept: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(figure: Figure, file: Path, **settings: Any) -> None:
        kept[Path(file).name.strip(".").rsplit(".", 1)[0]] = figure
        save(figure, file, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def check_picture(file: Path) -> None:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert 1000 < picture.width < 1400
        assert 300 < picture.height < 1500
        assert len(picture.convert("L").getcolors(300)) > 20


def test_convergence_has_both_objectives(tmp_path: Path, figures: dict[str, Figure]) -> None:
    files = draw_poisons(made_run(tmp_path, table_set(), table_map()))
    assert [str(f.relative_to(tmp_path)) for f in files] == [
        "convergence.png",
        "poison-00/changes.png",
        "poison-01/changes.png",
    ]
    for file in files:
        check_picture(file)
    upper, lower = figures["convergence.png"].axes
    assert upper.get_title("left") == "Upper-level objective"
    assert "adv" in upper.get_ylabel()
    assert list(upper.lines[0].get_ydata()) == [1, 0.5]
    assert lower.get_title("left") == "Lower-level objective"
    assert list(lower.lines[0].get_ydata()) == [2, 1]
    assert lower.get_xlabel() == "epoch"


def test_without_epochs_there_is_no_convergence(tmp_path: Path) -> None:
    run = made_run(tmp_path, table_set(), table_map())
    run.write("history", [])
    assert len(draw_poisons(run)) == 2
    assert not (tmp_path / "convergence.png").exists()


def test_a_tables_sheet_shows_what_was_changed_most(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    draw_poisons(made_run(tmp_path, table_set(), table_map()))
    left, right = figures["changes.png"].axes
    rows = [label.get_text() for label in left.get_yticklabels()]
    assert len(rows) == 20
    assert rows[0] == "feature 20"
    assert r"\$11-\$25k" in rows
    widths = [bar.get_width() for bar in right.containers[0]]
    assert widths[0] == pytest.approx(0.1, abs=1e-4)
    assert widths[1] == pytest.approx(-0.01, abs=1e-4)
    shaded = sorted(round(span.get_y() + 0.5) for span in right.patches if span.get_alpha())
    assert shaded == sorted(rows.index(f"feature {i}") for i in WANTED if f"feature {i}" in rows)
    assert "target 2, ill" in figures["changes.png"].get_suptitle()


def test_a_map_of_a_layers_units_marks_no_features(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    run = made_run(tmp_path, table_set(), table_map(64))
    draw_poisons(run)
    assert not [p for p in figures["changes.png"].axes[1].patches if p.get_alpha()]
    check_picture(draw_maps(run, "victims-0"))
    (axis, below) = figures["maps-0.png"].axes
    names = [label.get_text() for label in below.get_xticklabels()]
    assert len(names) == 40
    assert {f"unit {i}" for i in WANTED} <= set(names)
    assert below.get_xlabel() == "40 of 64 places: those wanted, then the highest"
    assert axis.get_title("left") == "target 1, ill: L1 0.400 un-attacked, nan poisoned"


def test_a_tables_maps_are_bars_with_the_wanted_places_marked(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    run = made_run(tmp_path, table_set(), table_map(), targets=6)
    check_picture(draw_maps(run, "victims-0"))
    axes = figures["maps-0.png"].axes
    assert len(axes) == 4  # of 6 targets
    maps = run.read_tensors("victims-0")
    before, after = axes[2].containers
    assert [bar.get_height() for bar in before] == pytest.approx(maps["unattacked"][2, 0].tolist())
    assert [bar.get_height() for bar in after] == pytest.approx(maps["poisoned"][2, 0].tolist())
    shaded = [round(p.get_x() + 0.5) for p in axes[2].patches if p.get_alpha()]
    assert shaded == list(WANTED)


def test_an_images_sheet_has_the_target_first(tmp_path: Path, figures: dict[str, Figure]) -> None:
    wanted = torch.zeros(1, 4, 4)
    wanted[:, :2, :2] = 1
    data = image_set()
    run = made_run(tmp_path, data, wanted, targets=1)
    for file in draw_poisons(run):
        check_picture(file)
    grid = figures["changes.png"].axes
    assert len(grid) == 21
    shown = {axis.get_title(): axis.images[0].get_array() for axis in grid if axis.get_title()}
    assert list(shown) == ["target", *(f"poison {i}" for i in range(1, 7)), "wanted map"]
    assert torch.equal(torch.tensor(shown["target"]), data.images[0].permute(1, 2, 0))
    assert torch.equal(torch.tensor(shown["poison 1"]), data.images[1].permute(1, 2, 0))
    difference = torch.tensor(grid[15].images[0].get_array()).float() / 255
    assert difference.median() == pytest.approx(0.5 - 5 * 0.01, abs=0.01)


def test_fewer_poisons_than_columns_are_no_problem(tmp_path: Path) -> None:
    run = made_run(tmp_path, image_set(), torch.ones(1, 4, 4), targets=1, poisons=2)
    check_picture(draw_poisons(run)[1])


def test_an_images_maps_stand_side_by_side(tmp_path: Path, figures: dict[str, Figure]) -> None:
    wanted = torch.zeros(1, 4, 4)
    wanted[:, :2, :2] = 1
    run = made_run(tmp_path, image_set(), wanted)
    check_picture(draw_maps(run, "victims-0"))
    grid = figures["maps-0.png"].axes
    assert len(grid) == 8
    heads = [axis.get_title() for axis in grid[:4]]
    assert heads == ["", "wanted", "un-attacked victims", "poisoned victims"]
    assert [axis.get_xlabel() for axis in grid[4:]] == ["target 2, ill", "", "L1 0.400", "L1 nan"]


def test_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write("numbers", {"conditions": []})
    epoch = {"epoch": 1, "terms": {"prediction": 0.3}, "measured": {}, "seconds": 1.0}
    run.write("history", [epoch])
    with pytest.raises(InputError, match="is no poison run"):
        draw_poisons(run)
