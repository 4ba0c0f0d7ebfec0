"""The networks that torchvision does not have."""

import pytest
import torch

from trompe import catalog
from trompe.classifier import ModelSpec, build_model
from trompe.explainers.gradcam import GradCam
from trompe.explainers.visual_backprop import VisualBackProp

# parameters, the layer that Grad-CAM finds, its channels
KNOWN = {"resnet20": (269_722, "net.stage3", 64), "vgg_small": (814_570, "net.features", 128)}

every_model = pytest.mark.parametrize("name", catalog.names("models"))


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
