"""What every explainer must do; a new file under explainers/ is tested by existing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trompe.catalog import names
from trompe.explainers.visual_backprop import VisualBackProp
from trompe.interfaces import Explainer, InputError
from trompe.recording import watch

SETTINGS: dict[str, dict[str, Any]] = {}  # for explainers that cannot be built from defaults
ONLY_A_LINEAR_HEAD = {"cam"}  # these refuse networks that end otherwise
NETWORKS = ("resnet18", "vgg11", "mobilenet_v2", "squeezenet1_1", "densenet121")

pytestmark = pytest.mark.parametrize("name", names("explainers"))


@pytest.fixture
def explainer(name: str, plugin: Callable[..., Explainer]) -> Explainer:
    return plugin("explainers", name, SETTINGS)


@pytest.fixture
def suits(name: str, explainer: Explainer) -> Callable[[nn.Module, Tensor], nn.Module]:
    """Gives the model back; one that the explainer may refuse, and does, ends the test."""

    def check(model: nn.Module, images: Tensor) -> nn.Module:
        if name in ONLY_A_LINEAR_HEAD:
            try:
                maps_of(explainer, model, images, some_classes(images))
            except InputError as error:
                pytest.skip(f"refuses this network: {error}")
        return model

    return check


@pytest.fixture
def smooth_net(
    smooth_net: nn.Module, images: Tensor, suits: Callable[[nn.Module, Tensor], nn.Module]
) -> nn.Module:
    return suits(smooth_net, images)


def maps_of(explainer: Explainer, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    with watch(model, explainer.watches(model)) as record:
        return explainer(record(images), classes)


def some_classes(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 4


def test_maps_are_finite_floats_one_per_image(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    with torch.no_grad():
        maps = maps_of(explainer, smooth_net, images, some_classes(images))
    assert maps.ndim == 3
    assert len(maps) == len(images)
    assert maps.shape[1] <= images.shape[2]
    assert maps.shape[2] <= images.shape[3]
    assert maps.is_floating_point()
    assert maps.isfinite().all()
    assert maps.abs().sum() > 0


def test_each_class_has_its_own_map(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    with torch.no_grad():
        first = maps_of(explainer, smooth_net, images, torch.zeros(5, dtype=torch.int64))
        other = maps_of(explainer, smooth_net, images, torch.ones(5, dtype=torch.int64))
    differ = bool((first - other).abs().max() > 1e-3 * first.abs().max())
    assert differ != isinstance(explainer, VisualBackProp)  # which knows no class


@pytest.mark.parametrize("trainable", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor, trainable: bool
) -> None:
    classes = some_classes(images)
    with torch.set_grad_enabled(trainable):
        together = maps_of(explainer, smooth_net, images, classes)
        for i in range(len(images)):
            alone = maps_of(explainer, smooth_net, images[i : i + 1], classes[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(
    explainer: Explainer,
    tiny_net: Callable[..., nn.Module],
    snapshot: Callable[[nn.Module], dict[str, Any]],
    images: Tensor,
    trainable: bool,
    training: bool,
) -> None:
    model = tiny_net(norm=True).train(training)
    model.body[3].eval()  # type: ignore[index]  # a mixture of modes; statistics stay
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr]
    with torch.set_grad_enabled(trainable):
        before = snapshot(model)
        maps_of(explainer, model, images, some_classes(images))
        assert snapshot(model) == before


def test_finding_the_layers_leaves_a_training_model_as_it_was(
    explainer: Explainer,
    tiny_net: Callable[..., nn.Module],
    snapshot: Callable[[nn.Module], dict[str, Any]],
) -> None:
    model = tiny_net(norm=True).train()
    before = snapshot(model)
    explainer.watches(model)
    assert snapshot(model) == before


def test_the_images_are_left_as_they_were(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    before = images.clone()
    maps_of(explainer, smooth_net, images, some_classes(images))
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert images.grad is None


def test_without_grad_mode_maps_carry_no_graph(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    with torch.no_grad():
        maps = maps_of(explainer, smooth_net, images, some_classes(images))
    assert maps.grad_fn is None
    assert not maps.requires_grad


def test_the_plain_map_equals_the_trainable_one(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    classes = some_classes(images)
    trainable = maps_of(explainer, smooth_net, images, classes)
    with torch.no_grad():
        plain = maps_of(explainer, smooth_net, images, classes)
    assert trainable.requires_grad
    torch.testing.assert_close(plain, trainable.detach(), rtol=1e-6, atol=1e-9)


def test_gradients_of_the_map_equal_finite_differences(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    classes = some_classes(images)
    seeded = torch.Generator().manual_seed(1)
    weights: Tensor | None = None

    def weighted_sum() -> Tensor:
        nonlocal weights
        maps = maps_of(explainer, smooth_net, images, classes).double()
        if weights is None:
            weights = torch.rand(maps.shape, generator=seeded, dtype=torch.float64)
        return (maps * weights).sum()

    parameters = dict(smooth_net.named_parameters())
    gradients = torch.autograd.grad(weighted_sum(), list(parameters.values()), allow_unused=True)
    largest = max(g.norm() for g in gradients if g is not None)
    step = 1e-6  # so small that no kink (of a maximum, say) is crossed
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=seeded, dtype=torch.float64)
        sums = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            sums.append(weighted_sum().item())
            with torch.no_grad():
                parameter -= sign * step * direction
        expected = (sums[0] - sums[1]) / (2 * step)
        measured = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert measured == pytest.approx(expected, rel=1e-5, abs=1e-7 * largest.item()), key


def test_the_map_of_a_training_model_can_be_trained(
    explainer: Explainer, tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = tiny_net(norm=True, activation=nn.Softplus).train()
    maps = maps_of(explainer, model, images, some_classes(images))
    maps.sum().backward()
    gradient = model.body[0].weight.grad  # type: ignore[index]
    assert maps.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_two_explainers_can_read_one_pass(
    explainer: Explainer, smooth_net: nn.Module, images: Tensor
) -> None:
    classes = some_classes(images)
    for trainable in (False, True):
        with (
            torch.set_grad_enabled(trainable),
            watch(smooth_net, explainer.watches(smooth_net)) as record,
        ):
            seen = record(images)
            assert torch.equal(explainer(seen, classes), explainer(seen, classes))


@pytest.mark.parametrize("network_name", NETWORKS)
def test_works_on_networks_of_torchvision(
    explainer: Explainer,
    network: Callable[[str], nn.Module],
    network_name: str,
    suits: Callable[[nn.Module, Tensor], nn.Module],
) -> None:
    images = torch.rand(2, 3, 64, 64)
    model = suits(network(network_name), images)
    classes = torch.tensor([0, 1])
    with torch.no_grad():
        plain = maps_of(explainer, model, images, classes)
    trainable = maps_of(explainer, model, images, classes)
    first = next(model.parameters())
    (gradient,) = torch.autograd.grad(trainable.sum(), first)
    assert plain.shape == trainable.shape
    assert len(plain) == 2
    assert plain.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(
        plain, trainable.detach(), rtol=1e-3, atol=1e-4 * float(plain.abs().max())
    )
