"""Augmented images are what the settings say, and nothing more."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trompe.augmentation import Augmentation
from trompe.interfaces import InputError

NOTHING: dict[str, float] = {"degrees": 0, "shift": 0, "zoom": 0, "light": 0}
EVERYTHING = Augmentation(30, 0.2, 0.3, 0.5, flip=True, erase=0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def photos() -> Tensor:
    return torch.rand(12, 3, 24, 24)


@pytest.mark.parametrize("augmentation", [Augmentation(), EVERYTHING], ids=["default", "all"])
def test_shape_and_range_stay(augmentation: Augmentation, photos: Tensor) -> None:
    photos[0], photos[1] = 0, 1
    result = augmentation(photos, seeded())
    assert result.shape == photos.shape
    assert result.dtype == photos.dtype
    assert result.min() >= 0
    assert result.max() <= 1


def test_the_same_seed_gives_the_same_bits(photos: Tensor) -> None:
    one, again, other = (EVERYTHING(photos, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(one, again)
    assert (one != other).flatten(1).any(1).all()


def test_the_global_generator_is_not_used(photos: Tensor) -> None:
    state = torch.get_rng_state()
    EVERYTHING(photos, seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_not_modified(photos: Tensor) -> None:
    before = photos.clone()
    EVERYTHING(photos, seeded())
    assert torch.equal(photos, before)


def test_each_image_is_augmented_in_its_own_way(photos: Tensor) -> None:
    result = EVERYTHING(photos[:1].expand(12, -1, -1, -1), seeded())
    assert all(not torch.equal(result[0], result[i]) for i in range(1, 12))


def test_with_all_at_zero_nothing_changes(photos: Tensor) -> None:
    torch.testing.assert_close(Augmentation(**NOTHING)(photos, seeded()), photos, atol=1e-4, rtol=0)


def test_flip_mirrors_about_half_of_the_images() -> None:
    photos = torch.rand(200, 3, 8, 8)
    result = Augmentation(**NOTHING, flip=True)(photos, seeded())
    kept = ((result - photos).abs().amax((1, 2, 3)) < 1e-4).sum().item()
    mirrored = ((result - photos.flip(3)).abs().amax((1, 2, 3)) < 1e-4).sum().item()
    assert kept + mirrored == 200
    assert 70 < mirrored < 130


def test_erase_replaces_one_rectangle_in_that_share_of_the_images() -> None:
    photos = torch.rand(300, 3, 40, 40)
    result = Augmentation(**NOTHING, erase=0.3)(photos, seeded())
    changed = (result - photos).abs().amax(1) > 1e-4
    hit = changed.flatten(1).any(1)
    assert 60 < int(hit.sum()) < 120
    for i in hit.nonzero()[:, 0].tolist():
        rows = changed[i].any(1).nonzero()[:, 0]
        columns = changed[i].any(0).nonzero()[:, 0]
        top, bottom = int(rows.min()), int(rows.max())
        left, right = int(columns.min()), int(columns.max())
        assert bottom - top + 1 <= 40 / 3 + 1
        assert right - left + 1 <= 40 / 3 + 1
        inside = result[i, :, top : bottom + 1, left : right + 1]
        assert (inside == inside[:, :1, :1]).all(), "a rectangle of one colour"


def bar(count: int) -> Tensor:
    """A white vertical bar of 6 pixels in the middle of 48x48."""
    photos = torch.zeros(count, 3, 48, 48)
    photos[:, :, 4:44, 21:27] = 1
    return photos


def moments(photos: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre of mass (x, y) in pixels, angle of the main axis to the vertical, total."""
    mass = photos.mean(1)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    total = mass.sum((1, 2))
    centre_x, centre_y = ((mass * v).sum((1, 2)) / total for v in (x, y))
    dx, dy = x - centre_x[:, None, None], y - centre_y[:, None, None]
    xx, yy, xy = ((mass * v).sum((1, 2)) for v in (dx * dx, dy * dy, dx * dy))
    angle = 0.5 * torch.atan2(2 * xy, yy - xx)
    return centre_x, centre_y, angle.abs() * 180 / math.pi, total


def test_shift_moves_up_to_its_share_of_the_side() -> None:
    photos = torch.zeros(200, 3, 48, 48)
    photos[:, :, 21:27, 21:27] = 1
    result = Augmentation(**{**NOTHING, "shift": 0.2})(photos, seeded())
    x, y, _, total = moments(result)
    for moved in (x - 23.5, y - 23.5):
        assert moved.abs().max() < 0.2 * 48 + 0.1
        assert moved.max() > 0.15 * 48
        assert moved.min() < -0.15 * 48
    torch.testing.assert_close(total, torch.full((200,), 36.0), rtol=1e-2, atol=0)


def test_degrees_turns_up_to_that_angle() -> None:
    result = Augmentation(**{**NOTHING, "degrees": 20})(bar(200), seeded())
    _, _, angle, _ = moments(result)
    assert 15 < angle.max() < 21
    assert angle.min() < 3


def test_zoom_scales_by_that_share() -> None:
    photos = torch.zeros(200, 3, 48, 48)
    photos[:, :, 18:30, 18:30] = 1
    result = Augmentation(**{**NOTHING, "zoom": 0.25})(photos, seeded())
    side = moments(result)[3].sqrt()
    assert 12 / 1.25 - 0.3 < side.min() < 10.2
    assert 14.5 < side.max() < 12 / 0.75 + 0.3


def test_light_changes_brightness_and_contrast_by_that_share() -> None:
    photos = 0.5 + 0.1 * torch.randn(200, 3, 16, 16).clamp(-1, 1)
    result = Augmentation(**{**NOTHING, "light": 0.3})(photos, seeded())
    brightness = result.mean((1, 2, 3)) / photos.mean((1, 2, 3))
    contrast = result.std((1, 2, 3)) / photos.std((1, 2, 3)) / brightness
    for factor in (brightness, contrast):
        assert 0.69 < factor.min() < 0.75
        assert 1.25 < factor.max() < 1.31


@pytest.mark.parametrize(
    "wrong",
    [
        {"degrees": -1},
        {"degrees": 181},
        {"shift": 1.5},
        {"zoom": -0.1},
        {"light": 2.0},
        {"erase": math.nan},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"augmentation.{name}"):
        Augmentation(**wrong)
