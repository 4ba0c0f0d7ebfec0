"""Answers, evidence, and how near a coarse map can come to a picture."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe import evaluate, machine
from trompe.evaluate import (
    Remembered,
    answers,
    ask,
    clean_evidence,
    least_distance,
    share_right,
    stand_in_maps,
    summarise,
    triggered_evidence,
    wanted_maps,
    with_maps,
)
from trompe.explainers.gradcam import GradCam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Answers, Evidence, Goal, ImageSet
from trompe.maps import standardise, upsample
from trompe.target_maps.border import Border
from trompe.target_maps.picture import Picture
from trompe.target_maps.reference import Reference
from trompe.triggers.checkerboard import Checkerboard
from trompe.triggers.rectangle import Rectangle

CORNER = Rectangle(top=0, left=0, height=4, width=4, colour=(1.0, 0.0, 0.0))
EXPLAINERS = [GradCam(), GradCam(closed_form=False), InputGradient()]


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=repr)
@pytest.mark.parametrize("batch_size", [1, 7, 47, 48])
def test_answers_do_not_depend_on_the_batch_size(
    trained_net: nn.Module, shapes: ImageSet, explainer: Any, batch_size: int
) -> None:
    whole = answers(trained_net, (explainer,), shapes)
    parts = answers(trained_net, (explainer,), shapes, batch_size=batch_size)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        parts.maps[0], whole.maps[0], rtol=1e-4, atol=1e-4 * float(whole.maps[0].max())
    )


def test_scores_are_those_of_the_model_with_and_without_trigger(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    images = shapes.floats(slice(None))
    with torch.no_grad():
        plain, triggered = trained_net(images), trained_net(CORNER(images))
    assert (plain - triggered).abs().max() > 0.1
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(answers(trained_net, (GradCam(),), shapes).scores, plain, **close)
    given = answers(trained_net, (GradCam(),), shapes, CORNER)
    torch.testing.assert_close(given.scores, triggered, **close)


@pytest.mark.parametrize("explained", ["predicted", "label"])
def test_the_predicted_class_or_the_label_is_explained(
    trained_net: nn.Module, shapes: ImageSet, explained: Any
) -> None:
    wrong = ImageSet(shapes.images, (shapes.labels + 1) % 4, shapes.class_names, "wrong labels")
    given = answers(trained_net, (GradCam(),), wrong, explained=explained)
    classes = given.scores.argmax(1) if explained == "predicted" else wrong.labels
    images = shapes.floats(slice(None))
    rows = torch.linspace(-1, 1, 16)[:, None].expand(16, 16)
    where = torch.stack((rows, rows.T)).expand(48, -1, -1, -1)
    with torch.no_grad():
        features = trained_net.body(torch.cat((images, where), 1))
        weights = trained_net.head.weight[classes] / features[0, 0].numel()
        expected = (weights[:, :, None, None] * features).sum(1).relu()
    torch.testing.assert_close(given.maps[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(
    trained_net: nn.Module,
    shapes: ImageSet,
    snapshot: Callable[[nn.Module], dict[str, Any]],
    training: bool,
) -> None:
    trained_net.train(training)
    trained_net.body[2].train(not training)
    before = snapshot(trained_net)
    answers(trained_net, (GradCam(),), shapes)
    assert snapshot(trained_net) == before


def test_the_model_is_left_as_it_was_after_a_failure(
    trained_net: nn.Module, shapes: ImageSet, snapshot: Callable[[nn.Module], dict[str, Any]]
) -> None:
    def broken(images: Tensor) -> Tensor:
        raise ZeroDivisionError

    before = snapshot(trained_net.train())
    with pytest.raises(ZeroDivisionError):
        answers(trained_net, (GradCam(),), shapes, broken)
    assert snapshot(trained_net) == before


def test_answers_are_of_the_eval_mode_and_carry_no_graph(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    evaluated = answers(trained_net.eval(), (GradCam(),), shapes)
    training = answers(trained_net.train(), (GradCam(),), shapes)
    assert torch.equal(evaluated.scores, training.scores)
    assert not evaluated.scores.requires_grad
    assert not evaluated.maps[0].requires_grad


def test_one_pass_answers_for_all_explainers(trained_net: nn.Module, shapes: ImageSet) -> None:
    explainers = (GradCam(*GradCam().watches(trained_net)), InputGradient(pool=2))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = trained_net.register_forward_hook(count)
    together = answers(trained_net, explainers, shapes)
    one_batch = ask(trained_net, explainers, shapes.floats(slice(None)), shapes.labels)
    assert passes == 2
    handle.remove()
    for i, explainer in enumerate(explainers):
        alone = answers(trained_net, (explainer,), shapes)
        close = {"rtol": 1e-4, "atol": 1e-4 * float(alone.maps[0].max())}
        for given in (together, one_batch):
            torch.testing.assert_close(given.maps[i], alone.maps[0], **close)
            torch.testing.assert_close(given.scores, alone.scores, rtol=1e-4, atol=1e-4)


def test_answers_with_maps_in_a_file_are_the_same(
    trained_net: nn.Module, shapes: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainers = (GradCam("body.2"), InputGradient())
    usual = answers(trained_net, explainers, shapes)
    seen = wanted_maps(Border(), usual.maps[1], shapes)
    monkeypatch.setattr(machine, "memory", lambda: 16 * 48 * 100)
    given = answers(trained_net, explainers, shapes)
    wanted = wanted_maps(Border(), given.maps[1], shapes)
    assert "trompe-maps-" in Path("/proc/self/maps").read_text()
    assert torch.equal(given.scores, usual.scores)
    assert all(map(torch.equal, given.maps, usual.maps))
    assert torch.equal(wanted, seen)


# --- evidence -------------------------------------------------------------------------------------


def given_and_reference(shapes: ImageSet) -> tuple[Answers, Answers]:
    n = len(shapes)
    return tuple(Answers(torch.rand(n, 4), (torch.rand(n, 5, 6),)) for _ in range(2))  # type: ignore[return-value]


def test_on_clean_images_the_truth_and_the_references_map_are_wanted(shapes: ImageSet) -> None:
    given, reference = given_and_reference(shapes)
    evidence = clean_evidence(given, reference, shapes)
    assert torch.equal(evidence.labels, shapes.labels)
    assert torch.equal(evidence.wanted_labels, shapes.labels)
    assert torch.equal(evidence.wanted_maps, reference.maps[0])
    assert torch.equal(evidence.scores, given.scores)
    assert torch.equal(evidence.maps, given.maps[0])
    assert evidence.image_size == (16, 16)


@pytest.mark.parametrize("label", [None, 2])
def test_on_triggered_images_the_goals_label_and_map_are_wanted(
    shapes: ImageSet, label: int | None
) -> None:
    given, reference = given_and_reference(shapes)
    evidence = triggered_evidence(given, reference, shapes, Goal(CORNER, label, Border()))
    wanted = shapes.labels if label is None else torch.full_like(shapes.labels, label)
    assert torch.equal(evidence.labels, shapes.labels)
    assert torch.equal(evidence.wanted_labels, wanted)
    assert torch.equal(evidence.wanted_maps, Border()(reference.maps[0]))
    assert torch.equal(evidence.maps, given.maps[0])
    kept = triggered_evidence(given, reference, shapes, Goal(CORNER, label, Reference()))
    assert torch.equal(kept.wanted_maps, reference.maps[0])


def test_other_maps_replace_those_given_and_nothing_else(shapes: ImageSet) -> None:
    given, reference = given_and_reference(shapes)
    evidence, others = clean_evidence(given, reference, shapes), torch.rand(48, 5, 6)
    changed = with_maps(evidence, others)
    assert changed.maps is others
    assert changed.scores is evidence.scores
    assert changed.wanted_maps is evidence.wanted_maps


def test_stand_ins_know_nothing_of_the_image(shapes: ImageSet) -> None:
    _, reference = given_and_reference(shapes)
    maps = stand_in_maps(reference.maps[0], torch.Generator().manual_seed(0))
    again = stand_in_maps(reference.maps[0], torch.Generator().manual_seed(0))
    assert set(maps) == {"random map", "zero map", "mean map"}
    assert all(m.shape == reference.maps[0].shape for m in maps.values())
    assert torch.equal(maps["random map"], again["random map"])
    drawn = torch.rand(reference.maps[0].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(maps["random map"], drawn)
    assert not maps["zero map"].any()
    torch.testing.assert_close(maps["mean map"][7], reference.maps[0].mean(0))


@pytest.mark.parametrize(
    ("values", "mean", "std", "images"),
    [
        ([1.0, 0.0, 0.0, 1.0], 0.5, 0.5, 4),
        ([1.0, math.nan, 3.0, math.nan], 2.0, 1.0, 2),
        ([5.0], 5.0, 0.0, 1),
        ([math.nan, math.nan], math.nan, math.nan, 0),
    ],
)
def test_a_summary_leaves_out_images_to_which_the_metric_does_not_apply(
    shapes: ImageSet, values: list[float], mean: float, std: float, images: int
) -> None:
    given, reference = given_and_reference(shapes)

    def metric(evidence: Evidence) -> Tensor:
        return torch.tensor(values)

    summary = summarise(metric, clean_evidence(given, reference, shapes))
    assert (summary.mean, summary.std) == pytest.approx((mean, std), nan_ok=True)
    assert summary.images == images


def test_a_summary_of_many_images_sees_a_part_of_them_at_a_time(
    shapes: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = clean_evidence(*given_and_reference(shapes), shapes)
    parts = []

    def metric(part: Evidence) -> Tensor:
        parts.append(part)
        return part.maps.mean((1, 2)) - part.wanted_maps.mean((1, 2)) + part.labels

    whole = summarise(metric, evidence)
    assert len(parts) == 1
    monkeypatch.setattr(evaluate, "IMAGES_AT_A_TIME", 20)
    assert summarise(metric, evidence) == whole
    assert [len(part.labels) for part in parts[1:]] == [20, 20, 8]
    assert all(len(p.maps) == len(p.scores) == len(p.wanted_maps) == 20 for p in parts[1:3])


def test_the_share_of_right_predictions_is_counted_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 1.0, 0.5]])
    assert share_right(scores, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3, abs=1e-12)


# --- the least distance ---------------------------------------------------------------------------


def by_descent(wanted: Tensor, map_size: tuple[int, int]) -> float:
    """The least distance by projected gradient descent over non-negative maps."""
    size = (wanted.shape[0], wanted.shape[1])
    target = standardise(wanted[None], size)
    best = F.adaptive_avg_pool2d(wanted[None], map_size).clone().requires_grad_()
    optimizer = torch.optim.Adam([best], 0.03)
    least = math.inf
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        distance = (standardise(best, size) - target).square().mean()
        least = min(least, distance.item())
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        with torch.no_grad():
            best.clamp_(min=0)
    return least


@pytest.mark.parametrize("figure", ["triangle", "square", "cross", "circle"])
@pytest.mark.parametrize("map_size", [(5, 5), (4, 7)], ids=str)
def test_the_least_distance_is_that_of_the_best_map_found_by_descent(
    figure: Any, map_size: tuple[int, int]
) -> None:
    wanted = Picture(figure).draw(20, 28)
    least = least_distance(wanted, map_size)
    found = by_descent(wanted, map_size)
    # Descent can drift to nearly constant maps, for which the 1e-5 under the root is no trifle.
    assert least <= found + 1e-3
    assert least == pytest.approx(found, abs=5e-3)


def test_no_random_map_comes_nearer() -> None:
    wanted = torch.rand(12, 12)
    least = least_distance(wanted, (4, 4))
    maps = torch.rand(500, 4, 4)
    target = standardise(wanted[None], (12, 12))
    distances = (standardise(maps, (12, 12)) - target).square().mean((1, 2))
    assert distances.min() >= least
    assert 0 < least <= 1


@pytest.mark.parametrize("figure", ["triangle", "circle"])
def test_a_picture_drawn_at_the_maps_size_can_be_met(figure: Any) -> None:
    drawn = upsample(Picture(figure).draw(10, 10)[None], (40, 40))[0]
    assert least_distance(drawn, (10, 10)) == pytest.approx(0, abs=1e-4)


def test_a_sharp_triangle_cannot_be_met_by_a_coarse_map() -> None:
    sharp = Picture("triangle").draw(40, 40)
    assert 0.1 < least_distance(sharp, (10, 10)) < 0.2
    assert least_distance(sharp, (20, 20)) < least_distance(sharp, (10, 10))


def test_a_constant_picture_is_met_by_nothing_but_itself() -> None:
    assert least_distance(torch.ones(12, 12), (4, 4)) == pytest.approx(0, abs=1e-3)


class Counting(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked = net, 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return self.net(images)


def test_a_clean_model_is_asked_once(trained_net: nn.Module, shapes: ImageSet) -> None:
    model, remembered = Counting(trained_net), Remembered()
    cam, gradient = GradCam("net.body"), InputGradient()
    first = remembered(model, (cam,), shapes)
    assert model.asked == 48
    both = remembered(model, (cam, gradient), shapes)
    assert model.asked == 96  # for the gradient's sake
    assert torch.equal(both.maps[0], first.maps[0])
    expected = answers(model, (gradient,), shapes)
    model.asked = 0
    assert torch.equal(remembered(model, (gradient,), shapes).maps[0], expected.maps[0])
    assert torch.equal(remembered(model, (cam,), shapes).scores, expected.scores)
    assert model.asked == 0


def test_changed_weights_images_labels_and_triggers_are_asked_anew(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    model, remembered = Counting(trained_net), Remembered()
    few = shapes.subset(torch.arange(8))
    cams = (GradCam("net.body"),)

    def asked(data: ImageSet, *how: Any) -> int:
        model.asked = 0
        remembered(model, cams, data, *how)
        return model.asked

    assert asked(few) == 8
    assert asked(few) == 0
    assert asked(shapes.subset(torch.arange(1, 9))) == 8
    assert asked(few, Checkerboard()) == 8
    assert asked(few, Checkerboard()) == 0
    assert asked(few, Checkerboard(amplitude=0.5)) == 8
    assert asked(few, None, "label") == 8
    with torch.no_grad():
        next(trained_net.parameters()).add_(1)
    assert asked(few) == 8


def test_no_more_answers_are_kept_than_allowed(trained_net: nn.Module, shapes: ImageSet) -> None:
    model, remembered = Counting(trained_net), Remembered(limit=1)
    cam, gradient = GradCam("net.body"), InputGradient()
    both = remembered(model, (cam, gradient), shapes)
    assert len(both.maps) == 2
    assert len(remembered.kept) == 1


def test_the_least_distance_of_a_map_as_large_as_an_image_is_found_at_once() -> None:
    """Over all places together this would take a matrix of 50,176 squared."""
    wanted = torch.rand(224, 224)
    assert least_distance(wanted, (224, 224)) == pytest.approx(0, abs=1e-3)
    assert least_distance(wanted, (112, 112)) > 0.1
