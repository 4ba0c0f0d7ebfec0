"""A network for tables: two fully connected layers (Zhang, Gao & Su 2021, section 5.2.1)."""

from collections import OrderedDict

from torch import nn

__all__ = ["mlp"]


def mlp(num_classes: int, num_features: int, hidden: int = 64) -> nn.Module:
    """(n, num_features) -> scores (n, num_classes); `hidden` ReLU units between the two layers."""
    return nn.Sequential(
        OrderedDict(
            hidden=nn.Linear(num_features, hidden),
            activation=nn.ReLU(),
            head=nn.Linear(hidden, num_classes),
        )
    )
