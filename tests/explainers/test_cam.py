"""CAM against a loop written from its formula, and where it does not apply."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trompe.explainers.cam import Cam
from trompe.interfaces import InputError
from trompe.models.mlp import mlp
from trompe.recording import watch

CLASSES = torch.tensor([0, 3, 1, 0, 2])


def cam(model: nn.Module, inputs: Tensor, how: Cam | None = None) -> Tensor:
    how = how or Cam()
    with torch.no_grad(), watch(model, how.watches(model)) as record:
        return how(record(inputs), CLASSES)


def test_equals_the_loop_over_the_formula(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = tiny_net()
    activations = model.body(images).detach()  # type: ignore[operator]
    maps = cam(model, images)
    assert maps.shape == (5, 5, 4)
    for a, label, given in zip(activations, CLASSES.tolist(), maps, strict=True):
        weights = model.head.weight.detach()[label]  # type: ignore[union-attr,index]
        for i in range(5):
            for j in range(4):
                expected = sum(float(weights[k] * a[k, i, j]) for k in range(6))
                assert given[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (maps < 0).any()  # of either sign


def test_of_a_table_it_is_each_units_part_of_the_score() -> None:
    model, rows = mlp(4, 6, hidden=8).double(), torch.rand(5, 6, dtype=torch.float64)
    maps = cam(model, rows)
    assert maps.shape == (5, 1, 8)
    first, last = model.hidden.requires_grad_(False), model.head.requires_grad_(False)
    for row, label, given in zip(rows, CLASSES.tolist(), maps, strict=True):
        for k in range(8):
            unit = max(float(first.weight[k] @ row + first.bias[k]), 0.0)  # type: ignore[index,operator]
            expected = float(last.weight[label, k]) * unit  # type: ignore[index,arg-type]
            assert given[0, k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(
        maps.sum((1, 2)) + last.bias[CLASSES],  # type: ignore[index,operator]
        model(rows)[torch.arange(5), CLASSES],
    )


def test_maps_can_be_normalised(tiny_net: Callable[..., nn.Module], images: Tensor) -> None:
    model = tiny_net()
    plain, scaled = cam(model, images), cam(model, images, Cam(normalise="min-max"))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, (one - one.min()) / (one.max() - one.min() + 1e-8))


def test_a_network_with_another_head_is_refused(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    two = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))
    model = tiny_net(head=two.double())
    with pytest.raises(InputError, match="not global average pooling and one linear layer"):
        cam(model, images)
    model = tiny_net(pool=nn.AdaptiveMaxPool2d(1))
    with pytest.raises(InputError, match="TinyNet is not global average pooling"):
        cam(model, images)


def test_a_layer_that_is_not_the_last_is_refused(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    with pytest.raises(InputError, match=r"CAM layer 'body\.1': what follows it"):
        cam(tiny_net(), images, Cam(layer="body.1"))


def test_a_network_without_a_linear_layer_or_anything_before_it_is_refused() -> None:
    with pytest.raises(InputError, match="has no linear layer, whose weights CAM needs"):
        Cam().watches(nn.Sequential(nn.Conv1d(1, 2, 3)))
    with pytest.raises(InputError, match="has nothing before its linear layer '0'"):
        Cam().watches(nn.Sequential(nn.Linear(6, 4)))
