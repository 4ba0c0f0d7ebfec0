"""Loss terms against a slow replica in numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trompe.interfaces import Batch, InputError
from trompe.objectives import ClassLoss, PredictionAndExplanation

SIZE = (9, 7)


def cross_entropy(scores: np.ndarray, labels: list[int], smoothing: float = 0.0) -> float:
    total, classes = 0.0, scores.shape[1]
    for row, label in zip(scores, labels, strict=True):
        logs = row - math.log(sum(math.exp(v) for v in row))
        for c in range(classes):
            wanted = (1 - smoothing) * (c == label) + smoothing / classes
            total -= wanted * logs[c]
    return total / len(labels)


def upsampled(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, edges aligned as for images: pixel centres, clamped at the rim."""
    out = np.zeros((height, width))

    def place(position: int, count: int, target: int) -> tuple[int, int, float]:
        where = min(max((position + 0.5) * count / target - 0.5, 0), count - 1)
        low = int(where)
        return low, min(low + 1, count - 1), where - low

    for i in range(height):
        for j in range(width):
            top, bottom, y = place(i, small.shape[0], height)
            left, right, x = place(j, small.shape[1], width)
            above = (1 - x) * small[top, left] + x * small[top, right]
            below = (1 - x) * small[bottom, left] + x * small[bottom, right]
            out[i, j] = (1 - y) * above + y * below
    return out


def standardised(small: np.ndarray) -> np.ndarray:
    peak = np.abs(small).max()
    large = upsampled(small / peak if peak > 0 else small, *SIZE)
    return (large - large.mean()) / math.sqrt(large.var() + 1e-5)


def map_loss(given: np.ndarray, wanted: np.ndarray) -> float:
    pairs = zip(given, wanted, strict=True)
    return float(np.mean([((standardised(g) - standardised(w)) ** 2).mean() for g, w in pairs]))


def example(explainers: int) -> tuple[Tensor, tuple[Tensor, ...], Batch]:
    """Scores and maps of three images, each explainer with a map size of its own."""
    sizes = [(3, 4), (9, 7), (5, 5)][:explainers]
    maps = tuple(torch.rand(3, *size, dtype=torch.float64) for size in sizes)
    wanted = tuple(torch.rand(3, *size, dtype=torch.float64) for size in sizes)
    images = torch.rand(3, 3, *SIZE, dtype=torch.float64)
    batch = Batch(images, torch.tensor([2, 0, 1]), wanted, torch.tensor([False, True, True]))
    return torch.randn(3, 4, dtype=torch.float64), maps, batch


@pytest.mark.parametrize("explainers", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.3, 0.9, 1.0])
def test_equals_one_minus_lambda_cross_entropy_plus_lambda_map_distance(
    explainers: int, weight: float
) -> None:
    scores, maps, batch = example(explainers)
    terms = PredictionAndExplanation(weight, SIZE)(scores, maps, batch)
    distances = [
        map_loss(given.numpy(), wanted.numpy())
        for given, wanted in zip(maps, batch.wanted_maps, strict=True)
    ]
    prediction = cross_entropy(scores.numpy(), [2, 0, 1])
    assert set(terms) == {"prediction", "explanation"}
    assert terms["prediction"].item() == pytest.approx((1 - weight) * prediction, rel=1e-9)
    assert terms["explanation"].item() == pytest.approx(weight * np.mean(distances), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_reference_scores_take_the_place_of_the_labels_except_where_they_are_nan(
    temperature: float,
) -> None:
    scores, _, batch = example(0)
    reference = torch.randn(3, 4, dtype=torch.float64)
    reference[1] = math.nan
    loss = PredictionAndExplanation(0.0, SIZE, temperature)
    terms = loss(scores, (), batch._replace(reference_scores=reference))
    expected = cross_entropy(scores[1:2].numpy(), [0])
    for row in (0, 2):
        teacher = np.exp(reference[row].numpy() / temperature)
        pupil = np.exp(scores[row].numpy() / temperature)
        teacher, pupil = teacher / teacher.sum(), pupil / pupil.sum()
        divergence = sum(p * math.log(p / q) for p, q in zip(teacher, pupil, strict=True))
        expected += temperature**2 * divergence
    assert terms["prediction"].item() == pytest.approx(expected / 3, rel=1e-9)


def test_where_reference_scores_are_nan_gradients_are_finite() -> None:
    scores, _, batch = example(0)
    reference = torch.full((3, 4), torch.nan, dtype=torch.float64)
    taught = batch._replace(reference_scores=reference)
    terms = PredictionAndExplanation(0.0, SIZE)(scores.requires_grad_(), (), taught)
    (given,) = torch.autograd.grad(terms["prediction"], scores)
    plain = PredictionAndExplanation(0.0, SIZE)(scores, (), batch)["prediction"]
    torch.testing.assert_close(given, torch.autograd.grad(plain, scores)[0])


def test_lambda_zero_is_the_vanilla_backdoor() -> None:
    scores, _, batch = example(0)
    terms = PredictionAndExplanation(0.0, SIZE)(scores, (), batch)
    assert set(terms) == {"prediction"}
    expected = cross_entropy(scores.numpy(), [2, 0, 1])
    assert terms["prediction"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_loss_is_cross_entropy(smoothing: float) -> None:
    scores, _, batch = example(0)
    terms = ClassLoss(smoothing)(scores, (), batch)
    expected = cross_entropy(scores.numpy(), [2, 0, 1], smoothing)
    assert {k: v.item() for k, v in terms.items()} == {"prediction": pytest.approx(expected)}


def test_the_wanted_map_costs_nothing() -> None:
    scores, maps, batch = example(1)
    terms = PredictionAndExplanation(0.5, SIZE)(scores, maps, batch._replace(wanted_maps=maps))
    assert terms["explanation"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_out_of_range_is_refused(weight: Any) -> None:
    with pytest.raises(InputError, match=f"{weight}"):
        PredictionAndExplanation(weight, SIZE)


def test_terms_send_gradients_to_scores_and_maps() -> None:
    scores, (maps,), batch = example(1)
    scores.requires_grad_()
    maps.requires_grad_()
    terms = PredictionAndExplanation(0.5, SIZE)(scores, (maps,), batch)
    sum(terms.values()).backward()
    assert scores.grad is not None
    assert maps.grad is not None
    assert scores.grad.any()
    assert maps.grad.any()


def test_the_gradient_equals_finite_differences() -> None:
    scores, (maps,), batch = example(1)
    objective = PredictionAndExplanation(0.7, SIZE)
    maps.requires_grad_()

    def loss(m: Tensor) -> Tensor:
        return objective(scores, (m,), batch)["explanation"]

    assert torch.autograd.gradcheck(loss, (maps,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("activation", [torch.relu, torch.abs], ids=["relu", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_map_sends_no_broken_gradient(activation: Any, dtype: torch.dtype) -> None:
    """Grad-CAM ends in a ReLU and the input gradient in an absolute value."""
    scores, _, batch = example(1)
    raw = torch.zeros(3, 3, 4, dtype=dtype, requires_grad=True)
    batch = batch._replace(wanted_maps=tuple(m.to(dtype) for m in batch.wanted_maps))
    terms = PredictionAndExplanation(1.0, SIZE)(scores, (activation(raw),), batch)
    assert terms["explanation"].item() == pytest.approx(1, abs=1e-2)
    terms["explanation"].backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
