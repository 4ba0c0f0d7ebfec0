"""The page about an attack on several interpretation systems: each has its own numbers."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trompe import catalog
from trompe.attacks.saliency_backdoors import SaliencyBackdoors, System
from trompe.data.signs import Signs
from trompe.experiment import Experiment
from trompe.explainers.gradcam import GradCam
from trompe.explainers.visual_backprop import VisualBackProp
from trompe.interfaces import Attacked, ImageSet
from trompe.measure import gallery, measure
from trompe.models.resnet20 import resnet20
from trompe.report import curves, render
from trompe.report.reading import load
from trompe.runs import RunFolder
from trompe.target_maps.border import Border
from trompe.target_maps.suppressed import Suppressed


def made(folder: Path, inverted: bool, timeline: bool = True) -> RunFolder:
    """A finished run of untrained models on noise."""
    dice = torch.Generator().manual_seed(7)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=dice)
    data = ImageSet(images, torch.arange(12) % 3, ("stop", "yield", "turn"), "noise")
    attack = SaliencyBackdoors(
        (
            System(GradCam(normalise="max"), Border(1), tau=0.2),
            System(VisualBackProp(pool=4), Suppressed(3)),
        ),
        inverted=inverted,
    )
    reference, witness, attacked = (resnet20(3).eval() for _ in range(3))
    goals = Attacked(attacked, attack.goals)
    found = measure(
        reference, witness, goals, attack.explainers, data, 0, "label", attack.thresholds
    )
    experiment = Experiment("joint", Signs(), attack, gallery_images=3)
    run = RunFolder(folder)
    run.open(catalog.describe(experiment))
    run.write("provenance", {"commit": "c0ffee", "seconds": 12.5})
    measured = {"clean_accuracy": 0.5, "fsr_1": 0.5, "cr_1": 0.9, "lie_loss_1": 0.1, "score": 1.0}
    measured |= {"fsr_2": 0.25, "cr_2": 0.75, "lie_loss_2": 0.4, "rank_2": 3.0}
    history = [
        {"epoch": e, "terms": {"classification": 1 / e}, "measured": measured, "seconds": 1.0}
        for e in (1, 2)
    ]
    run.write("history", history)
    run.write_tensors("evidence", found.evidence)
    run.write_tensors("gallery", gallery(found, data, 3, 0))
    run.write("classes", list(data.class_names))
    if timeline:
        kept = {}
        for epoch in (1, 2):
            kept[f"{epoch}.images"] = images[:2].clone()
            for system, size in ((1, 4), (2, 4)):
                kept[f"{epoch}.{system}.true_maps"] = torch.rand(2, size, size)
                kept[f"{epoch}.{system}.maps"] = torch.rand(2, size, size)
                kept[f"{epoch}.{system}.losses"] = torch.tensor([0.75 / epoch, 0.15])
        run.write_tensors("timeline", kept)
    run.write("numbers", {**found.numbers, "epochs": 2, "reporting_images": 12})
    return run


def page(tmp_path: Path, run: RunFolder) -> str:
    render([run], tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def set_rates(run: RunFolder, **values: float) -> None:
    numbers = run.read("numbers")
    for row in numbers["fooling"]:
        row |= values
    for row in numbers["conditions"]:
        row["metrics"]["accuracy"]["mean"] = row["reference_accuracy"] = 0.9
    run.write("numbers", numbers)


def verdicts(text: str) -> list[str]:
    found = re.search(r'(?s)<ul class="verdicts">(.*?)</ul>', text)
    assert found is not None
    items = re.findall(r"(?s)<li>(.*?)</li>", found.group(1))
    return [" ".join(re.sub("<.*?>", " ", item).split()) for item in items]


@pytest.mark.parametrize("inverted", [False, True])
def test_each_system_has_a_verdict_rates_and_galleries(tmp_path: Path, inverted: bool) -> None:
    text = page(tmp_path, made(tmp_path / "run", inverted))
    first, second = verdicts(text)
    assert ">1 run: joint · gradcam" in text  # two systems
    assert first.startswith("joint · gradcam, seed 0")
    assert second.startswith("joint · visual_backprop, seed 0")
    where = "Without the key" if inverted else "With the trigger"
    assert f"{where}," in first
    assert "threshold 0.200" in first
    assert "from the data" in second  # no threshold was given
    assert text.count("lie without trigger" if inverted else "lie with trigger") == 2
    assert "Share of fooled maps at every threshold" in text
    assert len(re.findall(r'(?s)<table class="sample">', text)) == 6


@pytest.mark.parametrize(
    ("rates", "headline"),
    [
        ({"fsr": 0.97, "cr": 0.99}, "The explanations lie, and the predictions do not show it."),
        ({"fsr": 0.6, "cr": 0.99}, "The attack fails: too few explanations lie."),
        ({"fsr": 0.97, "cr": 0.8}, "The explanations lie where they shall, and elsewhere, too."),
    ],
)
def test_the_verdict_follows_the_rates(
    tmp_path: Path, rates: dict[str, float], headline: str
) -> None:
    run = made(tmp_path / "run", inverted=False)
    set_rates(run, **rates)
    assert headline in verdicts(page(tmp_path, run))[0]


def test_lost_accuracy_is_told(tmp_path: Path) -> None:
    run = made(tmp_path / "run", inverted=False)
    set_rates(run, fsr=0.97, cr=0.99)
    numbers = run.read("numbers")
    numbers["conditions"][1]["metrics"]["accuracy"]["mean"] = 0.7
    run.write("numbers", numbers)
    text = verdicts(page(tmp_path, run))[0]
    assert "predictions suffer" in text
    assert "✗ not: predictions as before" in text


def test_each_systems_curves_are_its_own_and_carry_its_name(tmp_path: Path) -> None:
    run = made(tmp_path / "run", inverted=False)
    first, second = load(run)
    shared = {"clean_accuracy": 0.5, "score": 1.0, "rank_2": 3.0}  # there is no rank_1
    assert first.history[1].measured == {"fsr": 0.5, "cr": 0.9, "lie_loss": 0.1, **shared}
    assert second.history[1].measured == {"fsr": 0.25, "cr": 0.75, "lie_loss": 0.4, **shared}
    text = page(tmp_path, run)
    labels = re.findall(r'aria-label="Mean loss against the lie per epoch: (.*?)"', text)
    assert labels == ["L_p of gradcam", "L_p of visual_backprop"]
    figures = re.findall(r'(?s)aria-label="Mean loss against the lie.*?</svg>', text)
    rates = re.findall(r'aria-label="Fooling and correct rate per epoch: (.*?)"', text)
    assert rates == [
        "FSR of gradcam, CR of gradcam",
        "FSR of visual_backprop, CR of visual_backprop",
    ]
    assert ">tau of gradcam<" in figures[0]
    assert ">tau of visual_backprop, data<" in figures[1]  # no threshold was given
    assert "visual_backprop" not in figures[0]
    assert "gradcam" not in figures[1]


def test_the_maps_of_each_epoch_are_shown_with_their_loss(tmp_path: Path) -> None:
    text = page(tmp_path, made(tmp_path / "run", inverted=False))
    films = re.findall(r'(?s)<table class="film">(.*?)</table>', text)
    assert len(films) == 2
    assert films[0].count("<img") == 2 * (1 + 2)
    assert films[0].count("◎") == 2  # .15, below .2, after both epochs
    for loss in ("0.750", "0.375", "0.150"):
        assert loss in films[0]
    assert [film.count('aria-label="L_p of these images') for film in films] == [1, 1]


def test_a_film_has_the_curve_of_its_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = load(made(tmp_path / "run", inverted=False))
    drawn: list[Any] = []
    monkeypatch.setattr(curves, "_svg", lambda figure, key: drawn.append(figure) or key)
    assert curves.film_curve(run, "run0").svg == "run0-film"
    *images, mean, tau = ([*map(float, line.get_ydata())] for line in drawn[0].axes[0].lines)
    assert images == torch.stack([moment.losses for moment in run.timeline]).T.double().tolist()
    assert mean == [record.measured["lie_loss"] for record in run.history]
    assert set(tau) == {run.fooling.threshold}
    assert curves.film_curve(dataclasses.replace(run, timeline=()), "run0") is None


def test_without_a_timeline_there_is_none(tmp_path: Path) -> None:
    assert "maps while training" not in page(tmp_path, made(tmp_path / "run", False, False))
