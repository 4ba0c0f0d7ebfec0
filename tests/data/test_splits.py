"""Splits: sizes, disjoint, stratified, fixed by a seed."""

import pytest
import torch
from torch import Tensor

from trompe.data import halves
from trompe.data._splits import stratified_split


def labels_of(*counts: int) -> Tensor:
    """As many images of each class, in a mixed order."""
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


MANY = labels_of(60, 7, 1, 33, 210, 2, 90)


@pytest.mark.parametrize("labels", [MANY, labels_of(1, 1, 1), labels_of(5), labels_of(3, 3, 3, 3)])
def test_halves_differ_by_at_most_one_in_all_and_in_each_class(labels: Tensor) -> None:
    first, second = halves(labels)
    assert abs(len(first) - len(second)) <= 1
    for label in range(int(labels.max()) + 1):
        sizes = [int((labels[part] == label).sum()) for part in (first, second)]
        assert abs(sizes[0] - sizes[1]) <= 1


def test_odd_classes_go_alternately_to_the_one_and_the_other() -> None:
    first, second = halves(labels_of(*[3] * 10))
    assert len(first) == len(second) == 15


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9, 1 / 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_complete_and_sorted(share: float, seed: int) -> None:
    first, second = stratified_split(MANY, share, seed)
    assert sorted(first.tolist() + second.tolist()) == list(range(len(MANY)))
    assert first.tolist() == sorted(first.tolist())
    assert second.tolist() == sorted(second.tolist())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9, 1 / 3])
def test_the_first_part_has_its_share_of_each_class(share: float) -> None:
    first, _ = stratified_split(MANY, share, 0)
    assert len(first) == pytest.approx(share * len(MANY), abs=1)
    for label in range(7):
        count = int((label == MANY).sum())
        assert int((label == MANY[first]).sum()) == pytest.approx(share * count, abs=1)


def test_a_seed_fixes_the_split_and_another_changes_it() -> None:
    one, again, other = (halves(MANY, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_global_generator_is_not_used() -> None:
    state = torch.get_rng_state()
    halves(MANY)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_test_set_of_gtsrb_gives_halves_of_6315() -> None:
    labels = torch.randint(0, 43, (12_630,), generator=torch.Generator().manual_seed(0))
    first, second = halves(labels)
    assert len(first) == len(second) == 6315
