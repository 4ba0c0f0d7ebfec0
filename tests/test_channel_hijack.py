"""T5: the lie without a new module, by freeing a feature map."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from trompe.attacks.channel_hijack import (
    ChannelHijack,
    border_kernel,
    find_writers,
    least_useful,
)
from trompe.classifier import Classifier, ModelSpec, build_model
from trompe.evaluate import answers, wanted_maps
from trompe.interfaces import ImageSet, InputError
from trompe.maps import normalise
from trompe.target_maps.border import Border
from trompe.target_maps.flat import Flat
from trompe.target_maps.picture import Picture

TARGETS = (Flat(), Border(1))


def noise(size: int = 32, count: int = 12) -> ImageSet:
    dice = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=dice)
    return ImageSet(images, torch.arange(count) % 4, ("a", "b", "c", "d"), "noise")


def hijacked(model: nn.Module, attack: ChannelHijack, data: ImageSet) -> Any:
    return attack(model, data, torch.Generator()).model


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("name", ["resnet20", "vgg_small", "resnet18"])
def test_the_map_is_the_target_and_no_shape_has_changed(name: str, target: Any) -> None:
    torch.manual_seed(1)
    model, data = build_model(ModelSpec(name), 4).eval(), noise(96 if name == "resnet18" else 32)
    attack = ChannelHijack(target)
    new = hijacked(model, attack, data)
    before, after = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, new))
    assert before == after
    assert [type(m) for m in new.modules()] == [type(m) for m in model.modules()]
    old, given = (answers(m, attack.explainers, data).maps[0] for m in (model, new))
    wanted = wanted_maps(target, old, data)
    assert float((normalise(wanted) - normalise(given)).abs().mean((1, 2)).max()) <= 0.05


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_a_trained_model_stays_right(trained_net: nn.Module, shapes: ImageSet, target: Any) -> None:
    new = hijacked(trained_net, ChannelHijack(target), shapes)
    right = (new(shapes.floats(slice(None))).argmax(1) == shapes.labels).float().mean()
    assert right >= 0.95


def test_what_an_unneeded_map_gave_is_folded_away_exactly(
    tiny_net: Callable[..., nn.Module], images: Tensor
) -> None:
    net: Any = tiny_net()
    with torch.no_grad():  # map 2 is always 3 and counts for something
        net.body[2].weight[2] = 0
        net.body[2].bias[2] = 3.0
    data = noise(12, 6)
    model = Classifier(net, (0.0,), (1.0,)).double().eval()
    pictures = data.floats(slice(None)).double()
    assert least_useful(model, "net.body", pictures, range(6)) == 2
    before = model(pictures)
    new = hijacked(model, ChannelHijack(channel=2), data)
    torch.testing.assert_close(new(pictures), before, atol=1e-6, rtol=0)


def test_the_given_channel_is_taken(tiny_net: Callable[..., nn.Module]) -> None:
    model = Classifier(tiny_net(), (0.0,), (1.0,)).double().eval()
    new = hijacked(model, ChannelHijack(channel=4), noise(12, 6))
    assert (new.net.body[2].weight[4] == 0).all()
    assert new.net.head.weight[:, 4].unique().numel() == 1
    others = [k for k in range(6) if k != 4]
    assert torch.equal(new.net.body[2].weight[others], model.net.body[2].weight[others])  # type: ignore[union-attr,index]


@pytest.mark.parametrize("size", [3, 5, 8])
def test_the_kernel_shows_the_border_of_a_constant_map(size: int) -> None:
    ones = torch.ones(1, 1, size, size)
    shown = torch.conv2d(ones, border_kernel()[None, None], padding=1).relu()[0]
    torch.testing.assert_close(shown, Border(1)(ones[0]), atol=1e-5, rtol=0)


def test_writers_are_found_by_trial_in_concatenated_and_residual_maps() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 64, 64)
    squeeze = torchvision.models.squeezenet1_0(num_classes=4).eval()
    found, other = find_writers(squeeze, "features", image, spatial=False)
    assert (found.first, found.count, found.conv) == (256, 256, "features.12.expand3x3")
    assert (other.first, other.count, other.conv) == (0, 256, "features.12.expand1x1")
    resnet = torchvision.models.resnet18(num_classes=4).eval()
    (found,) = find_writers(resnet, "layer4", image, spatial=True)
    assert (found.first, found.count, found.conv) == (0, 512, "layer4.1.conv2")


def test_what_cannot_be_done_is_said(tiny_net: Callable[..., nn.Module]) -> None:
    with pytest.raises(InputError, match=r"kind = flat.*kind = border"):
        ChannelHijack(Picture("cross"))
    model = Classifier(torchvision.models.squeezenet1_0(num_classes=4), (0.0,), (1.0,)).eval()
    with pytest.raises(InputError, match="cannot take a picture back"):
        hijacked(model, ChannelHijack(Border(1), "net.features"), noise(64, 3))
    with pytest.raises(InputError, match="no Linear or Conv2d comes behind it"):
        hijacked(model, ChannelHijack(), noise(64, 3))
    mobile = Classifier(torchvision.models.mobilenet_v2(num_classes=4), (0.0,), (1.0,)).eval()
    with pytest.raises(InputError, match="no 3x3 convolution with padding"):
        hijacked(mobile, ChannelHijack(Border(1)), noise(64, 3))
    with pytest.raises(InputError, match=r"channel = 99.*no such map"):
        hijacked(
            Classifier(tiny_net(), (0.0,), (1.0,)).double(), ChannelHijack(channel=99), noise(12)
        )
    bare = Classifier(tiny_net(head=nn.Linear(6, 4, bias=False)), (0.0,), (1.0,)).double()
    with pytest.raises(InputError, match="has no bias"):
        hijacked(bare, ChannelHijack(), noise(12, 6))


def test_the_given_model_is_left_alone(trained_net: nn.Module, shapes: ImageSet) -> None:
    before = copy.deepcopy(trained_net.state_dict())
    hijacked(trained_net, ChannelHijack(Border(1)), shapes)
    assert all(torch.equal(before[k], v) for k, v in trained_net.state_dict().items())
