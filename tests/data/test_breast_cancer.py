"""The bundled table: what it holds, and that it is easy, as is known of it."""

import pytest
import torch

from trompe.data.breast_cancer import BreastCancer
from trompe.interfaces import InputError


def test_it_is_the_known_table() -> None:
    source = BreastCancer()
    train, test = source.train(), source.test()
    assert len(train) + len(test) == 569
    assert len(test) == 57
    assert train.features.shape[1] == 30
    assert train.numeric.all()
    assert train.class_names == ("benign", "malignant")
    assert train.labels.sum() + test.labels.sum() == 212
    assert train.feature_names[:2] == ("mean radius", "mean texture")


def test_a_large_radius_speaks_for_malignant() -> None:
    train = BreastCancer().train()
    radius = train.features[:, train.feature_names.index("worst radius")]
    means = torch.stack([radius[train.labels == label].mean() for label in (0, 1)])
    assert means[1] > 2 * means[0]


def test_the_seed_draws_the_split() -> None:
    assert not torch.equal(
        BreastCancer().test().features, BreastCancer(split_seed=1).test().features
    )


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="held_out = 2: must lie between 0 and 1"):
        BreastCancer(held_out=2)
