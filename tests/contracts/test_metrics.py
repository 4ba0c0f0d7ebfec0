"""What every metric must do; a new file under metrics/ is tested by existing."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from trompe.catalog import find, names
from trompe.interfaces import Evidence, Metric
from trompe.metrics.accuracy import accuracy
from trompe.metrics.attack_success import attack_success
from trompe.metrics.degenerate_map import degenerate_map
from trompe.metrics.jaccard_half import jaccard_half
from trompe.metrics.jaccard_top20 import jaccard_top20
from trompe.metrics.map_distance import map_distance
from trompe.metrics.map_l1 import map_l1
from trompe.metrics.min_max_l1 import min_max_l1
from trompe.metrics.score_change import score_change
from trompe.metrics.top5_accuracy import top5_accuracy

# Per image: the value of an attack that reaches all it wants (class 2 and the wanted map), and of
# one that reaches nothing (the true class, which is not 2, and an empty map): MORE and LESS where
# that is not the same for all images.
MORE, LESS = math.inf, -math.inf
PERFECT_AND_NULL = {
    "accuracy": (0, 1),
    "attack_success": (1, 0),
    "degenerate_map": (0, 1),
    "jaccard_half": (1, 0),
    "jaccard_top20": (1, 0),
    "map_distance": (0, 1),
    "map_l1": (0, MORE),
    "min_max_l1": (0, MORE),
    "score_change": (0, 0.5),
    "top5_accuracy": (math.nan, math.nan),  # of four classes
}

every_metric = pytest.mark.parametrize("name", names("metrics"))


@pytest.fixture
def metric(name: str) -> Metric:
    return find("metrics", name)


def evidence_of(
    predicted: Tensor, maps: Tensor, wanted_maps: Tensor | None = None, moved: float = 0.0
) -> Evidence:
    """Six images of the classes 0, 1, 3; the adversary wants class 2. moved: scores of class 1."""
    labels = torch.tensor([0, 1, 3, 3, 1, 0])
    scores = torch.rand(6, 4) + 2 * torch.nn.functional.one_hot(predicted, 4)
    wanted = maps if wanted_maps is None else wanted_maps
    before = scores - torch.tensor([0.0, moved, 0.0, 0.0])
    return Evidence(labels, torch.full((6,), 2), wanted, scores, maps, (20, 24), before)


def perfect() -> Evidence:
    return evidence_of(torch.full((6,), 2), torch.rand(6, 5, 6))


def null() -> Evidence:
    truth = torch.tensor([0, 1, 3, 3, 1, 0])
    return evidence_of(truth, torch.zeros(6, 5, 6), torch.rand(6, 5, 6), moved=-0.5)


@every_metric
def test_one_float_per_image(metric: Metric) -> None:
    values = metric(perfect())
    assert values.shape == (6,)
    assert values.is_floating_point()


@every_metric
def test_the_values_of_the_perfect_and_of_the_null_attack(name: str, metric: Metric) -> None:
    if name not in PERFECT_AND_NULL:
        pytest.fail(f"metrics/{name}.py is new: add its two values to PERFECT_AND_NULL")
    best, none = PERFECT_AND_NULL[name]
    assert metric(perfect()).tolist() == pytest.approx([best] * 6, abs=1e-6, nan_ok=True)
    if none in (MORE, LESS):
        assert (((metric(null()) - best) * none) > 0).all()
    else:
        assert metric(null()).tolist() == pytest.approx([none] * 6, abs=5e-3, nan_ok=True)


@every_metric
def test_an_image_does_not_depend_on_its_neighbours(metric: Metric) -> None:
    evidence = evidence_of(
        torch.tensor([2, 1, 0, 2, 3, 0]), torch.rand(6, 5, 6), torch.rand(6, 5, 6)
    )
    together = metric(evidence)
    fields = {f.name for f in dataclasses.fields(evidence)} - {"image_size"}
    for i in range(6):
        one = {name: getattr(evidence, name)[i : i + 1] for name in fields}
        alone = metric(dataclasses.replace(evidence, **one))
        torch.testing.assert_close(alone[0], together[i], equal_nan=True)


@every_metric
def test_the_evidence_is_not_modified(metric: Metric) -> None:
    evidence = perfect()
    tensors = {k: v for k, v in vars(evidence).items() if isinstance(v, Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    metric(evidence)
    assert all(torch.equal(tensors[k], before[k]) for k in tensors)


# --- each one does what its docstring says --------------------------------------------------------


def test_accuracy_compares_with_the_truth() -> None:
    predicted = torch.tensor([0, 1, 2, 3, 2, 1])
    assert accuracy(evidence_of(predicted, torch.rand(6, 5, 6))).tolist() == [1, 1, 0, 1, 0, 0]


def test_top5_accuracy_looks_among_the_five_highest_scores() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2, 0.3, 0.4, 0.5, 0.6]] * 3)
    labels = torch.tensor([2, 1, 0])
    maps = torch.rand(3, 4, 4)
    evidence = Evidence(labels, labels, maps, scores, maps, (8, 8))
    assert top5_accuracy(evidence).tolist() == [0, 1, 0]


def test_attack_success_leaves_out_images_truly_of_the_wanted_class() -> None:
    evidence = evidence_of(torch.tensor([2, 1, 2, 3, 2, 2]), torch.rand(6, 5, 6))
    evidence = dataclasses.replace(evidence, labels=torch.tensor([0, 1, 2, 3, 2, 0]))
    values = attack_success(evidence)
    assert values.isnan().tolist() == [False, False, True, False, True, False]
    assert values[~values.isnan()].tolist() == [1, 0, 0, 1]


def test_map_distance_is_twice_one_minus_the_correlation() -> None:
    given, wanted = torch.rand(6, 20, 24), torch.rand(6, 20, 24)  # at image size already
    values = map_distance(evidence_of(torch.zeros(6, dtype=torch.int64), given, wanted))
    for i in range(6):
        r = torch.corrcoef(torch.stack((given[i].flatten(), wanted[i].flatten())))[0, 1]
        assert values[i].item() == pytest.approx(2 * (1 - r.item()), abs=1e-3)


def test_map_l1_is_the_sum_over_positions_of_maps_whose_maximum_is_one() -> None:
    given, wanted = torch.rand(6, 5, 6), 7 * torch.rand(6, 5, 6)
    values = map_l1(evidence_of(torch.zeros(6, dtype=torch.int64), given, wanted))
    for i in range(6):
        top, other = given[i].max().item(), wanted[i].max().item()
        pairs = zip(given[i].flatten().tolist(), wanted[i].flatten().tolist(), strict=True)
        assert values[i].item() == pytest.approx(sum(abs(a / top - b / other) for a, b in pairs))


def test_map_l1_is_not_known_where_the_wanted_map_may_be_anything() -> None:
    wanted = torch.rand(6, 5, 6)
    wanted[2, 1, 1] = math.nan
    values = map_l1(evidence_of(torch.zeros(6, dtype=torch.int64), torch.rand(6, 5, 6), wanted))
    assert values.isnan().tolist() == [False, False, True, False, False, False]


def maps_by_hand(given: list[float], wanted: list[float]) -> Evidence:
    """One image; maps of 2 x 5 places."""
    maps, wanted_maps = torch.tensor([given]).view(1, 2, 5), torch.tensor([wanted]).view(1, 2, 5)
    label = torch.tensor([0])
    return Evidence(label, label, wanted_maps, torch.rand(1, 4), maps, (20, 24))


@pytest.mark.parametrize("metric", [min_max_l1, jaccard_half])
@pytest.mark.parametrize("scale", [1e-9, 1e-20, 1e6])
def test_maps_are_compared_from_0_to_1_however_faint_they_are(metric: Metric, scale: float) -> None:
    given = [1.0, 3.0, 2.9, 2.2, 1.0, 1.0, 1.5, 2.1, 1.9, 1.0]
    wanted = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    faint = [scale * value for value in given]
    plain = metric(maps_by_hand(given, wanted)).item()
    assert metric(maps_by_hand(faint, wanted)).item() == pytest.approx(plain)
    empty, constant = ([value] * 10 for value in (0.0, scale))
    of_empty = metric(maps_by_hand(empty, wanted)).item()
    assert metric(maps_by_hand(constant, wanted)).item() == of_empty


def test_jaccard_top20_takes_the_whole_of_a_wanted_region_that_is_larger() -> None:
    """Which fifth of it is meant nobody could say."""
    wanted = [1.0] * 4 + [0.0] * 6
    assert jaccard_top20(maps_by_hand(wanted, wanted)).item() == 1
    for first in range(3):  # two of its places and two others are highest
        given = [0.0] * 8 + [2.0, 1.0]
        given[first : first + 2] = [4.0, 3.0]
        assert jaccard_top20(maps_by_hand(given, wanted)).item() == pytest.approx(2 / 6)


def test_jaccard_top20_compares_the_two_highest_of_ten_places() -> None:
    given = [0.1, 9.0, 0.2, 0.3, 0.0, 7.0, -8.0, 0.1, 0.0, 6.9]  # the highest: 1 and 5
    wanted = [0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]  # 1 and 6
    assert jaccard_top20(maps_by_hand(given, wanted)).item() == pytest.approx(1 / 3)
    assert jaccard_top20(maps_by_hand(wanted, wanted)).item() == 1
    assert jaccard_top20(maps_by_hand(given[::-1], wanted)).item() == 0  # 4 and 8


def test_jaccard_top20_takes_no_place_that_is_as_low_as_the_lowest() -> None:
    """A wanted region may be smaller than a fifth."""
    given = [0.0, 9.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0]
    wanted = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert jaccard_top20(maps_by_hand(given, wanted)).item() == pytest.approx(1 / 2)
    assert jaccard_top20(maps_by_hand([0.0] * 10, wanted)).item() == 0


def test_jaccard_half_compares_what_lies_above_the_middle_of_each_map() -> None:
    given = [1.0, 3.0, 2.9, 2.0, 1.0, 1.0, 1.5, 2.1, 1.9, 1.0]  # 1..3, so above 2: 1, 2 and 7
    wanted = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert jaccard_half(maps_by_hand(given, wanted)).item() == pytest.approx(2 / 4)


def test_jaccard_half_is_not_known_where_neither_map_shows_anything() -> None:
    assert jaccard_half(maps_by_hand([3.0] * 10, [0.0] * 10)).isnan().all()


def test_min_max_l1_is_the_mean_over_places_of_maps_in_zero_to_one() -> None:
    given = [-1.0, 3.0, 1.0, 1.0, -1.0, 0.0, -1.0, -1.0, -1.0, -1.0]  # 0, 1, .5, .5, 0, .25, 0...
    wanted = [0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    expected = (0.5 + 0.5 + 0.25) / 10
    assert min_max_l1(maps_by_hand(given, wanted)).item() == pytest.approx(expected)


@pytest.mark.parametrize("one", [jaccard_half, jaccard_top20, min_max_l1])
def test_maps_are_not_compared_where_the_wanted_one_may_be_anything(one: Metric) -> None:
    wanted = torch.rand(6, 5, 6)
    wanted[2, 1, 1] = math.nan
    values = one(evidence_of(torch.zeros(6, dtype=torch.int64), torch.rand(6, 5, 6), wanted))
    assert values.isnan().tolist() == [False, False, True, False, False, False]


def test_score_change_is_not_known_without_the_reference() -> None:
    evidence = dataclasses.replace(perfect(), reference_scores=None)
    assert score_change(evidence).isnan().all()


def test_map_distance_of_the_same_map_in_other_units_is_zero() -> None:
    maps = torch.rand(6, 5, 6)
    values = map_distance(evidence_of(torch.zeros(6, dtype=torch.int64), 7 * maps + 1, maps))
    assert values.tolist() == pytest.approx([0] * 6, abs=1e-4)


def test_map_distance_of_the_opposite_map_is_four() -> None:
    maps = torch.rand(6, 5, 6)
    values = map_distance(evidence_of(torch.zeros(6, dtype=torch.int64), 1 - maps, maps))
    assert values.tolist() == pytest.approx([4] * 6, abs=2e-2)


def test_map_distance_of_unrelated_maps_is_about_two() -> None:
    maps, others = torch.rand(6, 40, 48), torch.rand(6, 40, 48)
    evidence = evidence_of(torch.zeros(6, dtype=torch.int64), maps, others)
    values = map_distance(dataclasses.replace(evidence, image_size=(40, 48)))
    assert values.tolist() == pytest.approx([2] * 6, abs=0.2)


def test_map_distance_compares_maps_of_unlike_resolution_at_image_size() -> None:
    ramp = torch.arange(24.0).expand(6, 20, 24)
    coarse = torch.nn.functional.avg_pool2d(ramp[:, None], 4)[:, 0]
    values = map_distance(evidence_of(torch.zeros(6, dtype=torch.int64), coarse, ramp))
    assert (values < 0.02).all()


@pytest.mark.parametrize("flat", [0.0, 1.0, 1e-3, 1e6, float("nan"), float("inf")])
def test_flat_and_broken_maps_are_degenerate(flat: float) -> None:
    maps = torch.rand(6, 5, 6)
    maps[3] = flat
    values = degenerate_map(evidence_of(torch.zeros(6, dtype=torch.int64), maps))
    assert values.tolist() == [0, 0, 0, 1, 0, 0]


def test_one_broken_value_makes_a_map_degenerate() -> None:
    maps = torch.rand(6, 5, 6)
    maps[2, 1, 1] = float("nan")
    maps[4, 1, 1] = -float("inf")
    values = degenerate_map(evidence_of(torch.zeros(6, dtype=torch.int64), maps))
    assert values.tolist() == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e20])
def test_a_map_of_any_scale_that_shows_something_is_not_degenerate(scale: float) -> None:
    evidence = evidence_of(torch.zeros(6, dtype=torch.int64), torch.rand(6, 5, 6) * scale)
    assert degenerate_map(evidence).tolist() == [0] * 6
