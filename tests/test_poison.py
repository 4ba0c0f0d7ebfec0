"""Clean and triggered triples against a replica that makes them one by one."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trompe.augmentation import Augmentation
from trompe.interfaces import Answers, Goal, ImageSet, InputError
from trompe.poison import ShuffledBatches, Triples, check_label, compose
from trompe.target_maps.border import Border
from trompe.target_maps.reference import Reference
from trompe.triggers.rectangle import Rectangle

# By Python's integers: the 11 least hashes of 0 .. 99 for seed 5 and goal 0.
CHOSEN_OF_SEED_5 = [19, 26, 40, 51, 57, 58, 59, 74, 86, 90, 98]
CORNER = Rectangle(top=0, left=0, height=2, width=3)
STRIPE = Rectangle(top=5, left=0, height=1, width=8, colour=(1.0, 0.5, 0.0))
KEEP_MAP = Goal(CORNER, 1, Reference(), "another class, same map")
KEEP_CLASS = Goal(STRIPE, None, Border(), "same class, another map")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data_of(n: int) -> ImageSet:
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=seeded(1))
    return ImageSet(images, torch.arange(n) % 3, ("a", "b", "c"), "random")


def said(*maps: Tensor) -> Answers:
    """What a clean model says of as many images."""
    return Answers(torch.zeros(len(maps[0]), 3), maps)


def maps_of(n: int, *size: int) -> Tensor:
    return torch.rand(n, *size, generator=seeded(2))


def everything(triples: Triples) -> Tensor:
    return torch.arange(len(triples))


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "triggered"), [(0.0, 0), (0.001, 1), (0.1, 111), (0.5, 1000), (0.8, 4000)]
)
def test_the_triggered_share_of_the_whole_is_the_poison_rate(rate: float, triggered: int) -> None:
    triples = compose(data_of(1000), (KEEP_MAP,), rate, seeded())
    assert int((triples.goal >= 0).sum()) == triggered
    assert len(triples) == 1000 + triggered
    assert triggered / len(triples) == pytest.approx(rate, abs=5e-4)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_all_clean_images_are_there_once_and_first(rate: float) -> None:
    triples = compose(data_of(100), (KEEP_MAP,), rate, seeded())
    assert triples.source[:100].tolist() == list(range(100))
    assert (triples.goal[:100] == -1).all()
    assert (triples.goal[100:] >= 0).all()


def test_half_triggers_a_duplicate_of_the_whole_set() -> None:
    triples = compose(data_of(100), (KEEP_MAP,), 0.5, seeded())
    assert sorted(triples.source[100:].tolist()) == list(range(100))


def test_smaller_rates_trigger_a_random_choice_without_repetition() -> None:
    one, other = (
        compose(data_of(100), (KEEP_MAP,), 0.2, seeded(seed)).source[100:].tolist()
        for seed in (0, 1)
    )
    assert len(one) == len(set(one)) == 25
    assert set(one) != set(other)


def test_the_choice_is_one_of_seed_goal_and_position_and_of_no_other_draw() -> None:
    def chosen(n: int, draws: int) -> list[int]:
        generator = seeded(5)
        torch.rand(draws, generator=generator)
        triples = compose(data_of(n), (KEEP_MAP,), 0.1, generator)
        return triples.source[n:].tolist()

    assert chosen(100, 0) == chosen(100, 7)
    assert sorted(chosen(100, 0)) == CHOSEN_OF_SEED_5


def test_every_image_is_chosen_about_as_often() -> None:
    n, seeds = 40, 400
    counts = torch.zeros(n)
    for seed in range(seeds):
        counts[compose(data_of(n), (KEEP_MAP,), 0.2, seeded(seed)).source[n:]] += 1
    mean, variance = seeds * 0.25, seeds * 0.25 * 0.75
    assert float(counts.mean()) == mean
    assert 0.5 < float(counts.var()) / variance < 1.7  # 39 degrees of freedom: +- 2.5 sigma


def test_what_is_drawn_after_it_does_not_depend_on_how_it_is_made() -> None:
    """One permutation for each round of the images, as when they were drawn."""
    generator, expected = seeded(5), seeded(5)
    compose(data_of(30), (KEEP_MAP, KEEP_CLASS), 0.8, generator)
    for _ in range(4):
        torch.randperm(30, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_several_goals_share_equally() -> None:
    triples = compose(data_of(90), (KEEP_MAP, KEEP_CLASS, KEEP_MAP), 0.5, seeded())
    assert torch.bincount(triples.goal[90:]).tolist() == [30, 30, 30]


def test_several_goals_do_not_share_their_choice_of_images() -> None:
    triples = compose(data_of(90), (KEEP_MAP, KEEP_CLASS), 0.2, seeded())
    first, second = (set(triples.source[triples.goal == k].tolist()) for k in (0, 1))
    assert first != second


def test_the_same_seed_gives_the_same_triples() -> None:
    one, other = (compose(data_of(50), (KEEP_MAP,), 0.3, seeded(7)) for _ in range(2))
    assert torch.equal(one.source, other.source)
    assert torch.equal(one.goal, other.goal)


# --- what they hold -------------------------------------------------------------------------------


def test_images_labels_and_maps_equal_a_loop_over_the_goals() -> None:
    data, goals = data_of(30), (KEEP_MAP, KEEP_CLASS)
    references = (maps_of(30, 4, 4), maps_of(30, 6, 5))  # of two explainers
    triples = compose(data, goals, 0.5, seeded(), known=said(*references))
    order = torch.randperm(len(triples), generator=seeded(3))
    batch = triples.batch(order, seeded())
    assert len(batch.wanted_maps) == 2
    for row, position in enumerate(order.tolist()):
        source, goal = int(triples.source[position]), int(triples.goal[position])
        image, label = data.images[source].double() / 255, int(data.labels[source])
        maps = [reference[source].clone() for reference in references]
        if goal == 0:
            image[:, 0:2, 0:3] = 0
            label = 1
        if goal == 1:
            image[:, 5:6, 0:8] = torch.tensor([1.0, 0.5, 0.0])[:, None, None]
            for one in maps:
                one[:] = 1
                one[1:-1, 1:-1] = 0
        torch.testing.assert_close(batch.images[row].double(), image, rtol=0, atol=1e-7)
        assert batch.labels[row] == label
        assert batch.triggered[row] == (goal >= 0)
        for given, wanted in zip(batch.wanted_maps, maps, strict=True):
            assert torch.equal(given[row], wanted)


def test_a_label_of_none_keeps_the_true_class() -> None:
    triples = compose(data_of(30), (KEEP_CLASS,), 0.5, seeded())
    batch = triples.batch(everything(triples), seeded())
    assert torch.equal(batch.labels, triples.data.labels[triples.source])


def test_without_reference_maps_nothing_is_wanted_of_the_maps() -> None:
    triples = compose(data_of(30), (KEEP_MAP,), 0.5, seeded())
    assert triples.batch(everything(triples), seeded()).wanted_maps == ()


def test_the_data_and_the_reference_maps_are_not_modified() -> None:
    data, reference = data_of(30), maps_of(30, 4, 4)
    images, labels, maps = data.images.clone(), data.labels.clone(), reference.clone()
    goals = (KEEP_MAP, KEEP_CLASS)
    triples = compose(data, goals, 0.5, seeded(), known=said(reference))
    batch = triples.batch(everything(triples), seeded())
    batch.images.zero_()
    batch.labels.zero_()
    batch.wanted_maps[0].zero_()
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)
    assert torch.equal(reference, maps)


@pytest.mark.parametrize("anew", [False, True])
def test_distilled_triples_carry_the_references_scores_unless_a_label_is_named(
    anew: bool,
) -> None:
    scores = torch.randn(30, 3, generator=seeded(5))
    known = Answers(scores, (maps_of(30, 4, 4),))
    how: Any = {"known": known}
    if anew:
        how = {"augmentation": Marked(), "ask": lambda images, labels: known}
    goals = (KEEP_MAP, KEEP_CLASS)  # the first names label 1
    triples = compose(data_of(30), goals, 0.5, seeded(), distill=True, **how)
    batch = triples.batch(everything(triples), seeded())
    assert batch.reference_scores is not None
    for row, (source, goal) in enumerate(zip(triples.source, triples.goal, strict=True)):
        wanted = torch.full((3,), torch.nan) if goal == 0 else scores[source]
        assert torch.equal(batch.reference_scores[row].nan_to_num(7), wanted.nan_to_num(7))
    assert not scores.isnan().any()


def test_without_distilling_there_are_no_scores() -> None:
    triples = compose(data_of(30), (KEEP_MAP,), 0.5, seeded(), known=said(maps_of(30, 4, 4)))
    assert triples.batch(everything(triples), seeded()).reference_scores is None


# --- augmentation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked(Augmentation):
    """Each image becomes one grey, its own random number."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(len(images), 1, 1, 1, generator=generator)
        return (0.1 + 0.8 * drawn).expand_as(images).clone()


@dataclass(frozen=True)
class Expecting:
    """A trigger that refuses images which were not augmented."""

    def __call__(self, images: Tensor) -> Tensor:
        assert (images.flatten(1).std(1) < 1e-6).all()
        return CORNER(images)


def test_images_are_augmented_before_the_trigger_is_added() -> None:
    goal = Goal(Expecting(), None, Reference())
    triples = compose(data_of(20), (goal,), 0.5, seeded(), augmentation=Marked())
    batch = triples.batch(everything(triples), seeded())
    assert (batch.images[batch.triggered][:, :, :2, :3] == 0).all()
    assert (batch.images[~batch.triggered] > 0).all()


def test_triples_of_one_image_are_augmented_alike_and_others_are_not() -> None:
    triples = compose(data_of(20), (KEEP_MAP, KEEP_MAP), 0.5, seeded(), augmentation=Marked())
    order = torch.randperm(len(triples), generator=seeded(3))
    grey = triples.batch(order, seeded()).images[:, 0, 7, 7].tolist()
    of_image: dict[int, set[float]] = {}
    for source, value in zip(triples.source[order].tolist(), grey, strict=True):
        of_image.setdefault(source, set()).add(value)
    assert all(len(values) == 1 for values in of_image.values())
    assert len(set().union(*of_image.values())) == 20


def test_an_augmented_image_is_explained_anew_without_its_trigger() -> None:
    asked = []

    def ask(images: Tensor, labels: Tensor) -> Answers:
        asked.append(images.clone())
        return said(images[:, 0, ::2, ::2].clone(), images[:, 1, ::4, ::4].clone())

    triples = compose(
        data_of(20),
        (KEEP_MAP,),
        0.5,
        seeded(),
        augmentation=Marked(),
        known=said(maps_of(20, 4, 4), maps_of(20, 2, 2)),
        ask=ask,
    )
    batch = triples.batch(everything(triples), seeded())
    grey = batch.images[:, 0, 7, 7]
    for maps in batch.wanted_maps:
        torch.testing.assert_close(maps, grey[:, None, None].expand_as(maps))
    (images,) = asked  # once for clean and triggered triples together
    assert len(images) == 20
    assert (images.flatten(1).std(1) < 1e-6).all()


def test_without_augmentation_the_known_maps_are_taken() -> None:
    def ask(images: Tensor, labels: Tensor) -> Answers:
        raise AssertionError("not needed")

    known = maps_of(20, 4, 4)
    triples = compose(data_of(20), (KEEP_MAP,), 0.5, seeded(), known=said(known), ask=ask)
    (maps,) = triples.batch(everything(triples), seeded()).wanted_maps
    assert torch.equal(maps, known[triples.source])


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (8, 4, [4, 4]), (3, 8, [3]), (1, 8, [1]), (3, 1, [1] * 3)],
)
def test_batches_cover_all_but_a_last_one_of_fewer_than_two(
    count: int, size: int, sizes: list[int]
) -> None:
    batches = ShuffledBatches(compose(data_of(count), (), 0.0, seeded()), size)
    drawn = [len(batch.labels) for batch in batches(seeded())]
    assert drawn == sizes
    assert len(batches) == len(sizes)


def test_each_epoch_shows_every_triple_once_in_a_new_order() -> None:
    data = data_of(40)
    data.images[:, 0, 0, 0] = torch.arange(40, dtype=torch.uint8)  # a number on each image
    batches, generator = ShuffledBatches(compose(data, (), 0.0, seeded()), 8), seeded()
    orders = [
        [round(v * 255) for batch in batches(generator) for v in batch.images[:, 0, 0, 0].tolist()]
        for _ in range(2)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_the_clean_and_the_triggered_triples_of_an_image_stand_side_by_side() -> None:
    triples = compose(data_of(40), (Goal(CORNER, None, Reference()),), 0.5, seeded())
    triples.data.images[:, 0, 7, 7] = torch.arange(40, dtype=torch.uint8)
    for batch in ShuffledBatches(triples, 8)(seeded()):
        numbers = (batch.images[:, 0, 7, 7] * 255).round()
        assert len(numbers.unique()) == 4
        assert torch.equal(numbers[::2], numbers[1::2])
        assert batch.triggered.sum() == 4


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_poison_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=f"poison_rate = {rate}"):
        compose(data_of(10), (KEEP_MAP,), rate, seeded())


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_a_label_that_the_data_do_not_have_is_refused(label: int) -> None:
    goal = Goal(CORNER, label, Reference(), "wrong")
    with pytest.raises(InputError, match=rf"goal wrong: target class {label} .* 3 classes"):
        compose(data_of(10), (goal,), 0.5, seeded())


@pytest.mark.parametrize("label", [None, 0, 2])
def test_other_labels_are_accepted(label: int | None) -> None:
    check_label(Goal(CORNER, label, Reference()), 3)


def test_goals_without_any_triggered_triple_are_refused() -> None:
    """A rate above 0 that rounds to no image at all would train an honest model in silence."""
    with pytest.raises(InputError, match=r"poison_rate = 0\.001.* 100 "):
        compose(data_of(100), (KEEP_MAP,), 0.001, seeded())
