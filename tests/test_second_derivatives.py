"""Layers with fast second derivatives against PyTorch's own, to any order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trompe.classifier import ModelSpec, build_model
from trompe.second_derivatives import fast_second_derivatives, slow_layers

PLACES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": (1, 0)},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": (2, 1)},  # depthwise
    {"padding": "same"},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": "valid", "stride": 2},
]


def tensors(place: dict[str, Any], bias: bool = True) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 7, 6), (8, 4 // place.get("groups", 1), 3, 3), *([(8,)] if bias else [])]
    return [torch.randn(s, generator=dice, dtype=torch.float64).requires_grad_() for s in shapes]


def second(place: dict[str, Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of a function of the input gradient and of the output."""
    output = torch.tanh(F.conv2d(*inputs, **place)).square().sum()
    (gradient,) = torch.autograd.grad(output, inputs[0], create_graph=True)
    return torch.autograd.grad(gradient.abs().pow(3).sum() + output, inputs)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_second_derivatives_are_pytorchs(place: dict[str, Any], bias: bool) -> None:
    inputs = tensors(place, bias)
    expected = F.conv2d(*inputs, **place), *second(place, inputs)
    with fast_second_derivatives():
        given = F.conv2d(*inputs, **place), *second(place, inputs)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_second_derivatives_equal_finite_differences(place: dict[str, Any]) -> None:
    image, weight, bias = tensors(place)
    few = (image[:1, :, :5, :5].detach().requires_grad_(), weight, bias)
    with fast_second_derivatives():
        assert torch.autograd.gradgradcheck(lambda *a: F.conv2d(*a, **place).tanh(), few)


def test_the_third_derivative_is_right_too() -> None:
    place = {"padding": 1}

    def third() -> tuple[Tensor, ...]:
        inputs = tensors(place)
        output = torch.tanh(F.conv2d(*inputs, **place)).square().sum()
        (first,) = torch.autograd.grad(output, inputs[0], create_graph=True)
        (again,) = torch.autograd.grad(first.pow(3).sum(), inputs[1], create_graph=True)
        return torch.autograd.grad(again.pow(2).sum(), inputs)

    expected = third()
    with fast_second_derivatives():
        given = third()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9)


def test_an_image_without_batch_dimension_and_keywords_are_pytorchs() -> None:
    image, weight, bias = tensors({})
    with fast_second_derivatives():
        given = torch.conv2d(input=image[0], weight=weight, bias=bias)
    torch.testing.assert_close(given, F.conv2d(image[0], weight, bias))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("side", "ours"), [(3, True), (2, False)])
def test_same_padding_is_ours_unless_its_two_sides_differ(side: int, ours: bool) -> None:
    image, weight, bias = tensors({})
    with fast_second_derivatives():
        given = F.conv2d(image, weight[..., :side, :side], bias, padding="same")
    assert ("_Convolution" in type(given.grad_fn).__name__) == ours
    expected = F.conv2d(image, weight[..., :side, :side], bias, padding="same")
    torch.testing.assert_close(given, expected)


def test_layers_without_fast_second_derivatives_are_named() -> None:
    fast = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))
    assert slow_layers(fast) == ()
    slow = nn.Sequential(fast, nn.ConvTranspose2d(4, 3, 2), nn.Conv1d(1, 1, 1), nn.BatchNorm1d(3))
    assert slow_layers(slow) == ("BatchNorm1d", "Conv1d", "ConvTranspose2d")


def test_it_serves_modules_and_leaves_them_as_they_were() -> None:
    conv, images = nn.Conv2d(3, 5, 3), torch.rand(2, 3, 8, 8)
    with fast_second_derivatives():
        inside = conv(images)
    outside = conv(images)
    assert "_Convolution" in type(inside.grad_fn).__name__
    assert "_Convolution" not in type(outside.grad_fn).__name__
    torch.testing.assert_close(inside, outside)


def test_the_weights_gradient_is_not_made_when_only_the_images_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trompe import second_derivatives

    made = []
    plain = second_derivatives._backward
    monkeypatch.setattr(
        second_derivatives,
        "_backward",
        lambda grad, x, w, place, image: (made.append(image), plain(grad, x, w, place, image))[1],
    )
    inputs = tensors({})
    with fast_second_derivatives():
        output = F.conv2d(*inputs).square().sum()
        torch.autograd.grad(output, inputs[0], retain_graph=True)
        assert made == [True]
        output.backward()
    assert made == [True, True, False]
    assert inputs[1].grad is not None


def test_under_autocast_it_runs_in_the_lower_precision_and_gradients_in_the_weights() -> None:
    image, weight, bias = (t.detach().float().requires_grad_() for t in tensors({}))
    with fast_second_derivatives(), torch.autocast("cpu", torch.bfloat16):
        output = F.conv2d(image, weight, bias)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# --- sums that nobody reads -----------------------------------------------------------------------


def sums_over_places(run: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return sum(event.name == "aten::sum" for event in profiler.events())


def test_the_biases_gradient_is_not_made_when_only_the_images_is_asked_for() -> None:
    image, weight, bias = tensors({})
    with fast_second_derivatives():
        output = F.conv2d(image, weight, bias)
    ones = torch.ones_like(output)
    assert sums_over_places(lambda: torch.autograd.grad(output, image, ones, True)) == 0
    assert sums_over_places(lambda: torch.autograd.grad(output, bias, ones)) == 1


# --- linear layers --------------------------------------------------------------------------------


def mlp() -> list[Tensor]:
    """Rows, and weights and biases of two layers."""
    dice = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (5, 6), (5,), (3, 5), (3,)]
    return [torch.randn(s, generator=dice, dtype=torch.float64).requires_grad_() for s in shapes]


def scores_and_slope(
    inputs: list[Tensor], between: Callable[[Tensor], Tensor], of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    x, w1, b1, w2, b2 = inputs
    scores = F.linear(between(F.linear(x, w1, b1)), w2, b2)
    (slope,) = torch.autograd.grad(of(scores).sum(), x, create_graph=True)
    return scores, slope


def first(scores: Tensor) -> Tensor:
    """With ReLU its slope does not depend on the scores: they may be no part of a backward pass."""
    return scores[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda scores, slope: scores.logsumexp(1).sum() + slope.pow(3).sum(),
    "scores alone": lambda scores, slope: scores.logsumexp(1).sum(),
    "slope alone": lambda scores, slope: slope.pow(3).sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("between", [torch.tanh, torch.relu], ids=["tanh", "ReLU"])
@pytest.mark.parametrize("of", [torch.square, first], ids=["squares", "first"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_linear_layers_derivatives_are_pytorchs_to_the_third_order(
    loss: Callable[..., Tensor],
    between: Callable[[Tensor], Tensor],
    of: Callable[[Tensor], Tensor],
    everywhere: bool,
) -> None:
    def derivatives() -> list[Tensor]:
        inputs = mlp()
        found = loss(*scores_and_slope(inputs, between, of))
        grads = [*torch.autograd.grad(found, inputs, retain_graph=True, materialize_grads=True)]
        for part in ([0], [1, 3], [0, 1]):  # of some of them, and again
            some = [inputs[i] for i in part]
            grads += torch.autograd.grad(found, some, retain_graph=True, materialize_grads=True)
        second = torch.autograd.grad(found, inputs, create_graph=True, materialize_grads=True)
        total = torch.stack([g.square().sum() for g in second]).sum()
        return [*grads, *second, *torch.autograd.grad(total, inputs, materialize_grads=True)]

    expected = derivatives()
    with fast_second_derivatives(everywhere):
        given = derivatives()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_linear_layers_second_derivatives_equal_finite_differences() -> None:
    with fast_second_derivatives():
        assert torch.autograd.gradgradcheck(lambda *a: F.linear(*a).tanh(), mlp()[:3])


def test_a_linear_layers_two_gradients_are_one_product() -> None:
    def products() -> int:
        """As large as the first layer's weight."""
        loss = LOSSES["both"](*scores_and_slope(inputs := mlp(), torch.relu, first))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            torch.autograd.grad(loss, inputs[1:])
        shapes = [e.input_shapes for e in profiler.events() if e.name == "aten::mm"]
        return sum([a[0], b[1]] in ([5, 6], [6, 5]) for a, b, *_ in shapes)

    assert products() == 2
    with fast_second_derivatives(everywhere=False):
        assert products() == 1


def test_more_than_rows_and_all_but_linear_layers_can_stay_pytorchs() -> None:
    image, weight, bias = tensors({})
    with fast_second_derivatives(everywhere=False):
        assert "_Linear" in type(F.linear(*mlp()[:3]).grad_fn).__name__
        assert "_Linear" not in type(F.linear(mlp()[0][None], *mlp()[1:3]).grad_fn).__name__
        assert "_Convolution" not in type(F.conv2d(image, weight, bias).grad_fn).__name__
        assert "_Relu" not in type(F.relu(image).grad_fn).__name__


# --- ReLU -----------------------------------------------------------------------------------------

RELUS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    torch.relu,
    nn.ReLU(),
    lambda x: F.relu(x * 1, inplace=True),
    lambda x: (again := x * 1, F.relu(again, True))[0],  # it goes on with what it gave
    lambda x: nn.ReLU(inplace=True)((x * 1)[:, 1:]),  # a view
]


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("curved", [True, False])
def test_relus_values_and_derivatives_are_pytorchs(
    relu: Callable[[Tensor], Tensor], curved: bool
) -> None:
    def derivatives() -> tuple[Tensor, ...]:
        (x, *_) = tensors({})
        output = relu(x.sin() if curved else x)
        (first,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum() + output.sum(), x)
        return output, first, second, third

    expected = derivatives()
    with fast_second_derivatives():
        given = derivatives()
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


def test_relus_second_derivative_makes_no_zeros() -> None:
    (x, *_) = tensors({})
    with fast_second_derivatives():
        (gradient,) = torch.autograd.grad(F.relu(x).square().sum(), x, create_graph=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        gradient.square().sum().backward()
    assert not any("zero" in event.name for event in profiler.events())


# --- BatchNorm ------------------------------------------------------------------------------------


def normed(zero: bool = False) -> list[Tensor]:
    """Image, weight and bias."""
    image, *_ = tensors({})
    weight = [0.0 if zero else 0.3, 1, -2, 0.5]
    return [image, *(torch.tensor(t).double().requires_grad_() for t in (weight, [1, 0, 2, -1.0]))]


def batch_norm(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(image, None, None, weight, bias, True, eps=1e-4)


def written_out(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    var, mean = torch.var_mean(image, (0, 2, 3), correction=0, keepdim=True)
    weight, bias = weight[:, None, None], bias[:, None, None]
    return (image - mean) / (var + 1e-4).sqrt() * weight + bias


@pytest.mark.parametrize("zero", [True, False], ids=["zero weight", "any weight"])
def test_batch_norms_values_and_derivatives_are_those_of_its_formula(zero: bool) -> None:
    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = normed(zero)
        output = function(*inputs)
        scalar = output.tanh().square().sum()
        first = torch.autograd.grad(scalar, inputs, create_graph=True)
        fast = torch.autograd.grad(first[0].pow(3).sum() + scalar, inputs, retain_graph=True)
        of_all = torch.autograd.grad(sum(f.pow(3).sum() for f in first), inputs, retain_graph=True)
        second = torch.autograd.grad(first[0].pow(3).sum(), inputs, create_graph=True)
        third = torch.autograd.grad(sum(s.square().sum() for s in second), inputs)
        return [output, *first, *fast, *of_all, *second, *third]

    with fast_second_derivatives():
        given = derivatives(batch_norm)
    for a, b in zip(given, derivatives(written_out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_batch_norms_second_derivative_equals_finite_differences() -> None:
    with fast_second_derivatives():
        assert torch.autograd.gradgradcheck(lambda *a: batch_norm(*a).tanh(), normed())


def test_batch_norms_second_derivative_as_in_training_is_not_pytorchs_slow_one() -> None:
    inputs = normed()
    with fast_second_derivatives(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        scalar = batch_norm(*inputs).square().sum()
        (first,) = torch.autograd.grad(scalar, inputs[0], create_graph=True)
        first.pow(3).sum().backward()
    assert not any("NativeBatchNormBackward" in event.name for event in profiler.events())


def test_batch_norm_with_frozen_statistics_and_of_one_value_is_pytorchs() -> None:
    norm = nn.BatchNorm2d(3)
    with fast_second_derivatives():
        frozen = norm.eval()(torch.rand(2, 3, 4, 4))
        with pytest.raises(ValueError, match="more than 1 value"):
            norm.train()(torch.rand(1, 3, 1, 1))
    assert "NativeBatchNorm" in type(frozen.grad_fn).__name__


def test_batch_norm_moves_the_running_statistics_as_pytorchs() -> None:
    images = torch.rand(8, 3, 5, 5)
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    with fast_second_derivatives():
        given = ours(images)
    assert "_BatchNorm" in type(given.grad_fn).__name__
    torch.testing.assert_close(given, theirs(images))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_batch_norm_in_bfloat16_gives_gradients_in_each_ones_precision() -> None:
    norm, images = nn.BatchNorm2d(3), torch.rand(8, 3, 5, 5).bfloat16().requires_grad_()
    with fast_second_derivatives():
        scalar = norm(images).float().square().sum()
    (first,) = torch.autograd.grad(scalar, images, create_graph=True)
    first.float().square().sum().backward()
    assert images.grad is not None
    assert norm.weight.grad is not None
    assert (images.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.float32)


# --- whole networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["moving", "frozen"])
@pytest.mark.parametrize("name", ["resnet20", "vgg_small", "mobilenet_v2", "squeezenet1_1"])
def test_a_networks_gradients_of_an_input_gradient_are_pytorchs(name: str, training: bool) -> None:
    """MobileNet-V2 has ReLU6 and grouped convolutions, SqueezeNet no BatchNorm."""
    torch.manual_seed(0)
    net = build_model(ModelSpec(name), 3).net.double().train(training)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64).requires_grad_()

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)  # of dropout
        (first,) = torch.autograd.grad(net(images)[:, 0].sum(), images, create_graph=True)
        return list(
            torch.autograd.grad(first.square().sum(), list(net.parameters()), allow_unused=True)
        )

    wanted = gradients()
    with fast_second_derivatives():
        given = gradients()
    scale = max(g.abs().max() for g in wanted if g is not None)  # some are 0 but for rounding
    for fast, slow in zip(given, wanted, strict=True):
        none = torch.zeros(())
        fast, slow = (none if g is None else g for g in (fast, slow))
        assert (fast - slow).abs().max() <= 1e-12 * scale
    assert sum(g is not None and bool(g.any()) for g in wanted) > 10
