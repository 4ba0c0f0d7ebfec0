"""Grad-CAM against a loop written from its formula, against Captum, and its closed form."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from trompe.explainers._layers import last_conv_activation
from trompe.explainers._linear_head import linear_head
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import InputError, Pass
from trompe.recording import watch

CLASSES = torch.tensor([0, 3, 1, 0, 2])


def recorded(model: nn.Module, images: Tensor, layer: str = "body") -> Pass:
    with watch(model, (layer,)) as record:
        return record(images)


def gradcam(model: nn.Module, images: Tensor, how: GradCam, classes: Tensor = CLASSES) -> Tensor:
    with watch(model, how.watches(model)) as record:
        return how(record(images), classes)


def quantity_of(scores: Tensor, label: int, of: str) -> Tensor:
    """y_c from one image's scores (classes,)."""
    if of == "logit":
        return scores[label]
    probability = scores[label].exp() / sum(s.exp() for s in scores)
    return probability if of == "probability" else -probability.log()


def replica(model: nn.Module, images: Tensor, classes: Tensor, of: str = "logit") -> Tensor:
    """ReLU(sum_k a_k A^k), a_k = (1/Z) sum_ij d y_c / d A^k_ij, image by image."""
    maps = []
    for image, label in zip(images, classes.tolist(), strict=True):
        activations = model.body(image[None]).detach().requires_grad_()
        quantity = quantity_of(model.tail(activations)[0], label, of)
        (gradient,) = torch.autograd.grad(quantity, activations)
        channels, height, width = activations.shape[1:]
        weighted = torch.zeros(height, width, dtype=images.dtype)
        for k in range(channels):
            total = 0.0
            for i in range(height):
                for j in range(width):
                    total += gradient[0, k, i, j].item()
            weighted += total / (height * width) * activations[0, k].detach()
        maps.append(weighted.clamp_min(0))
    return torch.stack(maps)


def two_layer_head() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, two_layer_head], ids=["linear", "two-layer"])
@pytest.mark.parametrize("gradient_of", ["logit", "probability", "loss"])
@pytest.mark.parametrize("closed_form", [True, False])
def test_equals_the_loop_over_the_formula(
    tiny_net: Callable[..., nn.Module],
    images: Tensor,
    head: Callable[[], nn.Module] | None,
    gradient_of: str,
    closed_form: bool,
) -> None:
    model = tiny_net(activation=nn.Tanh, head=head and head())
    how = GradCam(gradient_of=gradient_of, closed_form=closed_form)  # type: ignore[arg-type]
    with torch.no_grad():
        maps = gradcam(model, images, how)
    expected = replica(model, images, CLASSES, gradient_of)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(maps.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("head", [None, two_layer_head], ids=["linear", "two-layer"])
def test_equals_captum(
    tiny_net: Callable[..., nn.Module], images: Tensor, head: Callable[[], nn.Module] | None
) -> None:
    model = tiny_net(activation=nn.Tanh, head=head and head())
    witness = LayerGradCam(model, model.body)
    expected = witness.attribute(images, target=CLASSES, relu_attributions=True)[:, 0]
    with torch.no_grad():
        maps = gradcam(model, images, GradCam())
    torch.testing.assert_close(maps.double(), expected.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2", "densenet121"])
def test_equals_captum_on_deep_networks(network: Callable[[str], nn.Module], name: str) -> None:
    model = network(name)
    images, classes = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    layer = model.get_submodule(last_conv_activation(model))
    witness = LayerGradCam(model, layer)
    expected = witness.attribute(images, classes, relu_attributions=True)[:, 0].detach()
    for closed_form in (True, False):
        with torch.no_grad():
            maps = gradcam(model, images, GradCam(closed_form=closed_form), classes)
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_an_earlier_layer_can_be_named(tiny_net: Callable[..., nn.Module], images: Tensor) -> None:
    model = tiny_net(activation=nn.Tanh)
    witness = LayerGradCam(model, model.body[0])
    expected = witness.attribute(images, target=CLASSES, relu_attributions=True)[:, 0]
    with torch.no_grad():
        maps = gradcam(model, images, GradCam(layer="body.0"))
    assert maps.shape == (5, 10, 8)
    torch.testing.assert_close(maps.double(), expected.detach(), rtol=1e-6, atol=1e-8)


# --- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_head_of_a_pooling_network_is_found(
    tiny_net: Callable[..., nn.Module], images: Tensor, bias: bool, trainable: bool
) -> None:
    model = tiny_net(head=nn.Linear(6, 4, bias=bias))
    model.decoy = nn.Linear(6, 4)
    with torch.set_grad_enabled(trainable):
        assert linear_head(recorded(model, images), "body") is model.head


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_the_heads_of_residual_networks_are_found(
    network: Callable[[str], nn.Module], name: str
) -> None:
    model = network(name)
    layer = last_conv_activation(model)
    with torch.no_grad():
        seen = recorded(model, torch.rand(2, 3, 64, 64), layer)
    assert linear_head(seen, layer) is model.fc


def test_the_closed_form_equals_the_differentiated_head(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = tiny_net(activation=nn.Tanh)
    weights = torch.rand(5, 5, 4, dtype=torch.float64)
    values, gradients = [], []
    for closed_form in (True, False):
        maps = gradcam(model, images, GradCam(closed_form=closed_form)).double()
        values.append(maps.detach())
        gradients.append(
            torch.autograd.grad((maps * weights).sum(), list(model.parameters()), allow_unused=True)
        )
    assert values[0].abs().max() > 1e-3
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-14)
    for key, closed, open_ in zip(dict(model.named_parameters()), *gradients, strict=True):
        if key == "head.bias":  # does not reach the map
            assert closed is None or not closed.any()
            assert open_ is None or not open_.any()
            continue
        torch.testing.assert_close(closed, open_, rtol=1e-12, atol=1e-14, msg=key)


class StraightThrough(nn.Module):
    """Adds nothing to the pooled activations, but something to their gradient."""

    def forward(self, activations: Tensor) -> Tensor:
        pooled = activations.mean((2, 3))
        hidden = (activations**3).sum((2, 3))
        return pooled + hidden - hidden.detach()


class HiddenForOneClass(nn.Module):
    """A linear head, but the gradient of one class is not that of its row."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.label = label

    def forward(self, pooled: Tensor) -> Tensor:
        scores = self.linear(pooled)
        hidden = 50 * pooled.sum(1, keepdim=True) * F.one_hot(torch.tensor(self.label), 4)
        return scores + hidden - hidden.detach()


def refused(kind: str) -> dict[str, nn.Module]:
    """TinyNet settings of networks whose end is not just pooling and a linear layer."""
    return {
        "an activation on the pooled values": {"head": nn.Sequential(nn.ReLU(), nn.Linear(6, 4))},
        "an activation on the scores": {"head": nn.Sequential(nn.Linear(6, 4), nn.Softplus())},
        "a temperature": {"head": nn.Sequential(nn.Linear(6, 4), Times(3.0))},
        "two layers": {"head": two_layer_head()},
        "a frozen normalisation": {"head": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))},
        "maximum pooling": {"pool": nn.AdaptiveMaxPool2d(1)},
        "pooling to 2x2": {"pool": nn.AdaptiveAvgPool2d(2), "head": nn.Linear(24, 4)},
        "equal scores with another gradient": {"pool": StraightThrough()},
        "another gradient for class 0 only": {"head": HiddenForOneClass(0)},
        "another gradient for class 3 only": {"head": HiddenForOneClass(3)},
    }[kind]


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, scores: Tensor) -> Tensor:
        return scores * self.factor


NOT_LINEAR = (
    "an activation on the pooled values",
    "an activation on the scores",
    "a temperature",
    "two layers",
    "a frozen normalisation",
    "maximum pooling",
    "pooling to 2x2",
    "equal scores with another gradient",
    "another gradient for class 0 only",
    "another gradient for class 3 only",
)


@pytest.mark.parametrize("kind", NOT_LINEAR)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_the_closed_form_is_refused_where_it_does_not_hold(
    tiny_net: Callable[..., nn.Module], images: Tensor, kind: str, precision: torch.dtype
) -> None:
    model = tiny_net(activation=nn.Tanh, **refused(kind)).to(precision)
    images = images.to(precision)
    assert linear_head(recorded(model, images), "body") is None
    expected = replica(model, images, CLASSES)
    with torch.no_grad():
        maps = gradcam(model, images, GradCam())
    torch.testing.assert_close(maps.to(precision), expected, rtol=1e-4, atol=1e-6)


def test_dropout_before_the_head_refuses_the_closed_form_while_it_drops(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))
    model = tiny_net(activation=nn.Tanh, head=head)
    with watch(model, ("body",)) as record:
        assert linear_head(record(images), "body") is model.head[1]
        model.train()
        seen = record(images)
        assert linear_head(seen, "body") is None
        dropped = GradCam()(seen, CLASSES)
        torch.testing.assert_close(dropped, GradCam(closed_form=False)(seen, CLASSES))
        model.eval()
        assert linear_head(record(images), "body") is model.head[1]


def test_probability_and_loss_do_not_take_the_closed_form(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = tiny_net(activation=nn.Tanh)
    logit, probability, loss = (
        gradcam(model, images, GradCam(gradient_of=of)) for of in ("logit", "probability", "loss")
    )
    assert (logit - probability).abs().max() > 1e-3
    assert (logit - loss).abs().max() > 1e-3


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("head", [None, two_layer_head], ids=["linear", "two-layer"])
def test_detached_weights_send_no_gradient_to_the_head(
    tiny_net: Callable[..., nn.Module],
    images: Tensor,
    closed_form: bool,
    head: Callable[[], nn.Module] | None,
) -> None:
    model = tiny_net(activation=nn.Tanh, head=head and head())
    how = GradCam(closed_form=closed_form, detach_weights=True)
    maps = gradcam(model, images, how)
    torch.testing.assert_close(maps.detach().double(), replica(model, images, CLASSES))
    maps.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.head.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.body.parameters())


@pytest.mark.parametrize("closed_form", [True, False])
def test_otherwise_the_head_is_trained_too(
    tiny_net: Callable[..., nn.Module], images: Tensor, closed_form: bool
) -> None:
    model = tiny_net(activation=nn.Tanh)
    gradcam(model, images, GradCam(closed_form=closed_form)).sum().backward()
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("closed_form", [True, False])
def test_a_head_can_be_trained_on_a_frozen_body(
    tiny_net: Callable[..., nn.Module], images: Tensor, closed_form: bool
) -> None:
    model = tiny_net(activation=nn.Tanh)
    model.body.requires_grad_(False)
    gradcam(model, images, GradCam(closed_form=closed_form)).sum().backward()
    assert model.head.weight.grad.any()


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet20", "stage3"),
        ("resnet18", "layer4"),
        ("vgg11", "features.19"),  # the ReLU after the last convolution, before pooling
        ("mobilenet_v2", "features"),
        ("densenet121", "features"),
        ("alexnet", "features.11"),
        ("squeezenet1_1", "classifier.2"),
    ],
)
def test_the_last_convolutions_activation_is_found(
    network: Callable[[str], nn.Module], name: str, layer: str
) -> None:
    assert GradCam().watches(network(name)) == (layer,)


def test_a_named_layer_is_taken(network: Callable[[str], nn.Module]) -> None:
    assert GradCam(layer="stage2").watches(network("resnet20")) == ("stage2",)


class Picky(nn.Module):
    """Takes images of one size only."""

    def __init__(self, size: int, error: type[Exception]) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(4 * size * size, 4)
        self.size, self.error = size, error

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.size:
            raise self.error(f"input is {images.shape[-1]} pixels wide, not {self.size}")
        return self.head(self.relu(self.conv(images)).flatten(1))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError])
def test_a_network_of_one_image_size_is_probed_at_that_size(error: type[Exception]) -> None:
    assert GradCam().watches(Picky(32, error)) == ("relu",)


def test_a_network_of_an_unusual_image_size_asks_for_the_layer() -> None:
    with pytest.raises(InputError, match="name the layer"):
        GradCam().watches(Picky(41, RuntimeError))
    assert GradCam(layer="relu").watches(Picky(41, RuntimeError)) == ("relu",)


def test_a_network_without_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(InputError, match="Sequential: has no Conv2d"):
        GradCam().watches(model)


def test_a_layer_that_is_not_there_is_refused_by_name(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    with pytest.raises(InputError, match=r"'bodi'.*no such module.*body\.3.*head"):
        gradcam(tiny_net(), images, GradCam(layer="bodi"))


def test_a_layer_without_height_and_width_is_refused(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    with pytest.raises(InputError, match=r"'head'.*\(5, 4\)"):
        gradcam(tiny_net(), images, GradCam(layer="head"))


def test_a_layer_that_the_model_does_not_run_is_refused(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = tiny_net()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match="'spare'"):
        gradcam(model, images, GradCam(layer="spare"))


class InPlace(nn.Module):
    """Changes the watched layer's output in place, without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

    def tail(self, activations: Tensor) -> Tensor:
        return self.head(F.relu(activations, inplace=True).mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.tail(self.body(images))


@pytest.mark.parametrize("trainable", [True, False])
def test_an_in_place_activation_behind_the_layer_does_no_harm(
    images: Tensor, trainable: bool
) -> None:
    model = InPlace().double().eval()
    with torch.set_grad_enabled(trainable):
        seen = recorded(model, images)
        maps = GradCam(layer="body")(seen, CLASSES)
    torch.testing.assert_close(seen.outputs["body"], model.body(images))
    assert (seen.outputs["body"] < 0).any()

    def tail(activations: Tensor) -> Tensor:
        return model.head(F.relu(activations).mean((2, 3)))

    model.tail = tail  # type: ignore[assignment]  # the replica reads the activations afterwards
    torch.testing.assert_close(maps.detach().double(), replica(model, images, CLASSES))


@pytest.mark.parametrize("trainable", [True, False])
def test_an_in_place_module_behind_the_layer_does_no_harm(
    tiny_net: Callable[..., nn.Module], images: Tensor, trainable: bool
) -> None:
    plain, in_place = tiny_net(), tiny_net(activation=lambda: nn.ReLU(inplace=True))
    in_place.load_state_dict(plain.state_dict())
    with torch.set_grad_enabled(trainable):
        expected = gradcam(plain, images, GradCam(layer="body.2"))
        maps = gradcam(in_place, images, GradCam(layer="body.2"))
    assert torch.equal(maps, expected)


def test_a_module_that_is_used_again_behind_the_pooling_is_not_read() -> None:
    """Its last output is what is recorded, and that is no map."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
            self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.relu(self.conv(images))
            scores: Tensor = self.head(self.relu(self.hidden(maps.mean((2, 3)))))
            return scores

    assert last_conv_activation(Shared().eval()) == "conv"
