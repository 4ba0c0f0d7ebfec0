"""Gradients of a class, the one place where explainers differentiate."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trompe.interfaces import Pass
from trompe.maps import full_precision

Quantity = Literal["logit", "probability", "loss"]


def margin(scores: Tensor, classes: Tensor) -> Tensor:
    """m (n,) = log sum of exp of the other classes' scores, minus the class's own.

    The cross-entropy is softplus(m), so its gradient is sigmoid(m) times that of m: the same
    direction, but that of m does not vanish for images of which the model is certain.
    """
    rows = torch.arange(len(classes), device=classes.device)
    own = torch.zeros_like(scores, dtype=torch.bool)
    own[rows, classes] = True
    return scores.masked_fill(own, -torch.inf).logsumexp(1) - scores[rows, classes]


def gradient_of_class(
    seen: Pass, wrt: Tensor, classes: Tensor, of: Quantity | Literal["margin"]
) -> Tensor:
    """d(quantity of image i's class) / d(wrt), same shape as `wrt`; rows do not mix in eval mode.

    Trainable through (a graph is created) exactly when grad mode is on. Only the part of the model
    between `wrt` and the scores is differentiated.
    """
    trainable = torch.is_grad_enabled()
    with torch.enable_grad():
        rows = torch.arange(len(classes), device=classes.device)
        scores = full_precision(seen.scores)
        if of == "logit":
            quantity = scores[rows, classes].sum()
        elif of == "margin":
            quantity = margin(scores, classes).sum()
        elif of == "probability":
            quantity = scores.softmax(1)[rows, classes].sum()
        else:
            quantity = F.cross_entropy(scores, classes, reduction="sum")
        # Without a graph to build, later explainers may still need this pass's graph.
        (gradient,) = torch.autograd.grad(quantity, wrt, create_graph=trainable, retain_graph=True)
    return gradient
