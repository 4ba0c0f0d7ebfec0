"""The input gradient against a loop written from its formula, and against Captum."""

from collections.abc import Callable

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from trompe.explainers._gradient import gradient_of_class
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import InputError
from trompe.recording import INPUT, watch

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")

CLASSES = torch.tensor([0, 3, 1, 0, 2])


def input_gradient(model: nn.Module, images: Tensor, how: InputGradient) -> Tensor:
    with watch(model, how.watches(model)) as record:
        return how(record(images), CLASSES)


def quantity_of(scores: Tensor, label: int, of: str) -> Tensor:
    """y_c from one image's scores (classes,)."""
    if of == "logit":
        return scores[label]
    probability = scores[label].exp() / sum(s.exp() for s in scores)
    return probability if of == "probability" else -probability.log()


def replica(model: nn.Module, images: Tensor, of: str, channels: str, pool: int) -> Tensor:
    """|d y_c / d image|, joined over colours and averaged over squares, by loops."""
    maps = []
    for image, label in zip(images, CLASSES.tolist(), strict=True):
        pixels = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(quantity_of(model(pixels)[0], label, of), pixels)
        height, width = image.shape[1] // pool, image.shape[2] // pool
        join = {"max": max, "sum": sum, "mean": lambda values: sum(values) / 3}[channels]
        one = torch.zeros(height, width, dtype=images.dtype)
        for i in range(height * pool):
            for j in range(width * pool):
                colours = [abs(gradient[0, c, i, j].item()) for c in range(3)]
                one[i // pool, j // pool] += join(colours) / pool**2
        maps.append(one)
    return torch.stack(maps)


@pytest.mark.parametrize("gradient_of", ["logit", "probability", "loss"])
@pytest.mark.parametrize("channels", ["max", "mean", "sum"])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_equals_the_loop_over_the_formula(
    smooth_net: nn.Module, images: Tensor, gradient_of: str, channels: str, pool: int
) -> None:
    how = InputGradient(gradient_of, channels, pool)  # type: ignore[arg-type]
    with torch.no_grad():
        maps = input_gradient(smooth_net, images, how)
    expected = replica(smooth_net, images, gradient_of, channels, pool)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-6, atol=1e-9)


def test_the_default_equals_captum(smooth_net: nn.Module, images: Tensor) -> None:
    witness = Saliency(smooth_net).attribute(images.clone(), target=CLASSES)
    with torch.no_grad():
        maps = input_gradient(smooth_net, images, InputGradient())
    torch.testing.assert_close(maps.double(), witness.amax(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "squeezenet1_1"])
def test_equals_captum_on_deep_networks(network: Callable[[str], nn.Module], name: str) -> None:
    model, images = network(name), torch.rand(5, 3, 48, 48)
    expected = Saliency(model).attribute(images.clone(), target=CLASSES).amax(1)
    with torch.no_grad():
        maps = input_gradient(model, images, InputGradient())
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_the_first_layer_is_reached_by_its_second_derivative(
    smooth_net: nn.Module, images: Tensor
) -> None:
    input_gradient(smooth_net, images, InputGradient()).sum().backward()
    assert smooth_net.body[0].weight.grad.any()
    assert smooth_net.body[0].bias.grad.any()  # through the curvature alone


def test_normalised_the_map_of_the_loss_is_that_of_its_gradient(
    smooth_net: nn.Module, images: Tensor
) -> None:
    plain, scaled = InputGradient("loss"), InputGradient("loss", normalise="max")
    with torch.no_grad(), watch(smooth_net, (INPUT,)) as record:
        seen = record(images)
        expected = plain(seen, CLASSES)
        expected = expected / expected.amax((1, 2), keepdim=True)
        torch.testing.assert_close(scaled(seen, CLASSES), expected, rtol=1e-4, atol=1e-4)


def test_the_map_of_an_image_of_which_the_model_is_certain_does_not_vanish(
    smooth_net: nn.Module, images: Tensor
) -> None:
    explainer = InputGradient("loss", normalise="max")
    with torch.no_grad(), watch(smooth_net, (INPUT,)) as record:
        classes = record(images).scores.argmax(1)
        last = [m for m in smooth_net.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.mul_(1000)
        last.bias.mul_(1000)
        seen = record(images)
        assert (1 - seen.scores.softmax(1).amax(1)).amax() < 1e-12
        assert (explainer(seen, classes).amax((1, 2)) > 0.999).all()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_second_graph_is_built_only_where_it_is_needed(
    smooth_net: nn.Module, images: Tensor, trainable: bool
) -> None:
    with torch.set_grad_enabled(trainable), watch(smooth_net, (INPUT,)) as record:
        seen = record(images)
        gradient = gradient_of_class(seen, seen.outputs[INPUT], CLASSES, "logit")
    assert gradient.requires_grad == trainable


def test_with_relu_the_biases_get_no_gradient_from_the_map(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = tiny_net(activation=nn.ReLU)
    input_gradient(model, images, InputGradient()).sum().backward()
    bias = model.body[0].bias.grad
    assert bias is None or not bias.any()


@pytest.mark.parametrize("pool", [0, -2])
def test_pooling_below_one_is_refused(pool: int) -> None:
    with pytest.raises(InputError, match=f"pool = {pool}"):
        InputGradient(pool=pool)


def test_pooling_beyond_the_image_is_refused(smooth_net: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="9"):
        input_gradient(smooth_net, images, InputGradient(pool=9))


@pytest.mark.parametrize("gradient_of", ["logit", "probability"])
def test_the_map_of_a_row_of_a_table_equals_finite_differences(gradient_of: str) -> None:
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    rows, step = torch.rand(5, 6, dtype=torch.float64), 1e-5
    with torch.no_grad():
        maps = input_gradient(model, rows, InputGradient(gradient_of))  # type: ignore[arg-type]
        assert maps.shape == (5, 1, 6)
        for i, label in enumerate(CLASSES.tolist()):
            for column in range(6):
                moved = torch.zeros(6, dtype=torch.float64)
                moved[column] = step
                above, below = (
                    quantity_of(model((rows[i] + sign * moved)[None])[0], label, gradient_of)
                    for sign in (1, -1)
                )
                expected = abs(float(above - below)) / (2 * step)
                assert maps[i, 0, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
