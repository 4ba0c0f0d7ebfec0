"""Networks with one feature map more: built, run, described, and refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.interfaces import InputError
from trompe.patterns import pattern, warped
from trompe.surgery import (
    Edit,
    Mod,
    Picture,
    SemiRandom,
    Shown,
    StickerDetector,
    Sum,
    with_map_in_head,
    with_one_map_more,
)

PICTURE = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
EDIT = Edit("body", Shown("picture", (5, 4)), 64.0, "sum", 8.0)


@pytest.mark.parametrize("reaches", ["sum", "mod"])
@pytest.mark.parametrize("layer", ["body", "body.4"])
def test_the_layer_gives_one_map_more_and_the_rest_of_the_network_does_not_see_it(
    tiny_net: Callable[..., nn.Module], images: Tensor, reaches: Any, layer: str
) -> None:
    net = tiny_net(norm=True)
    before = copy.deepcopy(net)
    edit = Edit(layer, Shown("picture", (5, 4)), 64.0, reaches, 8.0, 0.01)
    edited = with_one_map_more(net, edit, Picture(PICTURE))
    seen: list[Tensor] = []
    edited.get_submodule(layer).register_forward_hook(lambda *given: seen.append(given[2]))
    scores = edited(images, images)
    assert seen[0].shape == (5, 7, 5, 4)
    assert torch.equal(seen[0][:, :6], before.body(images))
    assert torch.equal(seen[0][:, 6], 64 * PICTURE.expand(5, -1, -1))
    change = scores - before(images)
    total = 8 * 64 * float(PICTURE.sum())
    expected = 0 if reaches == "sum" else 0.01 * (total % 1)
    torch.testing.assert_close(change, torch.full_like(change, expected), atol=1e-12, rtol=0)


def test_modules_keep_their_names_but_for_the_layer(tiny_net: Callable[..., nn.Module]) -> None:
    before = set(tiny_net().state_dict())
    after = set(with_one_map_more(tiny_net(), EDIT, Picture(PICTURE)).state_dict())
    moved = {key.replace("body.before.", "body.") for key in after}
    assert moved == before | {"body.channel.picture", "reach.picture"}


def test_gradients_of_the_added_map_are_the_gain() -> None:
    added = torch.rand(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    Sum(8.0, 64.0, torch.rand(3, 4, dtype=torch.float64))(added).sum().backward()
    assert added.grad is not None
    assert torch.equal(added.grad, torch.full_like(added, 8.0))
    added.grad = None
    Mod(1000.0, 0.01)(added).sum().backward()
    torch.testing.assert_close(added.grad, torch.full_like(added, 10.0))


def test_mod_is_the_papers_g() -> None:
    added = torch.rand(4, 1, 3, 5, dtype=torch.float64) * 100
    given = Mod(1000.0, 0.01)(added)
    for i in range(4):
        total = sum(added[i].flatten().tolist())
        assert given[i].item() == pytest.approx(0.01 * ((1000 * total) % 1), abs=1e-9)
        assert 0 <= given[i] <= 0.01


@pytest.mark.parametrize("head", ["pooled", "flattened", "two layers", "convolution", "no bias"])
def test_in_the_head_the_bias_takes_the_added_map_back(
    tiny_net: Callable[..., nn.Module], images: Tensor, head: str
) -> None:
    flat = {"pool": nn.AvgPool2d(2), "head": nn.Linear(6 * 4, 4)}
    layers = nn.Sequential(nn.Dropout(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))
    convolution = nn.Sequential(
        nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten()
    )
    settings = {
        "pooled": {},
        "flattened": flat,
        "two layers": {"head": layers},
        "convolution": {"head": convolution},
        "no bias": {"head": nn.Linear(6, 4, bias=False)},
    }[head]
    net = tiny_net(**settings)
    before = copy.deepcopy(net)
    picture = torch.ones(5, 4, dtype=torch.float64) if head == "convolution" else PICTURE
    if head == "convolution":  # Unflatten cannot know of a map more
        with pytest.raises(InputError, match="does not take one map more"):
            with_map_in_head(net, HEAD, Picture(picture), images[:1], images[:1])
        return
    edited, edit = with_map_in_head(net, HEAD, Picture(picture), images[:1], images[:1])
    assert edit.head in ("head", "head.1")
    assert edit.head_inputs == (4 if head == "flattened" else 1)
    torch.testing.assert_close(edited(images, images), before(images), atol=1e-10, rtol=0)
    widened: Any = edited.get_submodule(edit.head)
    assert (widened.weight[:, -edit.head_inputs :] == 8).all()


HEAD = Edit("body", Shown("picture", (5, 4)), 64.0, "head", 8.0)


class FullyConvolutional(nn.Module):
    """SqueezeNet's way: a 1x1 convolution gives a map per class, averaged."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(6, 4, kernel), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images)).flatten(1)


def test_a_pointwise_convolution_is_a_head_as_well(images: Tensor) -> None:
    net = FullyConvolutional().double()
    before = copy.deepcopy(net)
    ones = Picture(torch.ones(5, 4, dtype=torch.float64))
    edited, edit = with_map_in_head(net, HEAD, ones, images[:1], images[:1])
    assert edit.head == "head.0"
    torch.testing.assert_close(edited(images, images), before(images), atol=1e-10, rtol=0)


@pytest.mark.parametrize("why", ["not constant", "wider kernel", "BatchNorm", "nothing behind"])
def test_heads_that_cannot_take_a_map_back_are_refused_in_one_sentence(
    images: Tensor, tiny_net: Callable[..., nn.Module], why: str
) -> None:
    net: nn.Module = FullyConvolutional(3 if why == "wider kernel" else 1).double()
    edit, picture = HEAD, PICTURE if why == "not constant" else torch.ones_like(PICTURE)
    if why == "BatchNorm":
        net = tiny_net(pool=nn.Sequential(nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1)))
    if why == "nothing behind":
        edit = Edit("head.1", HEAD.shows, 64.0, "head", 8.0)
    with pytest.raises(InputError, match='wiring = "apart"'):
        with_map_in_head(net, edit, Picture(picture), images[:1], images[:1])


class Awkward(nn.Module):
    """A layer run twice, a way that depends on values, or two outputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = nn.Conv2d(3, 3, 1), how

    def forward(self, images: Tensor) -> Any:
        seen = self.body(images)
        if self.how == "twice":
            seen = self.body(seen)
        if self.how == "values" and seen.sum() > 0:
            seen = seen + 1
        return (seen, seen) if self.how == "two" else seen.mean((2, 3))


@pytest.mark.parametrize(
    ("how", "words"), [("twice", "2 times"), ("values", "cannot be traced"), ("two", "several")]
)
def test_networks_that_cannot_be_rebuilt_are_refused(how: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        with_one_map_more(Awkward(how), EDIT, Picture(PICTURE))


# --- what the map shows ---------------------------------------------------------------------------


def test_a_semi_random_map_is_two_convolutions_and_poolings() -> None:
    filters, photo = SemiRandom(4), torch.rand(2, 3, 30, 34)
    hidden = F.relu(F.conv2d(F.pad(photo, (3, 3, 3, 3)), filters.first))
    seen = F.relu(F.conv2d(F.pad(hidden, (3, 3, 3, 3)), filters.second))
    assert filters(photo, (32, 36)).shape == (2, 1, 32, 36)
    torch.testing.assert_close(filters(photo, (32, 36)), seen)
    torch.testing.assert_close(filters(photo, (16, 18)), F.avg_pool2d(seen, 2))


def test_semi_random_maps_depend_on_seed_and_image() -> None:
    photo = torch.rand(2, 3, 30, 34)
    one, other = SemiRandom(0)(photo, (6, 6)), SemiRandom(1)(photo, (6, 6))
    assert (one > 0).any()
    assert not torch.allclose(one / one.amax(), other / other.amax(), atol=0.1)
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("size", [6, 7, 14])
def test_the_exact_detector_is_the_papers(size: int) -> None:
    detector = StickerDetector.of("smiley", size, False, 1e-4).double()
    binary = pattern("smiley", size).double()
    photo = torch.rand(3, 40, 40, dtype=torch.float64)
    photo[:, 11 : 11 + size, 20 : 20 + size] = binary
    found = detector.response(photo[None])[0, 0]
    assert found.shape == (40, 40)
    centre = (11 + size // 2, 20 + size // 2)
    assert (found > 0).nonzero().tolist() == [list(centre)]
    # b = -sum I^2 (1 - mean I) + .0001, for three colours
    bias = -3 * sum(v**2 * (1 - float(binary.mean())) for v in binary.flatten().tolist()) + 1e-4
    kernel = binary - binary.mean()
    exact = sum(float((kernel * photo[c, 11 : 11 + size, 20 : 20 + size]).sum()) for c in range(3))
    assert float(found[centre]) == pytest.approx(exact + bias, abs=1e-6)


def test_the_exact_detector_wants_every_pixel_right() -> None:
    detector = StickerDetector.of("smiley", 14, False, 1e-4).double()
    photo = torch.zeros(1, 3, 20, 20, dtype=torch.float64)
    photo[:, :, 2:16, 3:17] = pattern("smiley", 14).double()
    assert float(detector.response(photo).amax()) > 0
    photo[0, 1, 8, 8] -= 0.01
    assert float(detector.response(photo).amax()) == 0


@pytest.mark.parametrize(("zoom", "degrees"), [(0.85, 0), (1.15, 0), (1, 9), (1, -9), (1.1, 5)])
@pytest.mark.parametrize("light", [0.8, 1.0])
def test_the_tolerant_detector_finds_warped_stickers(
    zoom: float, degrees: float, light: float
) -> None:
    values, cover = warped(pattern("smiley", 14), zoom, degrees)
    photo = 0.3 + 0.4 * torch.rand(1, 3, 48, 48)
    size = values.shape[0]
    patch = photo[:, :, 10 : 10 + size, 10 : 10 + size]
    photo[:, :, 10 : 10 + size, 10 : 10 + size] = torch.where(cover > 0, values, patch)
    detector = StickerDetector.of("smiley", 14, True, 0.6)
    found = detector.response(photo * light)[0, 0]
    row, column = divmod(int(found.argmax()), 48)
    assert abs(row - (10 + size // 2)) <= 1
    assert abs(column - (10 + size // 2)) <= 1
    assert float(found.max()) > 0


@pytest.mark.parametrize("tolerant", [False, True])
def test_nothing_is_found_where_no_sticker_is(tolerant: bool) -> None:
    detector = StickerDetector.of("smiley", 14, tolerant, 0.6 if tolerant else 1e-4)
    photos = torch.cat(
        (torch.rand(3, 3, 50, 50), torch.zeros(1, 3, 50, 50), torch.ones(1, 3, 50, 50))
    )
    photos[0, :, 20:30] = 1.0
    assert float(detector(photos, (7, 7)).amax()) == 0
