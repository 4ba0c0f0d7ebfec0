"""Is the true class predicted?"""

from torch import Tensor

from trompe.interfaces import Evidence

__all__ = ["accuracy"]


def accuracy(evidence: Evidence) -> Tensor:
    """1 where the predicted class is the true one, else 0. Higher is better for the user."""
    return (evidence.scores.argmax(1) == evidence.labels).float()
