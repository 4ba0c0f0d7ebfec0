"""What every attack that makes samples to train on must do; a new file is tested by existing.

Those that make a model are tested in test_attacks.py.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trompe.catalog import find, names
from trompe.evaluate import answers
from trompe.interfaces import (
    Evidence,
    ImageSet,
    InputError,
    Poisoning,
    PoisonSet,
    Samples,
    TableSet,
    Target,
)
from trompe.lockstep import Lockstep
from trompe.metrics.min_max_l1 import min_max_l1
from trompe.runs import FileLogbook
from trompe.train import Training
from trompe.victims import fresh, poisoned, train_together

GRADIENT = {"kind": "input_gradient", "gradient_of": "probability", "normalise": "min-max"}
RECIPE = {"batch_size": 20, "learning_rate": 0.01, "precision": "float32"}

COMMON = {  # by data: whose map shall lie, and what it shall show
    "table": {"explainer": GRADIENT, "wanted_map": {"kind": "scattered"}, "poison_rate": 0.11},
    "images": {
        "explainer": {"kind": "cam", "normalise": "min-max"},
        "wanted_map": {"kind": "region"},
        "poison_rate": 0.11,
    },
}
SETTINGS: dict[str, dict[str, Any]] = {  # what it has besides; a few seconds
    "interpretation_poisoning": {
        "models": 2,
        "epochs": 3,
        "pretraining": 1,
        "step": 0.1,
        "recipe": RECIPE,
    },
    "watermark_poisoning": {},
}
# What is enough to succeed on the table.
SUCCESSFUL: dict[str, dict[str, Any]] = {
    "interpretation_poisoning": {
        "poison_rate": 0.25,
        "bases": "near",
        "epsilon": 0.3,
        "epochs": 6,
        "pretraining": 0,
        "look_ahead": 0.01,
        "step": 0.1,
        "recipe": RECIPE,
    },
}
AT_ONCE = {"watermark_poisoning"}  # draws no random numbers, keeps nothing to go on from
MAY_FAIL = {"watermark_poisoning"}  # the paper's weak baseline: it runs, and no more is asked


def has_goals(name: str) -> bool:
    attack = find("attacks", name)
    return hasattr(attack, "goals") or "goals" in inspect.signature(attack).parameters


pytestmark = pytest.mark.parametrize("name", [n for n in names("attacks") if not has_goals(n)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scene(NamedTuple):
    attack: Poisoning
    model: nn.Module
    data: Samples
    targets: tuple[Target, ...]

    def craft(self, seed: int = 0, logbook: Any = None) -> tuple[PoisonSet, ...]:
        return self.attack(self.model, self.data, self.targets, seeded(seed), logbook)


def targets_of(
    attack: Poisoning, model: nn.Module, data: Samples, positions: list[int]
) -> tuple[Target, ...]:
    """A little beside samples of the data, as if from a test set."""
    index = torch.tensor(positions)
    (maps,) = answers(model, (attack.explainer,), data, explained="label").maps
    samples = (data.floats(index) + 0.01).clamp(0, 1)
    wanted = attack.wanted_map(maps[index], samples)
    return tuple(
        Target(samples[i : i + 1], int(data.labels[p]), wanted[i : i + 1])
        for i, p in enumerate(positions)
    )


@pytest.fixture(params=["table", "images"])
def scene(
    name: str,
    request: pytest.FixtureRequest,
    plugin: Callable[..., Poisoning],
    table: TableSet,
    table_net: nn.Module,
    shapes: ImageSet,
    tiny_net: Callable[..., nn.Module],
) -> Scene:
    """Two targets, of different classes."""
    if name not in SETTINGS:
        pytest.fail(f"attacks/{name}.py is new: add what it has besides to SETTINGS in this file")
    attack = plugin("attacks", name, {name: {**COMMON[request.param], **SETTINGS[name]}})
    data: Samples = table if request.param == "table" else shapes
    model = table_net if request.param == "table" else tiny_net().float()
    first = int((data.labels == 1).nonzero()[3])
    other = int((data.labels == 0).nonzero()[2])
    return Scene(attack, model, data, targets_of(attack, model, data, [first, other]))


def test_it_gives_as_many_samples_as_asked_for_of_each_targets_class(scene: Scene) -> None:
    sets = scene.craft()
    number = {200: 22, 48: 5}[len(scene.data)]  # .11 of them
    assert len(sets) == 2
    for one, target in zip(sets, scene.targets, strict=True):
        assert one.target is target
        assert len(one) == number
        assert one.labels.tolist() == [target.label] * number
        assert one.samples.shape == (number, *target.sample.shape[1:])
        assert one.bases.shape == one.samples.shape
        assert one.samples.min() >= 0
        assert one.samples.max() <= 1
        assert not torch.equal(one.samples, one.bases)
        assert not one.samples.requires_grad


def test_the_bases_are_where_it_says(scene: Scene) -> None:
    for one in scene.craft():
        for base, index in zip(one.bases, one.base_index.tolist(), strict=True):
            if index == -1:
                assert torch.equal(base, one.target.sample[0])
            else:
                assert torch.equal(base, scene.data.floats(torch.tensor([index]))[0])
                assert scene.data.labels[index] == one.target.label


def test_samples_stay_near_their_bases(name: str, scene: Scene) -> None:
    if not hasattr(scene.attack, "epsilon"):
        pytest.skip("has no epsilon")
    for epsilon in (0.1, 0.02):
        attack: Any = dataclasses.replace(scene.attack, epsilon=epsilon)  # type: ignore[type-var]
        for one in scene._replace(attack=attack).craft():
            moved = (one.samples - one.bases).abs().max().item()
            assert 0.5 * epsilon < moved < epsilon + 1e-6  # as far as it may, but no farther
            if one.samples.ndim == 4:  # nor as image files hold them
                kept = (one.samples * 255).round() / 255
                assert (kept - one.bases).abs().max().item() < epsilon + 1e-6


def test_the_same_seed_gives_the_same_bits(name: str, scene: Scene) -> None:
    first = scene.craft()
    torch.rand(5)
    for one, again in zip(first, scene.craft(), strict=True):
        assert torch.equal(one.samples, again.samples)
        assert torch.equal(one.base_index, again.base_index)
    other = scene.craft(seed=1)
    differs = any(not torch.equal(a.samples, b.samples) for a, b in zip(first, other, strict=True))
    assert differs != (name in AT_ONCE)


def test_a_target_gets_samples_of_its_own(scene: Scene) -> None:
    one, other = scene.craft()
    assert not torch.equal(one.samples, other.samples)


@pytest.mark.parametrize("training", [False, True])
def test_the_given_model_and_data_are_not_changed(
    scene: Scene, snapshot: Callable[[nn.Module], dict[str, Any]], training: bool
) -> None:
    before = snapshot(scene.model.train(training))
    everything = slice(None)
    samples, labels = scene.data.floats(everything).clone(), scene.data.labels.clone()
    aims = [(t.sample.clone(), t.wanted_map.clone()) for t in scene.targets]
    scene.craft()
    assert snapshot(scene.model) == before
    assert torch.equal(scene.data.floats(everything), samples)
    assert torch.equal(scene.data.labels, labels)
    for target, (sample, wanted) in zip(scene.targets, aims, strict=True):
        assert torch.equal(target.sample, sample)
        assert torch.equal(target.wanted_map, wanted)


class Stopped(Exception):
    pass


class StopsAfterTwo(FileLogbook):
    """Is killed in its third epoch."""

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        if epoch == 3:
            raise Stopped


def test_a_stopped_one_goes_on_and_ends_in_the_same_bits(
    name: str, scene: Scene, tmp_path: Path
) -> None:
    if name in AT_ONCE:
        pytest.skip("keeps nothing: it is done at once")
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        scene.craft(logbook=StopsAfterTwo(file))
    torch.rand(5)
    told: list[int] = []

    class Listens(FileLogbook):
        def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
            told.append(epoch)

    resumed = scene.craft(logbook=Listens(file))
    assert set(told) == {3}
    for one, whole in zip(resumed, scene.craft(), strict=True):
        assert torch.equal(one.samples, whole.samples)
        assert torch.equal(one.bases, whole.bases)
        assert [r.epoch for r in one.history] == [r.epoch for r in whole.history] == [1, 2, 3]
        assert [r.terms for r in one.history] == [r.terms for r in whole.history]


def test_a_rate_out_of_range_is_refused(name: str, plugin: Callable[..., Poisoning]) -> None:
    attack = plugin("attacks", name, {name: COMMON["table"]})
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match=f"poison_rate = {rate}: must lie between 0 and 1"):
            dataclasses.replace(attack, poison_rate=rate)  # type: ignore[type-var]


def far_from_wanted(
    scene: Scene, sets: tuple[PoisonSet | None, ...], victims: int = 4
) -> tuple[Tensor, float]:
    """L1 distance of victims' maps of their target from the wanted one, and their accuracy."""
    dice = seeded(7)
    networks = Lockstep(
        [fresh(scene.model, "clean model", dice) for _ in range(victims * len(sets))]
    )
    how = Training(
        epochs=10,
        batch_size=20,
        learning_rate=0.01,
        optimizer="adam",
        weight_decay=1e-4,
        precision="float32",
    )
    train_together(networks, tuple(poisoned(scene.data, one) for one in sets), how, dice)
    distances, right = [], []
    for k in range(networks.count):
        network, target = networks.network(k), scene.targets[k // victims]
        label = torch.tensor([target.label])
        one = TableSet(target.sample, label, ("low", "high"), "target", tuple("abcdef"), NUMERIC)
        said = answers(network, (scene.attack.explainer,), one, explained="label")
        seen = Evidence(label, label, target.wanted_map, said.scores, said.maps[0], one.size)
        distances.append(min_max_l1(seen))
        given = network(scene.data.floats(slice(None))).argmax(1)
        right.append(float((given == scene.data.labels).float().mean()))
    return torch.cat(distances), sum(right) / len(right)


NUMERIC = torch.ones(6, dtype=torch.bool)


def test_beats_doing_nothing(
    name: str, plugin: Callable[..., Poisoning], table: TableSet, table_net: nn.Module
) -> None:
    if name in MAY_FAIL:
        pytest.skip("the paper's weak baseline: that it runs is tested above")
    if name not in SUCCESSFUL:
        pytest.fail(f"attacks/{name}.py is new: add to SUCCESSFUL what it takes to succeed")
    attack = plugin("attacks", name, {name: {**COMMON["table"], **SUCCESSFUL[name]}})
    targets = targets_of(attack, table_net, table, [3, 50, 77, 120])
    scene = Scene(attack, table_net, table, targets)
    honest, _ = far_from_wanted(scene, (None,) * 4)
    sets = scene.craft()
    lied, accuracy = far_from_wanted(scene, sets)
    bare = tuple(dataclasses.replace(one, samples=one.bases) for one in sets)
    unchanged, _ = far_from_wanted(scene, bare)
    assert lied.mean() < 0.9 * honest.mean()
    assert lied.mean() < 0.9 * unchanged.mean()
    assert accuracy > 0.85
