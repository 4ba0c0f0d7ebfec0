"""VisualBackProp against a net computed by hand, and a replica that adds up one pixel at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trompe.explainers._layers import stages
from trompe.explainers.visual_backprop import VisualBackProp
from trompe.interfaces import InputError
from trompe.recording import watch

ANY = torch.zeros(1, dtype=torch.int64)


def maps_of(explainer: VisualBackProp, model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), watch(model, explainer.watches(model)) as record:
        return explainer(record(images), ANY.expand(len(images)))


def test_a_net_computed_by_hand() -> None:
    sums, blocks = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 1, 2, stride=2, bias=False)
    nn.init.ones_(sums.weight)
    nn.init.ones_(blocks.weight)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    net = nn.Sequential(sums, nn.ReLU(), blocks, nn.ReLU(), *head).eval()
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0] = torch.tensor([[1, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1.0]])
    # The second stage is [[1, 2], [3, 1]]; each of its values fills a 2x2 block, times the first.
    expected = torch.tensor([[1, 0, 4, 0], [0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 1.0]]) / 9
    torch.testing.assert_close(maps_of(VisualBackProp(), net, image)[0], expected)
    pooled = maps_of(VisualBackProp(pool=2), net, image)[0]  # block means, the largest of them 1
    expected = (torch.tensor([[1, 4], [9, 1.0]]) - 1) / 8
    torch.testing.assert_close(pooled, expected)
    raw = maps_of(VisualBackProp(pool=2, normalise="max"), net, image)[0]
    torch.testing.assert_close(raw / raw.max(), torch.tensor([[1, 4], [9, 1.0]]) / 9)


# --- replica --------------------------------------------------------------------------------------


def spread(
    maps: np.ndarray, kernel: int, stride: int, padding: int, size: tuple[int, ...]
) -> np.ndarray:
    """Each value is added to all positions of `size` from which it could have been made."""
    out = np.zeros(size)
    for (i, j), value in np.ndenumerate(maps):
        for a in range(kernel):
            for b in range(kernel):
                y, x = i * stride - padding + a, j * stride - padding + b
                if 0 <= y < size[0] and 0 <= x < size[1]:
                    out[y, x] += value
    return out


def to_one(maps: np.ndarray) -> np.ndarray:
    return (maps - maps.min()) / (maps.max() - maps.min())


def test_a_vgg_style_net_equals_the_replica() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
        *(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(5, 6, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    net = net.double().eval()
    images = torch.rand(2, 3, 14, 10, dtype=torch.float64)
    explainer = VisualBackProp()
    assert explainer.watches(net) == ("2", "5", "7")
    given = maps_of(explainer, net, images).numpy()
    with torch.no_grad():
        first, second, third = (net[:n](images).mean(1).numpy() for n in (3, 6, 8))
    for row in range(2):
        maps = spread(third[row], 3, 2, 0, second[row].shape) * second[row]
        maps = spread(maps, 3, 1, 1, (7, 5))  # the convolution, then the pooling before it
        maps = spread(maps, 2, 2, 0, first[row].shape) * first[row]
        np.testing.assert_allclose(given[row], to_one(spread(maps, 3, 1, 1, (14, 10))), atol=1e-7)


def test_resnet20_equals_the_replica(network: Callable[[str], nn.Module]) -> None:
    net, images = network("resnet20").double(), torch.rand(1, 3, 12, 12, dtype=torch.float64)
    explainer = VisualBackProp()
    layers = explainer.watches(net)
    assert layers == ("relu", *(f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3)))
    given = maps_of(explainer, net, images)[0].numpy()
    with torch.no_grad(), watch(net, layers) as record:
        outputs = record(images).outputs
    means = [outputs[layer][0].mean(0).detach().numpy() for layer in layers]
    maps = means[-1]
    for mean in reversed(means[:-1]):
        if mean.shape != maps.shape:  # the first block of a stage halves the image
            maps = spread(maps, 3, 2, 1, mean.shape)
        maps = maps * mean
    np.testing.assert_allclose(given, to_one(spread(maps, 3, 1, 1, (12, 12))), atol=1e-6)


def test_training_through_it_leaves_gradients_in_the_activations_memory_format(
    network: Callable[[str], nn.Module],
) -> None:
    net = network("resnet20").float().to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    explainer, kept = VisualBackProp(), []
    with watch(net, explainer.watches(net)) as record:
        seen = record(images)
        for output in seen.outputs.values():
            output.register_hook(kept.append)
        (explainer(seen, ANY.expand(2)).square().mean() + seen.scores.square().mean()).backward()
    others = kept[1:]  # the first one to come, of the last stage, is as the pooling made it
    assert len(others) == len(seen.outputs) - 1
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in others)


# --- which layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("vgg11", 8, "features.1", "features.19"),
        ("resnet18", 9, "relu", "layer4.1"),
        ("resnet50", 17, "relu", "layer4.2"),
        ("mobilenet_v2", 35, "features.0.2", "features.18.2"),
        ("squeezenet1_0", 10, "features.1", "classifier.2"),
    ],
)
def test_stages_of_known_architectures(
    network: Callable[[str], nn.Module], name: str, count: int, first: str, last: str
) -> None:
    found = stages(network(name))
    assert (len(found), found[0].layer, found[-1].layer) == (count, first, last)


def test_layers_can_be_named(network: Callable[[str], nn.Module]) -> None:
    net = network("resnet20").float()
    explainer = VisualBackProp(("stage1.2", "stage2.2"))
    assert explainer.watches(net) == ("stage1.2", "stage2.2")
    assert maps_of(explainer, net, torch.rand(2, 3, 12, 16)).shape == (2, 12, 16)


def test_a_layer_that_is_not_run_is_refused(network: Callable[[str], nn.Module]) -> None:
    with pytest.raises(InputError, match=r"stage9.*stage3"):
        VisualBackProp(("stage1.0", "stage9")).watches(network("resnet20"))


@pytest.mark.parametrize("layer", ["fc", "stage1.0.relu"])
def test_a_layer_without_maps_or_run_twice_is_refused(
    network: Callable[[str], nn.Module], layer: str
) -> None:
    with pytest.raises(InputError, match=rf"{layer}.*run once"):
        VisualBackProp(("stage1.0", layer)).watches(network("resnet20"))


def test_gates_are_no_stages(network: Callable[[str], nn.Module]) -> None:
    net = network("mobilenet_v3_small")
    layers = VisualBackProp().watches(net)
    shapes: dict[str, torch.Size] = {}
    for layer in layers:
        net.get_submodule(layer).register_forward_hook(
            lambda m, i, output, layer=layer: shapes.update({layer: output.shape})
        )
    net(torch.rand(1, 3, 64, 64))
    assert len(layers) > 3
    assert all(shape[2] > 1 for shape in shapes.values())


def test_a_net_without_non_negative_activations_is_refused(
    tiny_net: Callable[..., nn.Module],
) -> None:
    with pytest.raises(InputError, match="name the layers"):
        VisualBackProp().watches(tiny_net(activation=nn.Tanh))


def test_a_net_without_convolution_is_refused() -> None:
    with pytest.raises(InputError, match="no Conv2d"):
        VisualBackProp().watches(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))


def test_an_image_without_activations_has_an_empty_map() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).eval()
    nn.init.zeros_(net[0].bias)
    maps = maps_of(VisualBackProp(pool=2), net, torch.zeros(1, 3, 8, 8))
    assert torch.equal(maps, torch.zeros(1, 4, 4))


def test_means_below_0_of_layers_that_were_named_give_finite_maps() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    net = nn.Sequential(*layers, *head).eval()
    for layer in (net[0], net[2]):
        nn.init.constant_(layer.bias, -3.0)
    maps = maps_of(VisualBackProp(("1", "3")), net, torch.rand(2, 3, 6, 6))
    assert maps.isfinite().all()
    assert (maps.amax((1, 2)) == 1).all()


@pytest.mark.parametrize("pool", [0, -1])
def test_a_pool_below_one_is_refused(pool: int) -> None:
    with pytest.raises(InputError, match=f"pool = {pool}"):
        VisualBackProp(pool=pool)
