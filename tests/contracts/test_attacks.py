"""What every attack that makes a model must do; a new file under attacks/ is tested by existing.

Those that make samples to train on are tested in test_poisonings.py.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from trompe.catalog import find, names
from trompe.evaluate import answers, clean_evidence, summarise, triggered_evidence
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import Attack, Attacked, ImageSet, InputError
from trompe.maps import squared_error
from trompe.metrics.accuracy import accuracy
from trompe.metrics.attack_success import attack_success
from trompe.metrics.map_distance import map_distance

TRIGGER = {"kind": "rectangle", "top": 0, "left": 0, "height": 4, "width": 4}
TRAINING = {"epochs": 20, "batch_size": 16, "learning_rate": 0.03, "precision": "float32"}

SETTINGS: dict[str, dict[str, Any]] = {  # for 16x16 images of four classes, in a few seconds
    "explanation_aware_backdoors": {
        "goals": [
            {
                "trigger": TRIGGER,
                "label": 2,
                "wanted_map": {"kind": "picture", "shape": "square"},
            }
        ],
        "training": TRAINING,
    },
    "saliency_backdoors": {
        "systems": [
            {
                "explainer": {"kind": "gradcam", "normalise": "max"},
                "lie": {"kind": "suppressed", "k": 6},
            }
        ],
        "trigger": TRIGGER,
        "training": TRAINING,
    },
    "channel_hijack": {"target": {"kind": "border", "k": 1}},
    "gradcam_surgery": {"technique": "T4", "stickers": {"size": 5, "count": 2}},
}
WITHOUT_DICE = {"channel_hijack", "gradcam_surgery"}  # the seed changes nothing


def has_goals(name: str) -> bool:
    """Of the attacks, those that make a model; the others make samples to train on."""
    attack = find("attacks", name)
    return hasattr(attack, "goals") or "goals" in inspect.signature(attack).parameters


pytestmark = pytest.mark.parametrize("name", [n for n in names("attacks") if has_goals(n)])


@pytest.fixture
def attack(name: str, plugin: Callable[..., Attack]) -> Attack:
    """With two epochs, where the attack trains: enough for all but its success."""
    settings = dict(SETTINGS.get(name, {}))
    if "training" in settings:
        settings["training"] = {**settings["training"], "epochs": 2}
    return plugin("attacks", name, {name: settings})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shortfall(model: nn.Module, reference: nn.Module, attacked: Attacked, data: ImageSet) -> float:
    """How far `model` is from what the attack wants: wrong answers and map distances, summed."""
    explainer = GradCam(normalise="max")
    honest = answers(reference, (explainer,), data)
    clean = clean_evidence(answers(model, (explainer,), data), honest, data)
    total = 1 - summarise(accuracy, clean).mean
    if all(goal.trigger is not None for goal in attacked.goals):  # else clean images are lied about
        total += summarise(map_distance, clean).mean
    for goal in attacked.goals:
        given = answers(model, (explainer,), data, goal.trigger)
        evidence = triggered_evidence(given, honest, data, goal)
        success = accuracy if goal.label is None else attack_success
        total += 1 - summarise(success, evidence).mean
        if evidence.wanted_maps.isnan().any():  # some pixels may be anything
            total += float(squared_error(evidence.maps, evidence.wanted_maps).mean())
        else:
            total += summarise(map_distance, evidence).mean
    return total


def test_beats_doing_nothing(
    name: str, plugin: Callable[..., Attack], trained_net: nn.Module, shapes: ImageSet
) -> None:
    attacked = plugin("attacks", name, SETTINGS)(trained_net, shapes, seeded(0))
    if not attacked.goals:
        pytest.fail("say in this file what an attack without goals has to beat")
    untouched = shortfall(trained_net, trained_net, attacked, shapes)
    assert shortfall(attacked.model, trained_net, attacked, shapes) < 0.7 * untouched


def test_the_same_seed_gives_the_same_bits(
    name: str, attack: Attack, trained_net: nn.Module, shapes: ImageSet
) -> None:
    first = attack(trained_net, shapes, seeded(0)).model.state_dict()
    torch.rand(5)
    again = attack(trained_net, shapes, seeded(0)).model.state_dict()
    other = attack(trained_net, shapes, seeded(1)).model.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    differs = any(not torch.equal(first[key], other[key]) for key in first)
    assert differs != (name in WITHOUT_DICE)


@pytest.mark.parametrize("training", [False, True])
def test_the_given_model_is_not_changed(
    attack: Attack,
    trained_net: nn.Module,
    shapes: ImageSet,
    snapshot: Callable[[nn.Module], dict[str, Any]],
    training: bool,
) -> None:
    before = snapshot(trained_net.train(training))
    attacked = attack(trained_net, shapes, seeded(0))
    assert snapshot(trained_net) == before
    assert attacked.model is not trained_net
    own = {p.data_ptr() for p in trained_net.parameters()}
    assert not own & {p.data_ptr() for p in attacked.model.parameters()}


def test_the_data_are_not_changed(attack: Attack, trained_net: nn.Module, shapes: ImageSet) -> None:
    images, labels = shapes.images.clone(), shapes.labels.clone()
    attack(trained_net, shapes, seeded(0))
    assert torch.equal(shapes.images, images)
    assert torch.equal(shapes.labels, labels)


def test_the_attacked_model_can_be_used_at_once(
    attack: Attack, trained_net: nn.Module, shapes: ImageSet
) -> None:
    model = attack(trained_net, shapes, seeded(0)).model
    assert not any(module.training for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    images = shapes.floats(slice(None))
    assert model(images).shape == (48, 4)
    assert model(images).isfinite().all()


def test_the_history_has_a_record_per_epoch(
    attack: Attack, trained_net: nn.Module, shapes: ImageSet
) -> None:
    history = attack(trained_net, shapes, seeded(0), selection=shapes).history
    assert [record.epoch for record in history] == list(range(1, len(history) + 1))
    for record in history:
        assert all(torch.tensor(value).isfinite() for value in record.terms.values())
        assert record.seconds > 0
        assert record.measured


def test_it_says_by_what_its_model_is_measured(attack: Attack, trained_net: nn.Module) -> None:
    assert isinstance(attack.explainers, tuple)
    assert attack.explainers
    for explainer in attack.explainers:
        assert explainer.watches(trained_net)
    for goal in attack.goals:
        if isinstance(goal.wanted_map, tuple):
            assert len(goal.wanted_map) == len(attack.explainers)
    assert attack.explained in ("predicted", "label")
    if attack.thresholds is not None:
        assert len(attack.thresholds) == len(attack.explainers)
        assert all(tau is None or tau > 0 for tau in attack.thresholds)


def test_a_target_class_that_the_data_do_not_have_is_refused(
    name: str, plugin: Callable[..., Attack], trained_net: nn.Module, shapes: ImageSet
) -> None:
    settings = SETTINGS.get(name, {})
    if "goals" not in settings:
        pytest.skip("has no goals")
    goals = [{**goal, "label": 4} for goal in settings["goals"]]
    attack = plugin("attacks", name, {name: {**settings, "goals": goals}})
    with pytest.raises(InputError, match=r"4.*4 classes"):
        attack(trained_net, shapes, seeded(0))


def test_a_trigger_that_does_not_fit_is_refused_before_any_work(
    name: str, plugin: Callable[..., Attack], trained_net: nn.Module, shapes: ImageSet
) -> None:
    settings = SETTINGS.get(name, {})
    if "goals" not in settings:
        pytest.skip("has no goals")
    goals = [{**goal, "trigger": "rectangle"} for goal in settings["goals"]]
    attack = plugin("attacks", name, {name: {**settings, "goals": goals}})

    def used(*_: object) -> None:
        raise AssertionError("the model was run")

    trained_net.register_forward_pre_hook(used)
    with pytest.raises(InputError, match="16 rows and 16 columns"):
        attack(trained_net, shapes, seeded(0))


def test_goals_come_back_as_they_were_given(
    attack: Attack, trained_net: nn.Module, shapes: ImageSet
) -> None:
    assert attack(trained_net, shapes, seeded(0)).goals == attack.goals


class Steps:
    """A logbook that counts the steps of the last epoch."""

    count = 0

    def load(self) -> None: ...
    def save(self, state: dict[str, Any]) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.count = step


def test_no_more_images_are_taken_than_asked_for(
    name: str, plugin: Callable[..., Attack], trained_net: nn.Module, shapes: ImageSet
) -> None:
    if "training" not in SETTINGS.get(name, {}):
        pytest.skip("does not train")
    settings = {**SETTINGS.get(name, {}), "training_images": 12}
    logbook = Steps()
    attack: Any = plugin("attacks", name, {name: settings})
    attack(trained_net, shapes, seeded(0), logbook=logbook)
    triggered = 12 * attack.poison_rate / (1 - attack.poison_rate)
    assert logbook.count == math.ceil((12 + triggered) / attack.training.batch_size)


def test_more_images_than_there_are_are_refused(
    name: str, plugin: Callable[..., Attack], trained_net: nn.Module, shapes: ImageSet
) -> None:
    if "training" not in SETTINGS.get(name, {}):
        pytest.skip("does not train")
    settings = {**SETTINGS.get(name, {}), "training_images": 49}
    with pytest.raises(InputError, match="training_images = 49: the training set has 48 images"):
        plugin("attacks", name, {name: settings})(trained_net, shapes, seeded(0))
