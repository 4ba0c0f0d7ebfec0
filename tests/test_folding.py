"""Folding frozen BatchNorm changes speed, not values."""

import pytest
import torch
from torch import nn

from trompe.classifier import ModelSpec, build_model
from trompe.folding import folded_statistics
from trompe.models.resnet20 import resnet20


def worn(model: nn.Module) -> nn.Module:
    """In eval mode and float64, its BatchNorm statistics and affine parts far from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    model = model.eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data = torch.rand(tensor.shape, generator=generator).double() + 0.5
    return model


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg11_bn", "mobilenet_v2"])
def test_scores_and_gradients_are_those_of_the_unfolded_model(name: str) -> None:
    torch.manual_seed(0)
    model = worn(build_model(ModelSpec(name), 5))
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    scores = model(images)
    expected = torch.autograd.grad(scores.square().sum(), list(model.parameters()))
    with folded_statistics(model, images) as count:
        assert count == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        folded = model(images)
        found = torch.autograd.grad(folded.square().sum(), list(model.parameters()))
    torch.testing.assert_close(folded, scores, rtol=1e-10, atol=1e-10)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * float(other.abs().max()))


def test_the_model_is_restored_also_after_an_exception() -> None:
    model = worn(resnet20(3))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    with pytest.raises(KeyError), folded_statistics(model, images):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(images), before)


def test_layers_that_someone_reads_are_kept() -> None:
    model = worn(resnet20(3))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with folded_statistics(model, images, keep=("conv1", "stage2.0.bn1")) as count:
        assert count == 17


class Twice(nn.Module):
    """What a convolution gives is normalised, and also used as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return (self.norm(x) + 3 * x).mean((2, 3))


def test_a_model_that_folding_would_change_is_left_alone() -> None:
    model = worn(Twice())
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    with folded_statistics(model, images) as count:
        assert count == 0
        assert torch.equal(model(images), before)
