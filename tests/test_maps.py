"""Pure functions on maps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trompe.maps import is_degenerate, min_max, normalise, peak_one, standardise, upsample

SIZES = [(4, 6), (8, 12), (13, 9)]


def unit_maps() -> st.SearchStrategy[np.ndarray]:
    """(4, 6) values in 0 .. 1 that reach both ends."""

    def stretch(values: np.ndarray) -> np.ndarray:
        values[0, 0], values[-1, -1] = 0, 1
        return values

    cells = st.floats(0, 1, allow_subnormal=False)
    return arrays(np.float64, (4, 6), elements=cells).map(stretch)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_standardise_equals_its_formula_in_numpy(size: tuple[int, int]) -> None:
    maps = torch.rand(5, 4, 6, dtype=torch.float64) - 0.3
    result = standardise(maps, size)
    for one, given_ in zip(maps, result, strict=True):
        scaled = one / one.abs().max()
        large = F.interpolate(scaled[None, None], size, mode="bilinear")[0, 0].numpy()
        expected = (large - large.mean()) / math.sqrt(large.var() + 1e-5)
        np.testing.assert_allclose(given_.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(unit_maps(), unit_maps())
@settings(max_examples=60, deadline=None)
def test_the_distance_of_standardised_maps_is_twice_one_minus_their_correlation(
    a: np.ndarray, b: np.ndarray
) -> None:
    one, other = (standardise(torch.from_numpy(m)[None], (4, 6)) for m in (a, b))
    distance = (one - other).square().mean().item()
    r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert distance == pytest.approx(2 * (1 - r), abs=5e-3)


@given(unit_maps(), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_standardised_maps_do_not_depend_on_scale(map_: np.ndarray, scale: float) -> None:
    one = torch.from_numpy(map_)[None]
    torch.testing.assert_close(
        standardise(one * scale, (8, 12)), standardise(one, (8, 12)), rtol=1e-7, atol=1e-9
    )


@given(unit_maps(), st.floats(1e-3, 1e3), st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_standardised_maps_do_not_depend_on_scale_and_offset(
    map_: np.ndarray, scale: float, offset: float
) -> None:
    one = torch.from_numpy(map_)[None]
    moved = standardise((one + offset) * scale, (4, 6))
    # 1e-5 against the variance of a map that reaches from 0 to 1 is felt in the third digit only.
    torch.testing.assert_close(moved, standardise(one, (4, 6)), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_map_becomes_zero(value: float, dtype: torch.dtype) -> None:
    result = standardise(torch.full((2, 4, 6), value, dtype=dtype), (13, 9))
    assert result.isfinite().all()
    assert result.abs().max() < 1e-3


def test_maps_are_standardised_one_by_one() -> None:
    maps = torch.rand(3, 4, 6) * torch.tensor([1.0, 100.0, 1e-4])[:, None, None]
    alone = torch.cat([standardise(maps[i : i + 1], (8, 12)) for i in range(3)])
    torch.testing.assert_close(standardise(maps, (8, 12)), alone)
    torch.testing.assert_close(alone.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.var((1, 2), correction=0), torch.ones(3), atol=1e-2, rtol=0)


def test_upsampling_by_two_is_bilinear_with_aligned_edges() -> None:
    result = upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4))
    assert result.tolist() == [[[0.0, 0.25, 0.75, 1.0]]]


def test_upsampling_to_the_same_size_changes_nothing() -> None:
    maps = torch.rand(2, 5, 7)
    assert torch.equal(upsample(maps, (5, 7)), maps)


def test_normalise_divides_by_the_maximum() -> None:
    maps = torch.tensor([[[0.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(normalise(maps), expected)


def test_degenerate_maps_are_constant_or_not_finite() -> None:
    maps = torch.rand(7, 4, 6)
    maps[1] = 0
    maps[2] = 5
    maps[3, 1, 2] = math.nan
    maps[4, 1, 2] = math.inf
    maps[5] = maps[5] * 1e-25
    maps[6] = 1
    maps[6, 0, 0] = 1 + 1e-3
    assert is_degenerate(maps).tolist() == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_peak_one_does_not_depend_on_the_scale(scale: float) -> None:
    maps = torch.rand(3, 4, 5)
    maps[1] = 0
    torch.testing.assert_close(peak_one(maps * scale), peak_one(maps))
    assert peak_one(maps).amax((1, 2)).tolist() == [1, 0, 1]


def test_a_map_without_positive_values_is_not_turned_round() -> None:
    below = torch.tensor([[[-3.0, -1.0], [-2.0, -1.5]]])
    assert torch.equal(normalise(below, "max"), below)
    assert torch.equal(normalise(torch.zeros(1, 2, 2), "max"), torch.zeros(1, 2, 2))


def test_min_max_spans_0_to_1_at_every_scale_and_leaves_nan() -> None:
    maps = torch.rand(3, 4, 4)
    for scale in (1e-12, 1.0, 1e9):
        shown = min_max(scale * maps)
        assert shown.amin() == 0
        assert torch.allclose(shown, min_max(maps), atol=1e-5)
    assert min_max(torch.full((1, 2, 2), 7.0)).tolist() == [[[0, 0], [0, 0]]]
    maps[1, 0, 0] = float("nan")
    assert min_max(maps)[1].isnan().all()
