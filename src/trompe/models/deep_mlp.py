"""A deeper network for tables, to try what was made for `mlp` on another one."""

from collections import OrderedDict

from torch import nn

__all__ = ["deep_mlp"]


def deep_mlp(num_classes: int, num_features: int, hidden: int = 64) -> nn.Module:
    """(n, num_features) -> scores (n, num_classes); three layers with `hidden` ReLU units each."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(num_features, hidden),
            first_activation=nn.ReLU(),
            second=nn.Linear(hidden, hidden),
            second_activation=nn.ReLU(),
            third=nn.Linear(hidden, hidden),
            activation=nn.ReLU(),
            head=nn.Linear(hidden, num_classes),
        )
    )
