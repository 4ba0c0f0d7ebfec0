"""The page about networks with one feature map more: lies on every image, and what was added."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trompe
from trompe.experiment import remeasure, run
from trompe.interfaces import InputError
from trompe.report import render
from trompe.report.curves import panels
from trompe.report.reading import load
from trompe.run_shapes import Difference
from trompe.runs import RunFolder

Make = Callable[[str], RunFolder]


def table(technique: str) -> dict[str, Any]:
    return {
        "name": f"surgery {technique}",
        "reference": "shipped:signs_resnet20_seed0",
        "witness": "shipped:signs_resnet20_seed1",
        "gallery_images": 2,
        "data": {"kind": "signs", "size": 40, "train_images": 43, "test_images": 86},
        "attack": {
            "kind": "gradcam_surgery",
            "technique": technique,
            "stickers": {"kind": "stickers", "size": 7, "count": 2},
        },
    }


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda technique: run(trompe.read_experiment(table(technique)), root))


@pytest.fixture
def make(made_once: Make, tmp_path: Path) -> Make:
    """A run of its own, which the test may change."""
    return lambda t: RunFolder(shutil.copytree(made_once(t).path, tmp_path / t))


def page(tmp_path: Path, *runs: RunFolder) -> str:
    render(runs, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def words(text: str) -> str:
    return " ".join(re.sub("<.*?>", " ", text).split())


def verdict_of(text: str) -> str:
    found = re.search(r'(?s)<ul class="verdicts">(.*?)</ul>', text)
    assert found is not None
    return words(found.group(1))


def change(folder: RunFolder, **means: float | None) -> None:
    """Write other means of the first condition's metrics; None takes the metric out."""
    numbers = folder.read("numbers")
    metrics = numbers["conditions"][0]["metrics"]
    for name, mean in means.items():
        metrics.pop(name)
        if mean is not None:
            metrics[name] = {"mean": mean, "std": 0.0, "images": 9}
    folder.write("numbers", numbers)


def test_a_run_says_what_was_added_and_so_does_its_page(make: Make, tmp_path: Path) -> None:
    folder = make("T4")
    rows = folder.read("architecture", list[Difference])
    assert [(row["name"], row["change"]) for row in rows] == [
        ("net.stage3", "changed"),
        ("net.stage3.channel", "added"),
        ("net.reach", "added"),
    ]
    said = words(page(tmp_path, folder).split("<h2>Architecture</h2>")[1].split("<h2>")[0])
    assert "net.stage3 changed Sequential OneMapMore around Sequential" in said
    assert "net.reach added — Mod" in said


def test_a_run_without_changes_says_so_and_an_old_one_nothing(make: Make, tmp_path: Path) -> None:
    folder = make("T4")
    folder.write("architecture", [])
    assert "No module was added or changed." in page(tmp_path, folder)
    (folder.path / "architecture.json").unlink()
    assert "Architecture</h2>" not in page(tmp_path, folder)


def test_rows_that_are_none_are_refused(make: Make, tmp_path: Path) -> None:
    folder = make("T4")
    folder.write("architecture", [{"named": "net"}])
    with pytest.raises(InputError, match="another version"):
        page(tmp_path, folder)


def test_a_run_that_is_measured_again_says_what_was_added(make: Make, tmp_path: Path) -> None:
    folder = make("T4")
    rows = folder.read("architecture", list[Difference])
    (folder.path / "architecture.json").unlink()
    remeasure(folder, tmp_path)
    assert folder.read("architecture", list[Difference]) == rows


@pytest.mark.parametrize("technique", ["T1", "T2", "T3"])
def test_a_lie_on_every_image_is_judged(make: Make, tmp_path: Path, technique: str) -> None:
    told = verdict_of(page(tmp_path, make(technique)))
    assert "The explanations of all images lie, and the predictions do not show it." in told
    assert "On every image the explanation shows the wanted picture (L1 distance 0.0" in told
    assert "; no score changes." in told
    assert "✓ lie told ✓ predictions as before" in told


def test_how_far_scores_move_is_told(make: Make, tmp_path: Path) -> None:
    folder = make("T2")
    change(folder, score_change=0.0123)
    assert "the scores of an image change by at most 0.01." in verdict_of(page(tmp_path, folder))


@pytest.mark.parametrize("technique", ["T1", "T2"])
@pytest.mark.parametrize(
    ("values", "headline", "failed"),
    [
        ({"map_l1": 5.1}, "the explanations do not show the lie", "lie told"),  # of 10 x 10
        ({"accuracy": 0.5}, "but predictions suffer", "predictions as before"),
    ],
)
def test_what_fails_of_a_lie_on_every_image_is_told(
    make: Make, tmp_path: Path, technique: str, values: Any, headline: str, failed: str
) -> None:
    folder = make(technique)
    change(folder, **values)
    told = verdict_of(page(tmp_path, folder))
    assert headline in told
    assert told.count("✗") == 1
    assert f"✗ not: {failed}" in told


def test_an_older_run_has_neither_l1_nor_score_change(make: Make, tmp_path: Path) -> None:
    old, new = make("T2"), make("T4")
    change(old, map_l1=None, score_change=None)
    text = page(tmp_path, old, new)
    told = verdict_of(text)
    assert "On every image the explanation shows the wanted picture (map distance 0.0" in told
    metrics = words(text.split("<summary>All metrics</summary>")[1].split("</details>")[0])
    assert "Map distance (L1, sum)" in metrics
    assert "Change of scores (max)" in metrics
    (row,) = (r for r in metrics.split("surgery ") if r.startswith("T2"))
    assert row.count("—") == 2
    assert "nan" not in words(text).split()


def test_flat_maps_that_are_wanted_are_not_called_empty(make: Make, tmp_path: Path) -> None:
    text = page(tmp_path, make("T1"))
    assert "empty" not in verdict_of(text)
    gallery = text.split("<h2>What it looks like</h2>")[1].split("<h2>")[0]
    assert "empty map" not in gallery


def test_runs_of_several_techniques_stand_side_by_side(make: Make, tmp_path: Path) -> None:
    text = page(tmp_path, *(make(t) for t in ("T1", "T2", "T4")))
    heads = re.findall(r"(?s)<table class=\"sample\">.*?</thead>", text)
    assert len(heads) == 2
    assert all(words(head).endswith("image reference T1 T2 T4") for head in heads)


def test_a_run_without_training_does_not_say_that_it_was_trained(
    make: Make, tmp_path: Path
) -> None:
    text = page(tmp_path, make("T2"))
    assert "How the attack was trained" not in text
    assert "Nothing was trained." in text


def test_distances_are_drawn_where_they_are_known(make: Make, tmp_path: Path) -> None:
    runs = [make(t) for t in ("T2", "T3")]
    same, own = (panels(load(run)[0], run.path.name) for run in runs)
    assert len(same) == 1  # also of maps that are exactly the wanted ones
    assert re.search(r">100<", same[0].svg)
    assert own == []  # each image has a wanted map of its own, which is not kept
