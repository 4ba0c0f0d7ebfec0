"""Fooling rates against counting by hand."""

import pytest
import torch

from trompe.fooling import fooling, largest_harmless, share_below
from trompe.maps import squared_error


def test_squared_error_is_the_mean_over_all_pixels_or_the_sum_over_those_that_count() -> None:
    maps = torch.tensor([[[1.0, 0.5], [0.25, 0.0]]]).expand(2, 2, 2)
    wanted = torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.0, torch.nan], [0.0, torch.nan]]])
    assert squared_error(maps, wanted).tolist() == [2 / 4, 1 + 0.25**2]


def test_pixels_that_do_not_count_get_no_gradient_and_no_nan() -> None:
    maps = torch.rand(1, 2, 2).requires_grad_()
    wanted = torch.tensor([[[0.0, torch.nan], [torch.nan, torch.nan]]])
    squared_error(maps, wanted).sum().backward()
    assert maps.grad is not None
    torch.testing.assert_close(maps.grad[0, 0, 0], 2 * maps.detach()[0, 0, 0])
    assert maps.grad.flatten()[1:].tolist() == [0, 0, 0]


def test_share_below_counts_strictly() -> None:
    assert share_below(torch.tensor([0.1, 0.2, 0.2, 0.3]), 0.2) == 0.25


@pytest.mark.parametrize("n", [7, 100, 150, 1000, 1001])
def test_the_largest_threshold_at_which_a_clean_model_fools_less_than_one_percent(n: int) -> None:
    losses = torch.randperm(n).double()
    tau = largest_harmless(losses)
    assert share_below(losses, tau) < 0.01
    assert share_below(losses, tau + 1e-9) >= 0.01


def test_rates_and_area_equal_counting() -> None:
    lied, kept = torch.tensor([0.0, 0.1, 0.5, 0.9]), torch.tensor([0.05, 0.6, 0.7, 0.8])
    reference, witness = torch.tensor([0.4, 0.6]), torch.tensor([0.3, 0.2, 0.7])
    found = fooling(lied, kept, reference, witness, torch.tensor([0.36]), 0.15)
    assert (found.fsr, found.cr) == (0.5, 0.75)
    assert found.data_tau == pytest.approx(0.2)
    assert (found.data_fsr, found.data_cr) == (0.5, 0.75)
    grid = torch.linspace(0, 0.5, 10_001)  # up to the reference's mean loss
    curve = [share_below(lied, float(tau)) for tau in grid]
    assert found.fsr_area == pytest.approx(sum(curve) / len(curve), abs=1e-3)
    assert (found.zero_loss, found.reference_loss) == pytest.approx((0.36, 0.5))
    assert found.mean_loss == pytest.approx(0.375)


def test_without_a_threshold_there_are_no_rates_for_it() -> None:
    one = torch.tensor([0.5])
    found = fooling(one, one, one, one, one, None)
    assert (found.tau, found.fsr, found.cr) == (None, None, None)
