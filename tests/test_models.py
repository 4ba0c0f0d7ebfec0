"""The networks that torchvision does not have."""

import inspect

import pytest
import torch

from trompe import catalog
from trompe.classifier import ModelSpec, build_model
from trompe.explainers.cam import Cam
from trompe.explainers.gradcam import GradCam
from trompe.explainers.visual_backprop import VisualBackProp
from trompe.models.mlp import mlp
from trompe.recording import watch

# parameters, the layer that Grad-CAM finds, its channels
KNOWN = {"resnet20": (269_722, "net.stage3", 64), "vgg_small": (814_570, "net.features", 128)}


def of_tables(name: str) -> bool:
    return "num_features" in inspect.signature(catalog.find("models", name)).parameters


every_model = pytest.mark.parametrize(
    "name", [name for name in catalog.names("models") if not of_tables(name)]
)


@every_model
@pytest.mark.parametrize("size", [32, 40, 48])
def test_scores_for_images_of_several_sizes(name: str, size: int) -> None:
    model = build_model(ModelSpec(name), 10).eval()
    assert model(torch.rand(2, 3, size, size)).shape == (2, 10)


@every_model
def test_size_and_last_layer_are_as_documented(name: str) -> None:
    parameters, layer, channels = KNOWN[name]
    model = build_model(ModelSpec(name), 10).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert GradCam().watches(model) == (layer,)
    shapes = {}
    module = model.get_submodule(layer)
    module.register_forward_hook(lambda m, i, output: shapes.update(last=output.shape))
    model(torch.rand(1, 3, 40, 40))
    assert shapes["last"] == (1, channels, 10, 10)


@every_model
def test_visual_backprop_finds_its_stages(name: str) -> None:
    model = build_model(ModelSpec(name), 10).eval()
    assert len(VisualBackProp().watches(model)) == {"resnet20": 10, "vgg_small": 6}[name]


@pytest.mark.parametrize("name", [name for name in catalog.names("models") if of_tables(name)])
def test_networks_of_tables_end_in_relu_units_and_a_linear_layer(name: str) -> None:
    model = catalog.find("models", name)(num_classes=3, num_features=5, hidden=7)
    assert model(torch.rand(2, 5)).shape == (2, 3)
    assert Cam().watches(model) == ("activation",)
    with watch(model, ["activation"]) as record:
        seen = record(torch.rand(2, 5))
    units = seen.outputs["activation"]
    assert units.shape == (2, 7)
    assert bool((units >= 0).all())
    torch.testing.assert_close(seen.scores, model.head(units))


def test_mlp_is_two_layers_with_relu_between() -> None:
    model = mlp(3, 5, hidden=7).requires_grad_(False)
    rows = torch.rand(2, 5)
    (first, bias), (second, last) = (
        (layer.weight, layer.bias)
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    assert (first.shape, second.shape) == ((7, 5), (3, 7))
    for row, scores in zip(rows, model(rows), strict=True):
        units = [max(float(first[i] @ row + bias[i]), 0.0) for i in range(7)]
        expected = [sum(second[c, i] * units[i] for i in range(7)) + last[c] for c in range(3)]
        torch.testing.assert_close(scores, torch.stack(expected))
