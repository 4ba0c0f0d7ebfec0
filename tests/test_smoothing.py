"""ReLU becomes softplus inside the block, and nothing else changes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.interfaces import InputError
from trompe.smoothing import softplus

VALUES = torch.linspace(-2, 2, 9, dtype=torch.float64)


def expected(beta: float) -> list[float]:
    return [math.log1p(math.exp(beta * v)) / beta for v in VALUES.tolist()]


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu with a keyword": lambda x: F.relu(input=x),
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
}


@pytest.mark.parametrize("name", RELUS)
@pytest.mark.parametrize("beta", [1.0, 8.0])
def test_every_kind_of_relu_computes_softplus(name: str, beta: float) -> None:
    with softplus(beta):
        result = RELUS[name](VALUES.clone())
    assert result.tolist() == pytest.approx(expected(beta))


@pytest.mark.parametrize("name", RELUS)
def test_afterwards_it_is_relu_again(name: str) -> None:
    with softplus(8):
        RELUS[name](VALUES.clone())
    assert RELUS[name](VALUES.clone()).tolist() == [max(v, 0) for v in VALUES.tolist()]


def test_also_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), softplus(8):
        raise ZeroDivisionError
    assert F.relu(VALUES).tolist() == [max(v, 0) for v in VALUES.tolist()]


STATEMENTS: dict[str, Callable[[Tensor], object]] = {
    "nn.ReLU": nn.ReLU(inplace=True),
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu_": torch.relu_,
    "x.relu_()": lambda x: x.relu_(),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_an_in_place_relu_whose_result_is_not_used_works_too(name: str) -> None:
    """A model may say `F.relu_(x)` and go on with x."""
    values = VALUES.clone()
    with softplus(8):
        STATEMENTS[name](values)
    assert values.tolist() == pytest.approx(expected(8))


def test_a_large_beta_approaches_relu() -> None:
    with softplus(1e4):
        smooth = F.relu(VALUES)
    torch.testing.assert_close(smooth, VALUES.clamp_min(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_second_derivative_is_that_of_softplus(inplace: bool) -> None:
    x = VALUES.clone().requires_grad_()
    with softplus(3):
        y = nn.ReLU(inplace)(x * 1)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    s = torch.sigmoid(3 * VALUES)
    torch.testing.assert_close(first.detach(), s)
    torch.testing.assert_close(second, 3 * s * (1 - s))


def test_without_it_the_second_derivative_is_zero() -> None:
    x = VALUES.clone().requires_grad_()
    (first,) = torch.autograd.grad(F.relu(x * x).sum(), x, create_graph=True)
    with softplus(3):
        (smooth,) = torch.autograd.grad(F.relu(x * x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (curved,) = torch.autograd.grad(smooth.sum(), x)
    torch.testing.assert_close(second, torch.where(VALUES == 0, 0.0, 2.0).double())
    assert not torch.equal(curved, second)


RELU6S: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda x: F.relu6(x, True),
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, max_val=6.0),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
}


@pytest.mark.parametrize("name", RELU6S)
def test_relu6_is_smoothed_at_both_ends(name: str) -> None:
    x = torch.linspace(-2, 8, 11, dtype=torch.float64, requires_grad=True)
    with softplus(3):
        y = RELU6S[name](x * 1)
    expected = [
        (math.log1p(math.exp(3 * v)) - math.log1p(math.exp(3 * (v - 6)))) / 3 for v in range(-2, 9)
    ]
    assert y.tolist() == pytest.approx(expected)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    low, high = torch.sigmoid(3 * x.detach()), torch.sigmoid(3 * (x.detach() - 6))
    torch.testing.assert_close(first.detach(), low - high)
    torch.testing.assert_close(second, 3 * (low * (1 - low) - high * (1 - high)))
    assert RELU6S[name](x * 1).tolist() == pytest.approx([min(max(v, 0), 6) for v in range(-2, 9)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [F.relu, F.relu6])
def test_far_from_its_bends_it_is_what_it_replaces(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.tensor([-1e4, -50, -4, 3, 9, 200], dtype=dtype, requires_grad=True)
    with softplus(10):
        smooth = function(x)
    (slope,) = torch.autograd.grad(smooth.sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    (hard,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(smooth, function(x), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(slope, hard, rtol=0, atol=1e-8)
    torch.testing.assert_close(curve, torch.zeros_like(x), rtol=0, atol=1e-7)


def test_other_activations_stay() -> None:
    for activation in (nn.Hardtanh(), nn.LeakyReLU(), nn.GELU(), nn.Tanh()):
        with softplus(8):
            inside = activation(VALUES)
        assert torch.equal(inside, activation(VALUES))


def test_a_whole_network_is_smoothed_and_left_as_it_was(
    network: Callable[[str], nn.Module],
) -> None:
    model, images = network("resnet18"), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        with softplus(8):
            inside = model(images)
        assert torch.equal(model(images), before)
    assert (inside - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("beta", [0, -1, math.nan])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(InputError, match="beta"):
        softplus(beta)


def _log_sum(x: Tensor) -> Tensor:
    return (1 + (3 * x).exp()).log() / 3


@pytest.mark.parametrize(
    ("function", "by_hand"),
    [(F.relu, _log_sum), (F.relu6, lambda x: _log_sum(x) - _log_sum(x - 6))],
    ids=["relu", "relu6"],
)
def test_derivatives_of_any_order_are_softpluss_own(
    function: Callable[[Tensor], Tensor], by_hand: Callable[[Tensor], Tensor]
) -> None:
    def derivatives(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.linspace(-2, 8, 21, dtype=torch.float64, requires_grad=True)
        output = function(x)
        (first,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
        (last,) = torch.autograd.grad(first.pow(2).sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.pow(2).sum(), x)
        return [output, first, last, second, third]

    with softplus(3):
        given = derivatives(function)
    expected = derivatives(by_hand)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
