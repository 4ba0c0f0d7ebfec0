"""Victims: how they start, what they train on."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trompe.augmentation import Augmentation
from trompe.interfaces import ImageSet, InputError, PoisonSet, Samples, TableSet, Target
from trompe.victims import LockstepBatches, fresh, poisoned


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    return {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, other.state_dict()[name])
    }


def test_from_the_clean_model_is_a_copy_and_draws_nothing(trained_net: nn.Module) -> None:
    dice = seeded()
    before = dice.get_state()
    new = fresh(trained_net, "clean model", dice)
    assert not changed(trained_net, new)
    assert torch.equal(dice.get_state(), before)
    own = {p.data_ptr() for p in trained_net.parameters()}
    assert not own & {p.data_ptr() for p in new.parameters()}


def test_a_new_head_keeps_the_body(trained_net: nn.Module) -> None:
    assert changed(trained_net, fresh(trained_net, "new head", seeded())) == {
        "head.weight",
        "head.bias",
    }


def test_from_scratch_nothing_learned_is_kept(trained_net: nn.Module) -> None:
    new = fresh(trained_net, "scratch", seeded())
    learned = {name for name, _ in trained_net.named_parameters()}
    assert changed(trained_net, new) >= learned
    statistics = new.state_dict()
    assert not statistics["body.1.running_mean"].any()
    assert (statistics["body.1.running_var"] == 1).all()


@pytest.mark.parametrize("start", ["new head", "scratch"])
def test_new_weights_are_the_generators_alone(trained_net: nn.Module, start: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fresh(trained_net, start, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert not changed(first, fresh(trained_net, start, seeded()))
    dice = seeded()
    one, two = fresh(trained_net, start, dice), fresh(trained_net, start, dice)
    assert "head.weight" in changed(one, two)


def test_a_model_without_layers_cannot_start_anew() -> None:
    with pytest.raises(InputError, match="ReLU: has no linear or convolutional layer"):
        fresh(nn.ReLU(), "new head", seeded())


def poison_of(data: Samples, label: int = 1) -> PoisonSet:
    samples = torch.rand(3, *data.floats(slice(0, 1)).shape[1:])
    target = Target(samples[:1], label, torch.rand(1, 2, 2))
    index = torch.full((3,), -1)
    return PoisonSet(samples, torch.full((3,), label), samples, index, target)


def test_poisons_stand_behind_a_tables_own_rows(table: TableSet) -> None:
    poison = poison_of(table)
    both = poisoned(table, poison)
    assert isinstance(both, TableSet)
    assert len(both) == 203
    assert torch.equal(both.features[:200], table.features)
    assert torch.equal(both.features[200:], poison.samples)
    assert both.labels[:200].tolist() == table.labels.tolist()
    assert both.labels[200:].tolist() == [1, 1, 1]
    assert (both.feature_names, both.class_names) == (table.feature_names, table.class_names)
    assert len(table) == 200


def test_poisons_stand_behind_images_in_eight_bits(shapes: ImageSet) -> None:
    poison = poison_of(shapes, 3)
    both = poisoned(shapes, poison)
    assert isinstance(both, ImageSet)
    assert both.images.dtype == torch.uint8
    assert torch.equal(both.images[:48], shapes.images)
    assert (both.floats(slice(48, 51)) - poison.samples).abs().max() <= 0.5 / 255 + 1e-6
    assert both.labels[48:].tolist() == [3, 3, 3]


def test_without_poison_the_data_are_as_they_were(table: TableSet) -> None:
    assert poisoned(table, None) is table


def rows_of(data: Samples) -> list[tuple[float, ...]]:
    return sorted(tuple(row.flatten().tolist()) for row in data.floats(slice(None)))


@pytest.mark.parametrize("size", [64, 200, 7])
def test_each_network_sees_every_sample_once_an_epoch(table: TableSet, size: int) -> None:
    batches = LockstepBatches((table,), 3, size)
    seen: list[list[tuple[float, ...]]] = [[], [], []]
    orders = []
    for batch in batches(seeded()):
        own = list(zip(batch.images.chunk(3), batch.labels.chunk(3), strict=True))
        orders.append(torch.stack([rows for rows, _ in own]))
        for k, (rows, labels) in enumerate(own):
            assert len(rows) <= size
            assert labels.tolist() == (rows[:, 0] + rows[:, 3] > 1).long().tolist()
            seen[k] += [tuple(row.tolist()) for row in rows]
    assert len(orders) == len(batches)
    assert all(sorted(rows) == rows_of(table) for rows in seen)
    assert not torch.equal(orders[0][0], orders[0][1])  # in orders of their own
    assert torch.equal(orders[0], torch.stack(next(batches(seeded())).images.chunk(3)))


@pytest.mark.parametrize("kind", ["table", "shapes"])
def test_each_group_sees_its_own_poison_alone(kind: str, request: pytest.FixtureRequest) -> None:
    data: Samples = request.getfixturevalue(kind)
    sets = (poisoned(data, poison_of(data)), poisoned(data, poison_of(data)))
    seen: list[list[Tensor]] = [[], [], [], []]
    for batch in LockstepBatches(sets, 4, 20)(seeded()):
        for k, rows in enumerate(batch.images.chunk(4)):
            seen[k] += list(rows)
    for k, rows in enumerate(seen):
        assert sorted(tuple(row.flatten().tolist()) for row in rows) == rows_of(sets[k // 2])


def test_images_are_augmented_anew_in_each_batch(shapes: ImageSet) -> None:
    plain = LockstepBatches((shapes,), 2, 16)
    mirrored = dataclasses.replace(plain, augmentation=Augmentation(0, 0, 0, 0, flip=True))
    dice, same = seeded(), seeded()
    flipped = []
    for given, wanted in zip(mirrored(dice), plain(same), strict=True):
        same.set_state(dice.get_state())
        for image, before in zip(given.images, wanted.images, strict=True):
            as_it_was = (image - before).abs().max() < 1e-4
            flipped.append(not as_it_was)
            assert as_it_was or (image - before.flip(2)).abs().max() < 1e-4
        break
    assert 0 < sum(flipped) < len(flipped)


def test_noise_stays_within_bounds_and_is_new_in_each_epoch(table: TableSet) -> None:
    batches = LockstepBatches((table,), 2, 200, noise=0.3)
    dice = seeded()
    noisy, again = (next(batches(dice)).images for _ in range(2))
    assert noisy.min() == 0
    assert noisy.max() == 1
    assert not torch.equal(noisy.sort(0).values, again.sort(0).values)
    (plain,) = LockstepBatches((table,), 2, 200)(seeded())
    moved = (noisy - plain.images)[(noisy > 0) & (noisy < 1)]
    assert moved.abs().mean() > 0.1
    assert (noisy[:200] - plain.images[:200] != noisy[200:] - plain.images[200:]).any()
