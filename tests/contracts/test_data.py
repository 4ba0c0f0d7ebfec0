"""What every source of data must do; a new file under data/ is tested by existing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trompe.catalog import names
from trompe.interfaces import ImageSet, TableSet

SETTINGS: dict[str, dict[str, Any]] = {"signs": {"train_images": 60, "test_images": 40}}
NEED_FILES = {"cub", "gtsrb", "image_folder", "stanford_dogs", "table"}  # tests of their own

pytestmark = pytest.mark.parametrize("name", [n for n in names("data") if n not in NEED_FILES])


def numbers(data: ImageSet | TableSet) -> Tensor:
    return data.features if isinstance(data, TableSet) else data.images


@pytest.fixture
def sets(name: str, plugin: Callable[..., Any]) -> tuple[ImageSet, ImageSet]:
    source = plugin("data", name, SETTINGS)
    return source.train(), source.test()


def test_same_settings_same_bits(
    name: str, sets: tuple[ImageSet, ImageSet], plugin: Callable[..., Any]
) -> None:
    source = plugin("data", name, SETTINGS)
    for data, again in zip(sets, (source.train(), source.test()), strict=True):
        assert torch.equal(numbers(data), numbers(again))
        assert torch.equal(data.labels, again.labels)


def test_labels_are_classes_and_every_class_is_trained(sets: tuple[ImageSet, ImageSet]) -> None:
    train, test = sets
    assert train.class_names == test.class_names
    assert len(set(train.class_names)) == len(train.class_names)
    for data in sets:
        assert data.labels.dtype == torch.int64
        assert data.labels.min() >= 0
        assert data.labels.max() < len(data.class_names)
    assert len(train.labels.unique()) == len(train.class_names)


def test_values_are_in_0_1_and_test_samples_are_others(sets: tuple[ImageSet, ImageSet]) -> None:
    train, test = sets
    for data in sets:
        floats = data.floats(slice(None))
        assert floats.dtype == torch.float32
        assert floats.min() >= 0
        assert floats.max() <= 1
    both = torch.cat([numbers(data) for data in sets]).flatten(1)
    assert len(both.unique(dim=0)) == len(train) + len(test)


def test_both_sets_have_the_same_columns(sets: tuple[ImageSet, ImageSet]) -> None:
    train, test = sets
    assert train.size == test.size
    if isinstance(train, TableSet) and isinstance(test, TableSet):
        assert train.feature_names == test.feature_names
        assert torch.equal(train.numeric, test.numeric)
