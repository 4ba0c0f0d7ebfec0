"""Drawn traffic signs: determinism, plausible pictures and masks, difficulty, errors."""

import dataclasses

import pytest
import torch
from torch import Tensor

from trompe.data import signs
from trompe.data.signs import CLASS_NAMES, GIVE_WAY, Drawing, Signs, draw
from trompe.interfaces import InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_sign(name: str, count: int, seed: int = 0, size: int = 40) -> Drawing:
    """`count` photographs of one class; equal seeds give equal scenes for all classes."""
    return draw(torch.full((count,), CLASS_NAMES.index(name)), size, seeded(seed))


@pytest.fixture(scope="module")
def drawing() -> Drawing:
    return draw(torch.arange(400) % len(CLASS_NAMES), 40, seeded(3))


def equal(a: Drawing, b: Drawing) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)


def test_same_seed_same_bits_and_other_seed_other_bits() -> None:
    labels = torch.arange(45) % len(CLASS_NAMES)
    assert equal(draw(labels, 40, seeded(7)), draw(labels, 40, seeded(7)))
    assert not torch.equal(draw(labels, 40, seeded(7)).images, draw(labels, 40, seeded(8)).images)


def test_one_generator_gives_new_pictures_each_time() -> None:
    labels, generator = torch.arange(20), seeded(7)
    first, second = draw(labels, 32, generator), draw(labels, 32, generator)
    assert (first.images != second.images).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [17, 40])
@pytest.mark.parametrize("images_per_chunk", [1, 7, 20])
def test_chunks_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch, size: int, images_per_chunk: int
) -> None:
    labels = torch.arange(45) % len(CLASS_NAMES)
    whole = draw(labels, size, seeded(7))
    monkeypatch.setattr(signs, "_CHUNK_PIXELS", images_per_chunk * size**2)
    assert equal(draw(labels, size, seeded(7)), whole)


def test_an_image_does_not_depend_on_how_many_follow() -> None:
    labels = torch.arange(45) % len(CLASS_NAMES)
    whole, part = draw(labels, 32, seeded(7)), draw(labels[:10], 32, seeded(7))
    assert equal(part, Drawing(whole.images[:10], whole.masks[:10]))


def test_thread_count_leaves_no_trace() -> None:
    labels, threads = torch.arange(16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = draw(labels, 40, seeded(7))
        torch.set_num_threads(2)
        assert equal(draw(labels, 40, seeded(7)), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [16, 33, 64, 224])
def test_any_size(size: int) -> None:
    images, masks = draw(torch.tensor([0, 7, 8]), size, seeded(1))
    assert images.shape == (3, 3, size, size)
    assert images.dtype == torch.uint8
    assert masks.shape == (3, size, size)
    assert masks.dtype == torch.bool


def test_no_labels_no_images() -> None:
    images, masks = draw(torch.zeros(0, dtype=torch.int64), 40, seeded(1))
    assert images.shape == (0, 3, 40, 40)
    assert masks.shape == (0, 40, 40)


def test_sizes_show_the_same_pictures() -> None:
    """Shares of the frame, not pixels: a larger picture has the same sign at the same place."""
    labels = torch.arange(60) % len(CLASS_NAMES)
    small, large = draw(labels, 32, seeded(5)).masks, draw(labels, 96, seeded(5)).masks
    shrunk = torch.nn.functional.avg_pool2d(large.float()[:, None], 3)[:, 0] > 0.5
    assert (shrunk == small).float().mean() > 0.98


def test_exposure_reaches_from_dusk_to_glare(drawing: Drawing) -> None:
    grey = drawing.images.float().mean(1) / 255
    whole = grey.mean((1, 2))
    assert whole.min() < 0.12
    assert whole.max() > 0.8
    assert 0.2 < whole.median() < 0.45
    sign = (grey * drawing.masks).sum((1, 2)) / drawing.masks.sum((1, 2))
    assert sign.quantile(0.05) < 0.18
    assert sign.quantile(0.95) > 0.5


def test_masks_are_one_piece_near_the_centre(drawing: Drawing) -> None:
    share = drawing.masks.float().mean((1, 2))
    assert share.min() > 0.1
    assert share.max() < 0.85
    assert share.max() - share.min() > 0.3, "signs near and far"
    steps = torch.linspace(-1, 1, 40)
    weights = drawing.masks / drawing.masks.sum((1, 2), keepdim=True)
    x, y = (weights.sum(1) * steps).sum(1), (weights.sum(2) * steps).sum(1)
    assert drawing.masks[:, 20, 20].float().mean() > 0.97
    assert x.abs().max() < 0.6
    assert y.abs().max() < 0.6
    assert min(x.std(), y.std()) > 0.05, "signs off centre"


def test_masks_have_the_shape_of_the_sign() -> None:
    disc, apex_up = one_sign("stop", 50).masks, one_sign("road work", 50).masks
    apex_down = draw(torch.full((50,), GIVE_WAY), 40, seeded(0)).masks
    assert (disc.sum((1, 2)) > 1.3 * apex_down.sum((1, 2))).float().mean() > 0.95

    def height(masks: Tensor) -> Tensor:
        """Mean row of the masks, counted downwards."""
        rows = torch.arange(40.0)[:, None]
        return (masks * rows).sum((1, 2)) / masks.sum((1, 2))

    assert (height(apex_down) < height(disc)).all()
    assert (height(disc) < height(apex_up)).all()


def test_the_symbol_changes_only_what_the_mask_covers() -> None:
    """Scenes are the same for both: 30 and 80 may differ within the sign and its blur only."""
    first, second = one_sign("speed limit 30", 60), one_sign("speed limit 80", 60)
    assert torch.equal(first.masks, second.masks)
    near = torch.nn.functional.max_pool2d(first.masks.float(), 11, stride=1, padding=5) > 0
    differs = (first.images != second.images).any(1)
    assert differs.any((1, 2)).all()
    assert not (differs & ~near).any()


def test_symbols_can_be_read() -> None:
    """With scene and noise equal, two limits still differ by grey levels in nearly all images."""
    first, second = one_sign("speed limit 30", 200).images, one_sign("speed limit 80", 200).images
    contrast = (first.float() - second.float()).abs().mean(1).flatten(1).amax(1)
    assert (contrast > 5).float().mean() > 0.98
    assert contrast.median() > 20


def test_colours_are_those_of_the_signs() -> None:
    """Within the masks blue discs are bluer than red ones in nearly every pair of equal scenes."""

    def blueness(name: str) -> Tensor:
        images, masks = one_sign(name, 100)
        surplus = images[:, 2].float() - images[:, 0].float()
        return (surplus * masks).sum((1, 2)) / masks.sum((1, 2))

    assert (blueness("roundabout") > blueness("no entry")).float().mean() > 0.97


def test_labels_are_balanced_and_shuffled() -> None:
    data = Signs(size=16, train_images=110, test_images=40).train()
    counts = data.labels.bincount(minlength=len(CLASS_NAMES))
    assert counts.min() == 5
    assert counts.max() == 6
    assert (data.labels[1:] < data.labels[:-1]).float().mean() > 0.3
    assert data.class_names == CLASS_NAMES
    assert CLASS_NAMES[GIVE_WAY] == "give way"
    assert len(set(CLASS_NAMES)) >= 16


def test_a_set_holds_what_its_labels_say() -> None:
    data = Signs(size=32, train_images=200, test_images=20).train()
    assert data.masks is not None
    rows = torch.arange(32.0)[:, None]
    height = (data.masks * rows).sum((1, 2)) / data.masks.sum((1, 2))
    apex_down, apex_up = data.labels == GIVE_WAY, data.labels == CLASS_NAMES.index("road work")
    widest = data.masks.sum(2).argmax(1)
    assert (widest[apex_down] < height[apex_down]).all()
    assert (widest[apex_up] > height[apex_up]).all()


def test_train_and_test_share_nothing() -> None:
    source = Signs(size=16, train_images=200, test_images=200)
    train, test = source.train(), source.test()
    assert not torch.equal(train.labels, test.labels)
    seen = {image.numpy().tobytes() for image in train.images}
    assert len(seen) == 200
    assert not seen & {image.numpy().tobytes() for image in test.images}
    other = dataclasses.replace(source, train_images=40).test()
    assert torch.equal(other.images, test.images)
    assert torch.equal(other.labels, test.labels)


def test_seeds_give_other_sets() -> None:
    first, second = (Signs(16, 20, 20, seed) for seed in (0, 1))
    assert not torch.equal(first.train().images, second.train().images)
    assert not torch.equal(first.test().images, second.train().images)
    assert torch.equal(first.train().images, Signs(16, 20, 20, 0).train().images)
    Signs(16, 20, 20, seed=-3).train()


def test_pixels_alone_do_not_tell_the_class() -> None:
    """Ridge regression on pixels: far better than chance (5 %), yet no solution."""
    source = Signs(size=24, train_images=4_000, test_images=1_000)
    train, test = source.train(), source.test()

    def features(images: Tensor) -> Tensor:
        flat = images.flatten(1).float() / 255 - 0.4
        return torch.cat([flat, torch.ones(len(flat), 1)], 1)

    x, wanted = features(train.images), torch.nn.functional.one_hot(train.labels).float()
    gram = x.T @ x + 10.0 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ wanted)
    accuracy = ((features(test.images) @ weights).argmax(1) == test.labels).float().mean()
    assert 0.15 < accuracy < 0.6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 15}, ["size is 15", "16"]),
        ({"train_images": 19}, ["train_images is 19", "20"]),
        ({"test_images": 0}, ["test_images is 0", "20"]),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        Signs(**settings)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("labels", "size", "words"),
    [
        (torch.tensor([0]), 8, ["size is 8", "16"]),
        (torch.tensor([0, 20]), 32, ["20", "0 .. 19"]),
        (torch.tensor([-1]), 32, ["-1", "0 .. 19"]),
        (torch.tensor([1.0]), 32, ["float32", "int64"]),
        (torch.tensor([[1]]), 32, ["(1, 1)", "vector"]),
    ],
)
def test_labels_and_sizes_out_of_range(labels: Tensor, size: int, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        draw(labels, size, seeded(0))
    assert all(word in str(error.value) for word in words)
