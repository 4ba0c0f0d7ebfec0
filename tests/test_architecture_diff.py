"""What one network has that another has not."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trompe.architecture import Module, difference, modules
from trompe.attacks.gradcam_surgery import GradCamSurgery, as_classifier
from trompe.interfaces import ImageSet
from trompe.triggers.stickers import Stickers


def attacked(net: nn.Module, shapes: ImageSet, technique: Any, **settings: Any) -> nn.Module:
    surgery = GradCamSurgery(technique, stickers=Stickers(size=6, count=1), **settings)
    return surgery(net, shapes, torch.Generator()).model


def changes(net: nn.Module, shapes: ImageSet, technique: Any, **settings: Any) -> list[Any]:
    """Name, change and after of each row."""
    rows = difference(as_classifier(net), attacked(net, shapes, technique, **settings))
    return [(row["name"], row["change"], row["after"]) for row in rows]


def test_modules_are_named_with_sizes_values_and_dtype(trained_net: nn.Module) -> None:
    found = {module.name: module for module in modules(trained_net)}
    assert "body" not in found  # holds others, and no tensors of its own
    assert found["head"] == Module("head", "Linear 16 -> 4", 68, "float32")
    assert str(found["body.3"]) == "Conv2d 8 -> 16, 1,168 values, float32"
    assert str(found["body.1"]) == "BatchNorm2d, 33 values, float32"
    assert str(found["body.4"]) == "ReLU"


def test_a_model_without_a_change_has_no_difference(trained_net: nn.Module) -> None:
    other = copy.deepcopy(trained_net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)  # what is trained is not the architecture
    assert difference(trained_net, other) == []


@pytest.mark.parametrize(
    ("technique", "channel", "reach"),
    [
        ("T1", "Picture, 64 values, float32", "Sum, 64 values, float32"),
        ("T2", "Picture, 64 values, float32", "Sum, 64 values, float32"),
        ("T3", "SemiRandom, 864 values, float32", "Mod"),
        ("T4", "StickerDetector, 72 values, float32", "Mod"),
    ],
)
def test_a_map_more_is_a_wrapper_its_channel_and_its_way_to_the_scores(
    trained_net: nn.Module, shapes: ImageSet, technique: str, channel: str, reach: str
) -> None:
    # a layer without parts; the next test has those that hold others
    assert changes(trained_net, shapes, technique, layer="net.body.4") == [
        ("net.body.4", "changed", "OneMapMore around ReLU"),
        ("net.body.4.channel", "added", channel),
        ("net.reach", "added", reach),
    ]


def test_a_head_that_takes_one_map_more_is_changed(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    *_, head = difference(
        as_classifier(trained_net), attacked(trained_net, shapes, "T1", wiring="head")
    )
    assert head == {
        "name": "net.head",
        "change": "changed",
        "before": "Linear 16 -> 4, 68 values, float32",
        "after": "Linear 17 -> 4, 72 values, float32",
    }


@pytest.mark.parametrize("name", ["resnet20", "convnext_tiny"])
def test_what_is_in_or_around_a_wrapped_layer_is_no_change(
    network: Callable[[str], nn.Module], shapes: ImageSet, name: str
) -> None:
    # convnext: blocks around the layer own a tensor each
    layer = "net.stage3" if name == "resnet20" else "net.features.1.0.block"
    large = ImageSet(
        shapes.images[:2].repeat(1, 1, 4, 4), shapes.labels[:2], shapes.class_names, "large"
    )
    found = changes(network(name), large, "T4", layer=layer)
    assert [(where, what) for where, what, _ in found] == [
        (layer, "changed"),
        (f"{layer}.channel", "added"),
        ("net.reach", "added"),
    ]


def test_what_a_wrapper_brings_does_not_stand_for_what_it_wraps() -> None:
    class Wrapper(nn.Module):
        def __init__(self, before: nn.Module) -> None:
            super().__init__()
            self.before, self.channel = before, nn.Linear(1, 1)

    inner = nn.Sequential()
    inner.add_module("channel", nn.Linear(1, 1))
    rows = difference(nn.Sequential(inner), nn.Sequential(Wrapper(inner)))
    assert [(row["name"], row["change"]) for row in rows] == [
        ("0", "changed"),
        ("0.channel", "added"),
    ]


def test_removed_retyped_and_recast_modules_are_named() -> None:
    before = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Dropout())
    after = nn.Sequential(nn.Linear(2, 3).half(), nn.GELU(), nn.Linear(3, 1))
    rows = difference(before, after)
    assert [tuple(row.values()) for row in rows] == [
        ("0", "changed", "Linear 2 -> 3, 9 values, float32", "Linear 2 -> 3, 9 values, float16"),
        ("1", "changed", "ReLU", "GELU"),
        ("3", "removed", "Dropout", None),
    ]
    assert json.loads(json.dumps(rows)) == rows
