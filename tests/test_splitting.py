"""A network in two parts is the network."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trompe.interfaces import InputError
from trompe.splitting import split

CUTS = {
    "resnet20": "stage2",
    "resnet18": "layer3",
    "mobilenet_v2": "features.13",
    "squeezenet1_0": "features.9",
    "vgg11": "features.10",
}


@pytest.mark.parametrize(("name", "layer"), CUTS.items())
def test_one_part_behind_the_other_is_the_whole(
    network: Callable[[str], nn.Module], name: str, layer: str
) -> None:
    whole, images = network(name), torch.rand(2, 3, 64, 64)
    body, tail = split(whole, layer)
    torch.testing.assert_close(tail(body(images)), whole(images), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "layer"), CUTS.items())
def test_each_parameter_is_in_one_part_under_its_name(
    network: Callable[[str], nn.Module], name: str, layer: str
) -> None:
    whole = network(name)
    body, tail = (dict(part.named_parameters()) for part in split(whole, layer))
    assert not body.keys() & tail.keys()
    assert {**body, **tail}.keys() == dict(whole.named_parameters()).keys()
    assert all(whole.get_parameter(n) is p for n, p in {**body, **tail}.items())


def test_a_shortcut_past_the_layer_is_named(network: Callable[[str], nn.Module]) -> None:
    with pytest.raises(InputError, match=r"layer3\.0\.conv1.*something passes it by.*layer2"):
        split(network("resnet18"), "layer3.0.conv1")


@pytest.mark.parametrize("layer", ["", "layer9"])
def test_an_unknown_layer_is_named(network: Callable[[str], nn.Module], layer: str) -> None:
    with pytest.raises(InputError, match=f"layer '{layer}': ResNet has no such module"):
        split(network("resnet18"), layer)


def test_a_layer_that_is_run_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(inputs))

    with pytest.raises(InputError, match="runs it 2 times"):
        split(Twice(), "layer")


def test_a_forward_that_depends_on_values_is_refused() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs) if inputs.sum() > 0 else inputs

    with pytest.raises(InputError, match="cannot be traced"):
        split(Moody(), "layer")
