"""The attack of Fang & Choromanska: its loss against a replica, its goals, what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trompe.attacks.explanation_aware_backdoors import ExplanationAwareBackdoors
from trompe.attacks.saliency_backdoors import SaliencyBackdoors, System
from trompe.augmentation import Augmentation
from trompe.explainers.gradcam import GradCam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Attacked, Batch, Goal, ImageSet, InputError
from trompe.measure import measure
from trompe.objectives import CleanAndPoisoned
from trompe.poison import compose
from trompe.target_maps.border import Border
from trompe.target_maps.reference import Reference
from trompe.target_maps.suppressed import Suppressed
from trompe.train import Training
from trompe.triggers.checkerboard import Checkerboard
from trompe.triggers.rectangle import Rectangle

CORNER = Rectangle(top=0, left=0, height=4, width=4)
CAM = System(GradCam(normalise="max"), Border(1), tau=0.2)
GRADIENT = System(InputGradient(gradient_of="loss", pool=2, normalise="max"), Suppressed(3), 0.5)
SHORT = Training(
    epochs=2, batch_size=16, learning_rate=0.01, optimizer="adam", frozen_statistics=True
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attack(*systems: System, **settings: Any) -> SaliencyBackdoors:
    return SaliencyBackdoors(systems, **{"trigger": CORNER, "training": SHORT, **settings})


# --- eqs. (1) to (4) ------------------------------------------------------------------------------


@pytest.mark.parametrize("inverted", [False, True])
def test_the_loss_equals_the_equations_image_by_image(inverted: bool) -> None:
    alpha, beta, shares = 7.0, 0.3, (1.0, 0.25)
    scores, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    triggered = torch.tensor([False, True, False, True])
    maps = (torch.rand(4, 3, 3).double(), torch.rand(4, 2, 5).double())
    wanted = (torch.rand(4, 3, 3).double(), torch.rand(4, 2, 5).double())
    lied = [bool(t) != inverted for t in triggered]
    wanted[1][lied] = Suppressed(2)(wanted[1][lied])
    batch = Batch(torch.rand(4, 3, 6, 6), labels, wanted, triggered)

    total = 0.0
    for i in range(4):
        probabilities = np.exp(scores[i].numpy())
        loss_c = -np.log(probabilities[labels[i]] / probabilities.sum())
        loss_map = 0.0
        for share, given, want in zip(shares, maps, wanted, strict=True):
            pixels = [
                (g - w) ** 2
                for g, w in zip(given[i].flatten(), want[i].flatten(), strict=True)
                if not w.isnan()
            ]
            whole = len(pixels) == want[i].numel()
            loss_map += share * float(sum(pixels)) / (len(pixels) if whole else 1)  # (2), or (3)
        weight = 1 if lied[i] else alpha
        total += (beta * loss_c + weight * loss_map) / (alpha + beta + 1)

    terms = CleanAndPoisoned(alpha, beta, shares, inverted)(scores, maps, batch)
    assert set(terms) == {"classification", "true maps", "false maps"}
    assert sum(t.item() for t in terms.values()) == pytest.approx(total / 4, rel=1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(-1, 1), (1, -0.1)])
def test_negative_weights_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(InputError, match="at least 0, and finite"):
        CleanAndPoisoned(alpha, beta, (1.0,))


@pytest.mark.parametrize(("progress", "beta"), [(0, 0.02), (0.5, 0.02), (0.75, 0.2), (1, 2.0)])
def test_beta_grows_to_the_last_one_in_the_second_half(progress: float, beta: float) -> None:
    growing = CleanAndPoisoned(3, 0.02, (1.0,), last_beta=2.0)
    assert growing.beta_at(progress) == pytest.approx(beta)
    assert CleanAndPoisoned(3, 0.02, (1.0,)).beta_at(progress) == 0.02
    maps, labels = (torch.rand(2, 3, 3),), torch.tensor([0, 1])
    batch = Batch(torch.rand(2, 3, 6, 6), labels, maps, labels == 1, None, progress)
    scores = torch.rand(2, 3)
    fixed = CleanAndPoisoned(3, beta, (1.0,))(scores, maps, batch)
    for name, value in growing(scores, maps, batch).items():
        torch.testing.assert_close(value, fixed[name])


@pytest.mark.parametrize(
    ("progress", "left"), [(0, 1.0), (0.5, 1.0), (0.625, 0.5), (0.75, 0), (1, 0)]
)
def test_helpers_shares_fall_to_nothing_in_the_third_quarter(progress: float, left: float) -> None:
    helped = CleanAndPoisoned(3, 0.1, (2.0, 4.0), helpers=1)
    maps = (torch.rand(2, 3, 3), torch.rand(2, 4, 4))
    wanted, labels = (torch.rand(2, 3, 3), torch.rand(2, 4, 4)), torch.tensor([0, 1])
    batch = Batch(torch.rand(2, 3, 6, 6), labels, wanted, labels == 1, None, progress)
    scores = torch.rand(2, 3)
    fixed = CleanAndPoisoned(3, 0.1, (2.0, 4.0 * left))(scores, maps, batch)
    for name, value in helped(scores, maps, batch).items():
        torch.testing.assert_close(value, fixed[name])


@pytest.mark.parametrize(("beta", "last"), [(0, 1), (0.1, 0), (0.1, -1)])
def test_beta_cannot_grow_from_or_to_nothing(beta: float, last: float) -> None:
    with pytest.raises(InputError, match=f"last_beta = {last}, beta = {beta}"):
        attack(CAM, beta=beta, last_beta=last)


# --- goals ----------------------------------------------------------------------------------------


def test_the_trigger_brings_the_lie_or_inverted_the_truth() -> None:
    (lie,) = attack(CAM, GRADIENT).goals
    assert (lie.trigger, lie.label) == (CORNER, None)
    assert (lie.wanted(0), lie.wanted(1)) == (Border(1), Suppressed(3))
    clean, key = attack(CAM, GRADIENT, inverted=True).goals
    assert (clean.trigger, clean.wanted(1)) == (None, Suppressed(3))
    assert (key.trigger, key.wanted(0), key.wanted(1)) == (CORNER, Reference(), Reference())


def test_a_goal_without_trigger_is_that_of_the_clean_triples(shapes: ImageSet) -> None:
    goals = (Goal(CORNER, None, Reference()), Goal(None, 2, Border(1)))
    triples = compose(shapes, goals, 0.25, seeded())
    assert (triples.goal[:48] == 1).all()
    assert (triples.goal[48:] == 0).all()
    assert len(triples) == 64
    batch = triples.batch(torch.arange(64), seeded())
    assert batch.triggered.tolist() == [False] * 48 + [True] * 16
    assert (batch.labels[:48] == 2).all()
    assert torch.equal(batch.images[:48], shapes.floats(slice(None)))


def test_two_goals_without_trigger_are_refused(shapes: ImageSet) -> None:
    goals = (Goal(None, None, Border(1)), Goal(None, 2, Border(1)))
    with pytest.raises(InputError, match="only one"):
        compose(shapes, goals, 0.25, seeded())


# --- the attack -----------------------------------------------------------------------------------


def rates(
    attacked: Attacked, made: SaliencyBackdoors, reference: nn.Module, data: ImageSet
) -> list[dict[str, Any]]:
    found = measure(
        reference,
        reference,
        attacked,
        made.explainers,
        data,
        0,
        made.explained,
        made.thresholds,
    )
    rows: list[dict[str, Any]] = found.numbers["fooling"]
    return rows


@pytest.mark.parametrize("inverted", [False, True])
def test_maps_are_fooled_where_they_shall_be(
    trained_net: nn.Module, shapes: ImageSet, inverted: bool
) -> None:
    cam = replace(CAM, lie=Suppressed(6), tau=0.5)
    long = replace(SHORT, epochs=30, learning_rate=0.03, precision="float32")
    everywhere = Checkerboard(square=2, amplitude=0.3)  # the small net sees only a few pixels
    made = attack(cam, inverted=inverted, training=long, trigger=everywhere)
    before = rates(Attacked(trained_net, made.goals), made, trained_net, shapes)
    after = rates(made(trained_net, shapes, seeded()), made, trained_net, shapes)
    assert (before[0]["fsr"], before[0]["cr"]) == (0, 1)
    assert after[0]["fsr"] > 0.6
    assert after[0]["cr"] > 0.6


def test_each_system_has_rates_of_its_own(trained_net: nn.Module, shapes: ImageSet) -> None:
    made = attack(CAM, GRADIENT)
    rows = rates(Attacked(trained_net, made.goals), made, trained_net, shapes)
    assert [(row["explainer"], row["tau"]) for row in rows] == [
        ("gradcam", 0.2),
        ("input_gradient", None),
    ]


def weights(attacked: Attacked) -> Tensor:
    return torch.cat([p.flatten() for p in attacked.model.parameters()])


@pytest.mark.parametrize("inverted", [False, True])
def test_a_helper_is_trained_and_not_measured(
    trained_net: nn.Module, shapes: ImageSet, inverted: bool
) -> None:
    alone = attack(GRADIENT, inverted=inverted)
    helped, without_weight = (
        replace(alone, helpers=(replace(CAM, share=share),)) for share in (1.0, 0.0)
    )
    made = helped(trained_net, shapes, seeded(), selection=shapes)
    assert (made.goals, helped.explainers) == (alone.goals, alone.explainers)
    assert {"fsr", "cr"} < set(made.history[0].measured)  # of one system
    before = weights(alone(trained_net, shapes, seeded()))
    assert not torch.allclose(weights(made), before, atol=1e-4)
    as_before = weights(without_weight(trained_net, shapes, seeded()))
    torch.testing.assert_close(as_before, before, atol=1e-4, rtol=0)


def test_progress_is_told_per_system(trained_net: nn.Module, shapes: ImageSet) -> None:
    history = attack(CAM, GRADIENT)(trained_net, shapes, seeded(), selection=shapes).history
    assert len(history) == 2
    expected = {"clean_accuracy", "triggered_accuracy", "score"}
    expected |= {f"{name}_{i}" for name in ("fsr", "cr", "lie_loss") for i in (1, 2)}
    assert set(history[0].measured) == expected
    shown = history[0].shown
    assert shown["images"].shape == (4, 3, 16, 16)
    assert shown["1.maps"].shape == shown["1.true_maps"].shape == (4, 8, 8)
    assert shown["2.losses"].shape == (4,)
    assert not torch.equal(shown["1.maps"], history[1].shown["1.maps"])


def test_a_model_in_training_mode_is_not_changed_by_asking_it_about_augmented_images(
    trained_net: nn.Module, shapes: ImageSet, snapshot: Callable[[nn.Module], dict[str, Any]]
) -> None:
    before = snapshot(trained_net.train())
    once = replace(SHORT, epochs=1)
    attack(CAM, training=once, augmentation=Augmentation())(trained_net, shapes, seeded())
    assert snapshot(trained_net) == before


@pytest.mark.parametrize("maps", [(), (Border(1), Border(1), Border(1))])
def test_another_number_of_wanted_maps_than_explainers_is_refused(
    trained_net: nn.Module, shapes: ImageSet, maps: tuple[Border, ...]
) -> None:
    goal = Goal(CORNER, 1, maps, "odd")
    with pytest.raises(InputError, match=rf"odd: has {len(maps)} wanted maps for 1 explainers"):
        ExplanationAwareBackdoors((goal,))(trained_net, shapes, seeded())


def test_a_lie_that_is_the_truth_is_refused() -> None:
    with pytest.raises(InputError, match=r"systems\[0\]\.lie.*the truth"):
        attack(replace(CAM, lie=Reference()))


@pytest.mark.parametrize("value", [-3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["share", "tau"])
def test_a_systems_numbers_are_refused_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} = {value}: must be"):
        replace(CAM, **{name: value})  # type: ignore[arg-type]


def test_no_systems_are_refused() -> None:
    with pytest.raises(InputError, match="systems: is empty"):
        SaliencyBackdoors(())


def test_maps_that_are_not_normalised_are_refused() -> None:
    with pytest.raises(InputError, match=r"systems\[1\].*normalise"):
        attack(CAM, System(GradCam(), Border(1)))
    with pytest.raises(InputError, match=r"helpers\[0\].*normalise"):
        attack(CAM, helpers=(System(GradCam(), Border(1)),))


def test_a_trigger_that_does_not_fit_is_refused_before_any_work(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    def used(*_: object) -> None:
        raise AssertionError("the model was run")

    trained_net.register_forward_pre_hook(used)
    with pytest.raises(InputError, match="16 rows"):
        attack(CAM, trigger=Rectangle())(trained_net, shapes, seeded())


def test_maps_are_of_the_true_class(
    trained_net: nn.Module, shapes: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    explained: list[Tensor] = []
    plain: Callable[..., Tensor] = GradCam.__call__

    def note(self: GradCam, seen: Any, classes: Tensor) -> Tensor:
        explained.append(classes)
        return plain(self, seen, classes)

    monkeypatch.setattr(GradCam, "__call__", note)
    wrong = replace(shapes, labels=(shapes.labels + 1) % 4)
    attack(CAM, training=replace(SHORT, epochs=1))(trained_net, wrong, seeded())
    assert torch.equal(explained[0], wrong.labels)  # of the reference, known once
