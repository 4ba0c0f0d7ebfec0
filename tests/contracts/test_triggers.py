"""What every trigger must do; a new file under triggers/ is tested by existing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trompe.catalog import names
from trompe.interfaces import InputError, Trigger
from trompe.triggers.checkerboard import Checkerboard
from trompe.triggers.rectangle import Rectangle
from trompe.triggers.sticker import Sticker

SETTINGS: dict[str, dict[str, Any]] = {}  # for triggers that cannot be built from defaults
ANY_SIZE: set[str] = set()  # triggers that fit on an image of any size

every_trigger = pytest.mark.parametrize("name", names("triggers"))


@pytest.fixture
def trigger(name: str, plugin: Callable[..., Trigger]) -> Trigger:
    return plugin("triggers", name, SETTINGS)


@pytest.fixture
def photos() -> Tensor:
    """float32 (4, 3, 40, 40): black, white, and two of noise."""
    noise = torch.rand(2, 3, 40, 40)
    return torch.cat((torch.zeros(1, 3, 40, 40), torch.ones(1, 3, 40, 40), noise))


@every_trigger
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shape_and_dtype_stay(trigger: Trigger, photos: Tensor, dtype: torch.dtype) -> None:
    result = trigger(photos.to(dtype))
    assert result.shape == photos.shape
    assert result.dtype == dtype


@every_trigger
def test_values_stay_in_range(trigger: Trigger, photos: Tensor) -> None:
    result = trigger(photos)
    assert result.min() >= 0
    assert result.max() <= 1


@every_trigger
def test_the_trigger_shows_on_every_photo(trigger: Trigger, photos: Tensor) -> None:
    assert (trigger(photos) != photos).flatten(1).any(1)[2:].all()


@every_trigger
def test_the_input_is_not_modified(trigger: Trigger, photos: Tensor) -> None:
    before = photos.clone()
    result = trigger(photos)
    result += 1  # nor do they share memory
    assert torch.equal(photos, before)


@every_trigger
def test_is_deterministic(trigger: Trigger, photos: Tensor) -> None:
    first = trigger(photos)
    torch.rand(3)
    assert torch.equal(trigger(photos), first)


@every_trigger
def test_an_image_does_not_depend_on_its_neighbours(trigger: Trigger, photos: Tensor) -> None:
    alone = torch.cat([trigger(photos[i : i + 1]) for i in range(len(photos))])
    assert torch.equal(trigger(photos), alone)


@every_trigger
def test_memory_layout_does_not_matter(trigger: Trigger, photos: Tensor) -> None:
    channels_last = photos.contiguous(memory_format=torch.channels_last)
    assert torch.equal(trigger(channels_last), trigger(photos))


@every_trigger
def test_is_differentiable_in_the_images(trigger: Trigger, photos: Tensor) -> None:
    images = (photos * 0.8 + 0.1).requires_grad_()
    trigger(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@every_trigger
def test_an_image_smaller_than_the_trigger_is_refused(name: str, trigger: Trigger) -> None:
    if name in ANY_SIZE:
        trigger(torch.rand(1, 3, 3, 2))
        return
    with pytest.raises(InputError) as caught:
        trigger(torch.rand(1, 3, 3, 2))
    assert re.search(r"\b3( rows and |x)2\b", str(caught.value)), "the image's size is not named"


# --- each one does what its docstring says --------------------------------------------------------


@pytest.mark.parametrize(
    "outside",
    [
        Rectangle(top=35, height=6),
        Rectangle(left=29, width=12),
        Rectangle(top=-1),
        Rectangle(left=-1),
        Rectangle(height=0),
        Rectangle(width=-3),
        Sticker(top=31, size=10),
        Sticker(left=-2),
        Sticker(size=0),
        Checkerboard(square=41),
        Checkerboard(square=0),
    ],
    ids=repr,
)
def test_a_trigger_that_leaves_the_image_is_refused(outside: Trigger, photos: Tensor) -> None:
    with pytest.raises(InputError):
        outside(photos)


@pytest.mark.parametrize(
    "inside",
    [Rectangle(top=34, height=6), Rectangle(left=28, width=12), Sticker(top=30, left=30)],
    ids=repr,
)
def test_a_trigger_that_touches_the_rim_is_accepted(inside: Trigger, photos: Tensor) -> None:
    assert (inside(photos) != photos).any()


def test_the_message_names_rows_columns_and_image() -> None:
    with pytest.raises(InputError, match=r"rows 26\.\.31 .*columns 14\.\.25.* 32 rows and 24 col"):
        Rectangle()(torch.rand(1, 3, 32, 24))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rectangle(colour=(0, 0, 1.01)),
        lambda: Rectangle(colour=(-0.1, 0, 0)),
        lambda: Checkerboard(amplitude=0),
        lambda: Checkerboard(amplitude=1.5),
        lambda: Sticker(alpha=0),
        lambda: Sticker(alpha=1.2),
        lambda: Sticker("no/such/picture.png")(torch.rand(1, 3, 40, 40)),
        lambda: Sticker(__file__)(torch.rand(1, 3, 40, 40)),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()


def test_the_rectangle_covers_its_rows_and_columns_and_no_more(photos: Tensor) -> None:
    result = Rectangle(top=3, left=5, height=2, width=7, colour=(0.25, 0.5, 0.75))(photos)
    for y in range(40):
        for x in range(40):
            covered = 3 <= y < 5 and 5 <= x < 12
            expected = torch.tensor([0.25, 0.5, 0.75]) if covered else photos[2, :, y, x]
            assert torch.equal(result[2, :, y, x], expected), (y, x)


def test_the_checkerboard_adds_and_subtracts_its_amplitude() -> None:
    result = Checkerboard(square=3, amplitude=0.125)(torch.full((1, 3, 10, 11), 0.5))
    for y in range(10):
        for x in range(11):
            sign = 1 if (y // 3 + x // 3) % 2 == 0 else -1
            assert result[0, :, y, x].tolist() == [0.5 + sign * 0.125] * 3, (y, x)


def test_the_checkerboard_of_the_paper_is_five_grey_levels() -> None:
    grey = torch.full((1, 3, 8, 8), 100 / 255)
    levels = (Checkerboard()(grey) * 255).round().unique()
    assert levels.tolist() == [95, 105]


def test_the_sticker_shows_its_picture_and_respects_transparency(
    tmp_path: Path, photos: Tensor
) -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[..., :3] = (255, 0, 51)
    pixels[:, :2, 3] = 255  # the right half is transparent
    file = tmp_path / "half.png"
    Image.fromarray(pixels, "RGBA").save(file)
    result = Sticker(str(file), top=7, left=9, size=4, alpha=0.5)(photos)
    expected = photos.clone()
    colour = torch.tensor([1.0, 0.0, 0.2])[:, None, None]
    expected[:, :, 7:11, 9:11] = 0.5 * photos[:, :, 7:11, 9:11] + 0.5 * colour
    torch.testing.assert_close(result, expected)


def test_the_smiley_is_yellow_and_leaves_the_corners_free(photos: Tensor) -> None:
    result = Sticker(top=2, left=2, size=30)(photos)
    assert torch.equal(result[:, :, 2, 2], photos[:, :, 2, 2])
    red, green, blue = result[0, :, 10, 17].tolist()
    assert red > 0.9
    assert 0.6 < green < 0.95
    assert blue < 0.1
