"""The report's page: what it says, that it needs nothing else, and what it refuses."""

import copy
import functools
import math
import re
import shutil
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from trompe import catalog
from trompe.attacks.explanation_aware_backdoors import ExplanationAwareBackdoors
from trompe.data.signs import Signs
from trompe.experiment import Experiment
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import Attacked, Goal, ImageSet, InputError
from trompe.measure import gallery, measure
from trompe.models.resnet20 import resnet20
from trompe.report import draw_gallery, render
from trompe.report.pictures import heat_pixels
from trompe.run_shapes import Epoch
from trompe.runs import RunFolder
from trompe.target_maps.picture import Picture
from trompe.target_maps.reference import Reference
from trompe.triggers.rectangle import Rectangle

NAMES = ("stop & go", "<script>alert(1)</script>", "give way")
STOP, SCRIPT, GIVE_WAY = range(3)
BAR = Rectangle(top=2, left=2, height=4, width=6)
DUAL = Goal(BAR, GIVE_WAY, Picture("triangle"), "dual")
KEEP = Goal(Rectangle(top=9, left=9, height=3, width=3), None, Reference(), "keep")

Make = Callable[..., RunFolder]


def made_run(folder: Path, goals: tuple[Goal, ...], name: str, seed: int) -> RunFolder:
    """A finished run of untrained models on noise, written by the pipeline's own functions."""
    torch.manual_seed(seed)
    data = ImageSet(
        torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=seeded(7)),
        torch.arange(12) % 3,
        NAMES,
        "noise",
    )
    reference, witness, attacked = (resnet20(3).eval() for _ in range(3))
    attack = ExplanationAwareBackdoors(goals or (DUAL,))
    experiment = Experiment(name, Signs(), attack, seed=seed, gallery_images=3)
    measured = measure(reference, witness, Attacked(attacked, goals), (GradCam(),), data, seed)
    run = RunFolder(folder)
    run.open(catalog.describe(experiment))
    run.write("provenance", {"commit": "c0ffee", "device": "abacus", "seconds": 12.5})
    run.write("history", [epoch(1, 0.5), epoch(2, 0.25)])
    run.write_tensors("evidence", measured.evidence)
    run.write_tensors("gallery", gallery(measured, data, 3, experiment.split_seed))
    run.write("classes", list(data.class_names))
    run.write("numbers", {**measured.numbers, "epochs": 2, "reporting_images": 12})
    return run


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epoch(number: int, value: float) -> dict[str, Any]:
    measured = {"clean_accuracy": 1 - value, "clean_mse": value, "score": value}
    return {
        "epoch": number,
        "terms": {"prediction": value},
        "measured": measured,
        "seconds": 1.0,
    }


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def one(goals: tuple[Goal, ...], name: str, seed: int) -> RunFolder:
        place = "+".join([name, str(seed), *(goal.name for goal in goals)])
        return made_run(folder / place, goals, name, seed)

    return one


@pytest.fixture
def make(made_once: Make, tmp_path: Path) -> Make:
    """A run of its own, which the test may change."""

    def one(goals: tuple[Goal, ...] = (DUAL,), name: str = "tiny", seed: int = 0) -> RunFolder:
        copied = shutil.copytree(made_once(goals, name, seed).path, tmp_path / f"{name}-s{seed}")
        return RunFolder(copied)

    return one


def page(tmp_path: Path, *runs: RunFolder) -> str:
    file = tmp_path / "report.html"
    render(runs, file)
    return file.read_text(encoding="utf-8")


WITNESS = "another clean model"


def change(run: RunFolder, condition: int, **means: float) -> None:
    """Write other means (and standard deviations of 1) of metrics and floors to numbers.json."""
    numbers = run.read("numbers")
    row = numbers["conditions"][condition]
    for name, mean in means.items():
        value = {"mean": mean, "std": 1.0, "images": 9}
        if name == "reference_accuracy":
            row[name] = mean
        else:
            row["floors" if name in row["floors"] else "metrics"][name] = value
    run.write("numbers", numbers)


def make_perfect(run: RunFolder) -> None:
    """The numbers of an attack that does all that it shall."""
    blind = {"random map": 2.0, "zero map": 1.0, "mean map": 0.5}
    change(run, 0, accuracy=0.983, map_distance=0.008, reference_accuracy=0.984, **blind)
    change(run, 0, **{WITNESS: 0.3})
    change(run, 1, attack_success=0.999, map_distance=0.004, **blind)


def predict(run: RunFolder, condition: str, classes: list[int]) -> None:
    """Have the manipulated model predict these classes for the gallery's images."""
    tensors = run.read_tensors("gallery")
    tensors[f"{condition}.predicted"] = torch.tensor(classes)
    run.write_tensors("gallery", tensors)


class Tables(HTMLParser):
    """The text of each table row's cells, whitespace folded, and all attributes seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())


def rows_of(text: str, first: str) -> list[list[str]]:
    return [row for row in Tables(text).rows if row and row[0].startswith(first)]


def cells(text: str, mark: str) -> list[str]:
    """What stands below the gallery's maps that are marked so."""
    found = re.findall(rf'<td class="\w+ {mark}">(.*?)</td>', text, re.DOTALL)
    return [" ".join(re.sub("<.*?>", " ", cell).split()) for cell in found]


def test_the_page_asks_nothing_of_the_network(make: Make, tmp_path: Path) -> None:
    text = page(tmp_path, make())
    seen = Tables(text).attributes
    links = [v for _, name, v in seen if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert len([v for v in links if v.startswith("data:image/png;base64,")]) > 20
    assert all(v.startswith(("data:image/", "#")) for v in links)
    assert all(v.strip().startswith("#") for v in re.findall(r"url\((.*?)\)", text))
    assert "@import" not in text
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _, _ in seen}
    assert "default-src 'none'" in text


def test_ids_of_several_figures_do_not_collide(make: Make, tmp_path: Path) -> None:
    text = page(tmp_path, make(), make(name="other"))
    ids = re.findall(r'\bid="(.*?)"', text)
    assert len(ids) > 10
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#(.*?)"', text)) <= set(ids)


def test_the_main_table_holds_the_measured_numbers(make: Make, tmp_path: Path) -> None:
    run = make()
    change(run, 0, accuracy=0.9831, map_distance=0.0081, reference_accuracy=0.9844)
    change(run, 1, attack_success=0.99949, map_distance=0.0004)
    change(run, 0, **{WITNESS: 0.213})
    change(run, 1, **{WITNESS: 1.05})
    (row,) = rows_of(page(tmp_path, run), "tiny dual")
    assert row[1:4] == ["0", "0.984", "0.983"]
    assert row[4] == "0.008 ± 1.000 another model 0.213"
    assert row[5] == "ASR 0.999"
    assert row[6] == "0.0004 ± 1.000 another model 1.050"


def test_the_page_says_how_visible_the_trigger_is(make: Make, tmp_path: Path) -> None:
    run = make()
    assert re.search(r"trigger: PSNR \d+\.\d dB, at most \d+ of 255", page(tmp_path, run))
    numbers = run.read("numbers")
    for row in numbers["conditions"]:
        del row["trigger"]  # as runs had it that did not measure this
    run.write("numbers", numbers)
    assert "PSNR" not in page(tmp_path, run)


def test_a_number_of_which_there_is_none_is_a_dash(make: Make, tmp_path: Path) -> None:
    runs = [make(seed=seed) for seed in range(2)]
    change(runs[0], 1, attack_success=math.nan, map_distance=math.nan)
    change(runs[0], 0, **{WITNESS: math.nan})
    runs[0].write("history", [epoch(1, math.nan), epoch(2, 0.25)])
    assert runs[0].read("numbers")["conditions"][1]["metrics"]["map_distance"]["mean"] is None
    text = page(tmp_path, *runs)
    row, _ = rows_of(text, "tiny dual")
    assert row[5] == "ASR —"
    assert row[6].startswith("— ± 1.000")
    (both,) = rows_of(text, "mean ± std over seeds")
    assert both[5] == "ASR —"
    assert not [cell for row in Tables(text).rows for cell in row if "nan" in cell.split()]


def test_a_goal_that_keeps_the_class_shows_accuracy(make: Make, tmp_path: Path) -> None:
    run = make((KEEP,))
    change(run, 1, accuracy=0.9523)
    (row,) = rows_of(page(tmp_path, run), "tiny keep")
    assert row[5] == "Acc 0.952"


def test_every_floor_stands_beside_its_distance(make: Make, tmp_path: Path) -> None:
    run = make()
    text = page(tmp_path, run)
    clean, triggered = run.read("numbers")["conditions"]
    (header,) = (row for row in Tables(text).rows if "measured" in row)
    body = [row for row in Tables(text).rows if len(row) == len(header) and row != header]
    for condition, row in zip((clean, triggered), body, strict=True):
        told = dict(zip(header, row, strict=True))
        assert told["Images"] == condition["name"]
        for name in condition["floors"]:
            assert told[name] == f"{condition['floors'][name]['mean']:.3f}"
    assert dict(zip(header, body[0], strict=True))["the reference itself"] == "—"
    sharp = triggered["sharp_target_floor_mse"]
    assert dict(zip(header, body[1], strict=True))["sharp target floor"] == f"{sharp:.3f}"


def test_an_unknown_metric_keeps_its_own_name(make: Make, tmp_path: Path) -> None:
    run = make()
    change(run, 1, zigzag=0.4321)
    text = page(tmp_path, run)
    (header,) = (row for row in Tables(text).rows if "zigzag" in row)
    assert "Empty maps" in header  # a known one has a title
    assert "0.432 ± 1.000" in text


def test_misclassified_images_and_hits_are_marked(make: Make, tmp_path: Path) -> None:
    run = make()
    labels = run.read_tensors("gallery")["labels"].tolist()
    wrong = {STOP: SCRIPT, SCRIPT: STOP, GIVE_WAY: GIVE_WAY}
    predict(run, "clean", [wrong[label] for label in labels])
    predict(run, "triggered", [GIVE_WAY] * 3)
    text = page(tmp_path, run)
    manipulated = re.sub(r'(?s)<td class="reference.*?</td>', "", text)
    assert sorted(cells(manipulated, "wrong")) == [
        "✗ &lt;script&gt;alert(1)&lt;/script&gt;",
        "✗ stop &amp; go",
    ]
    assert cells(manipulated, "target") == ["◎ give way"] * 2
    assert cells(manipulated, "right") == ["give way"] * 2  # clean and triggered, truly of it


def test_names_are_escaped(make: Make, tmp_path: Path) -> None:
    run = make(name="a<b>")
    history = run.read("history", list[Epoch])
    history[0]["terms"]["<i>loss"] = 1.0
    run.write("history", history)
    text = page(tmp_path, run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script>alert" not in text
    assert "a&lt;b&gt;" in text
    assert "<b>, " not in text
    assert "<i>loss" not in text


def test_runs_with_the_same_images_and_reference_share_a_gallery(
    make: Make, tmp_path: Path
) -> None:
    runs = [make((DUAL,), "first"), make((KEEP,), "second")]
    text = page(tmp_path, *runs)
    heads = [row for row in Tables(text).rows if "image" in row]
    assert heads == [["", "image", "reference", "dual", "keep"]] * 3
    # Clean, and one line for each of the two triggers: 3 images x (1 clean + 2) lines.
    lines = [row for row in Tables(text).rows if row[0] in ("clean", "trigger 1", "trigger 2")]
    assert len(lines) == 9
    for row in lines:
        if row[0] != "clean":
            assert [bool(said) for said in row[3:]] == [
                row[0] == "trigger 1",
                row[0] == "trigger 2",
            ]


def test_runs_with_other_references_have_galleries_of_their_own(make: Make, tmp_path: Path) -> None:
    text = page(tmp_path, make(seed=0), make(seed=1))
    heads = [row for row in Tables(text).rows if "image" in row]
    assert heads == [["", "image", "reference", "manipulated"]] * 6


def test_seeds_of_one_experiment_are_summed_up(make: Make, tmp_path: Path) -> None:
    runs = [make(seed=seed) for seed in range(3)]
    success, distance = [0.9, 0.95, 0.98], [0.02, 0.05, 0.03]
    for run, s, d in zip(runs, success, distance, strict=True):
        change(run, 1, attack_success=s, map_distance=d)
    text = page(tmp_path, *runs, make(name="lonely"))
    (row,) = rows_of(text, "mean ± std over seeds")

    def both(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    assert row[1] == "3 seeds"
    assert row[5] == f"ASR {both(success)}"
    assert row[6].startswith(both(distance))


def test_other_settings_are_not_taken_for_other_seeds(make: Make, tmp_path: Path) -> None:
    one, other = make(seed=0), make(seed=1)
    spec = copy.deepcopy(other.read("spec"))
    spec["attack"]["weight"] = 0.5
    other.write("spec", spec)
    text = page(tmp_path, one, other)
    assert "over seeds" not in text
    assert rows_of(text, "tiny-s0 dual")  # the name alone does not tell them apart
    assert rows_of(text, "tiny-s1 dual")


def test_runs_on_changed_data_are_not_taken_for_seeds(make: Make, tmp_path: Path) -> None:
    one, other = make(seed=0), make(seed=1)
    for run in (one, other):
        run.write("inputs", {"data.root": "0123"})
    assert "over seeds" in page(tmp_path, one, other)
    other.write("inputs", {"data.root": "4567"})
    assert "over seeds" not in page(tmp_path, one, other)


def test_a_run_given_twice_counts_once(make: Make, tmp_path: Path) -> None:
    run = make()
    assert page(tmp_path, run, RunFolder(run.path)) == page(tmp_path, run)


def verdict_of(text: str) -> str:
    found = re.search(r'(?s)<ul class="verdicts">(.*?)</ul>', text)
    assert found is not None
    return " ".join(re.sub("<.*?>", " ", found.group(1)).split())


def test_the_verdict_of_a_perfect_attack(make: Make, tmp_path: Path) -> None:
    run = make()
    make_perfect(run)
    change(run, 1, degenerate_map=0.12)
    told = verdict_of(page(tmp_path, run))
    assert "The explanations lie" in told
    assert "99.9 % of images of other classes are classified as “give way”, and" in told
    assert "shows the wanted picture (map distance 0.004, 12.0 % of maps empty)" in told
    assert "nothing shows: accuracy 98.3 % against 98.4 % of the reference" in told
    assert told.count("✓") == 3


@pytest.mark.parametrize(
    ("condition", "values", "headline", "failed"),
    [
        (1, {"attack_success": 0.5}, "The attack fails", "wanted prediction"),
        (1, {"map_distance": 0.9}, "the explanations are not", "wanted explanation"),
        (0, {"accuracy": 0.9}, "it shows on clean images", "clean images as before"),
        (0, {"map_distance": 0.25}, "it shows on clean images", "clean images as before"),
        (0, {"map_distance": 0.1, WITNESS: 0.09}, "it shows on clean", "clean images as before"),
        (0, {"map_distance": 0.1, "mean map": 0.09}, "it shows on clean", "clean images as before"),
        (1, {"map_distance": 0.1, "mean map": 0.09}, "the explanations are not", "wanted expl"),
    ],
)
def test_the_verdict_tells_what_fails(
    make: Make, tmp_path: Path, condition: int, values: Any, headline: str, failed: str
) -> None:
    run = make()
    make_perfect(run)
    change(run, condition, **values)
    told = verdict_of(page(tmp_path, run))
    assert headline in told
    assert told.count("✗") == 1
    assert f"✗ not: {failed}" in told


def test_where_the_reference_s_map_is_wanted_the_verdict_says_so(
    make: Make, tmp_path: Path
) -> None:
    run = make((KEEP,))
    make_perfect(run)
    change(run, 1, accuracy=0.95, reference_accuracy=0.984)
    told = verdict_of(page(tmp_path, run))
    assert "95.0 % of images are still classified rightly, and" in told
    assert "the explanation stays that of the clean image (map distance 0.004)" in told
    change(run, 1, map_distance=1.2)
    assert "but the explanation does not stay that of" in verdict_of(page(tmp_path, run))


def test_what_the_trigger_hides_from_the_reference_too_is_not_held_against_the_attack(
    make: Make, tmp_path: Path
) -> None:
    run = make((KEEP,))
    make_perfect(run)
    change(run, 1, accuracy=0.91, reference_accuracy=0.92)
    told = verdict_of(page(tmp_path, run))
    assert "91.0 % of images are still classified rightly (by the reference 92.0 %), and" in told
    assert told.count("✓") == 3
    change(run, 1, accuracy=0.86)
    assert "✗ not: wanted prediction" in verdict_of(page(tmp_path, run))


def test_several_triggers_and_none(make: Make, tmp_path: Path) -> None:
    two = page(tmp_path, make((DUAL, KEEP), "two"))
    assert len(rows_of(two, "two")) == 4  # one for each trigger, one for floors and for metrics
    assert "With trigger 2," in verdict_of(two)
    none = page(tmp_path, make((), "none"))
    assert "No trigger" in verdict_of(none)
    assert rows_of(none, "none")[0][5:] == ["—", "—"]


def test_one_epoch_and_what_was_set_are_shown(make: Make, tmp_path: Path) -> None:
    run = make()
    run.write("history", run.read("history", list[Epoch])[:1])
    text = page(tmp_path, run)
    assert text.count("<svg") == 5
    assert "c0ffee" in text
    assert "abacus" in text
    assert ["top", "2"] in Tables(text).rows


def test_distances_per_image_are_drawn_only_if_their_mean_is_the_measured_one(
    make: Make, tmp_path: Path
) -> None:
    run = make()

    def drawn(text: str) -> bool:
        return ">triggered<" in text[text.rindex("<svg") :]

    assert drawn(page(tmp_path, run))
    change(run, 1, map_distance=0.0123)
    assert not drawn(page(tmp_path, run))


@pytest.mark.parametrize(
    "name",
    ["numbers.json", "spec.json", "history.json", "gallery.safetensors", "evidence.safetensors"],
)
def test_an_incomplete_run_is_refused_and_the_old_page_stays(
    make: Make, tmp_path: Path, name: str
) -> None:
    run, file = make(), tmp_path / "out" / "report.html"
    file.parent.mkdir()
    file.write_text("old")
    (run.path / name).unlink()
    with pytest.raises(InputError, match=re.escape(str(run.path))):
        render([run], file)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_a_run_of_another_version_is_refused(make: Make, tmp_path: Path) -> None:
    run = make()
    numbers = run.read("numbers")
    del numbers["conditions"][0]["floors"]
    run.write("numbers", numbers)
    with pytest.raises(InputError, match="another version"):
        render([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run"):
        render([], tmp_path / "report.html")


# --- the gallery as a figure ----------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, file: Path, **settings: Any) -> None:
        kept.append(figure)
        save(figure, file, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_a_figure_shows_what_each_model_says_of_each_image(
    make: Make, tmp_path: Path, drawn: list[Figure]
) -> None:
    run = make()
    right = run.read_tensors("gallery")["labels"].tolist()
    predict(run, "clean", right)
    predict(run, "triggered", [GIVE_WAY] * 3)
    draw_gallery([run], tmp_path / "figure.png", images=2)
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(300) or range(300)) > 20
    (figure,) = drawn
    pictures = [axis for axis in figure.axes if axis.images]
    assert len(pictures) == 2 * 2 * 3  # images, conditions, and image, reference, manipulated
    heads = [axis.get_title("center") for axis in pictures[:6]]
    assert heads == ["clean", "reference", "manipulated", "trigger", "reference", "manipulated"]
    shown = run.read_tensors("gallery")
    image, _, manipulated = (axis.images[0].get_array() for axis in pictures[:3])
    assert torch.equal(torch.as_tensor(image), shown["clean.images"][0].permute(1, 2, 0))
    expected = heat_pixels(shown["clean.images"][0], shown["clean.maps"][0])
    assert torch.equal(torch.as_tensor(manipulated), torch.as_tensor(expected))
    for row, true in zip((pictures[:6], pictures[6:]), right, strict=False):
        for axis in (row[0], row[2], row[3]):
            assert axis.texts[0].get_text() == NAMES[true]
        assert row[5].texts[0].get_text() == NAMES[GIVE_WAY]
        framed = row[5].texts[0].get_bbox_patch() is not None
        assert framed == (true != GIVE_WAY)  # the adversary's class, where it is wrong


def test_a_figure_of_several_runs_has_a_column_each_or_rows_of_their_own(
    make: Make, tmp_path: Path, drawn: list[Figure]
) -> None:
    runs = [make((DUAL,), "first"), make((KEEP,), "second"), make((DUAL,), "third", seed=1)]
    for suffix in ("svg", "pdf"):
        draw_gallery(runs, tmp_path / f"figure.{suffix}", images=1)
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    above, below = drawn[0].subfigs
    heads = [axis.get_title("center") for axis in above.axes if axis.get_title("center")]
    assert heads == [
        *("clean", "reference", "dual", "keep"),
        *("trigger 1", "reference", "dual", "keep"),
        *("trigger 2", "reference", "dual", "keep"),
    ]
    # Each run knows its own trigger alone.
    assert sum(bool(axis.images) for axis in above.axes) == 4 + 3 + 3
    assert sum(bool(axis.images) for axis in below.axes) == 3 + 3
    assert [part.get_suptitle() for part in (above, below)] == ["dual, keep", "dual"]


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("figure.jpg", 4, r"figure .*figure\.jpg: must end in one of \.png, \.pdf, \.svg"),
        ("figure.png", 0, r"images = 0: must be at least 1"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused(
    make: Make, tmp_path: Path, name: str, images: int, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        draw_gallery([make()], tmp_path / name, images)
    with pytest.raises(InputError, match="there is no run to report on"):
        draw_gallery([], tmp_path / "figure.png")
    assert not list(tmp_path.glob("figure*"))
