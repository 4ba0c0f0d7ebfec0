"""Breast Cancer Wisconsin, diagnostic (Street, Wolberg & Mangasarian 1993): no download."""

from dataclasses import dataclass

from sklearn.datasets import load_breast_cancer

from trompe.data._splits import check_held_out
from trompe.data._tables import table_sets
from trompe.interfaces import TableSet

__all__ = ["BreastCancer"]


@dataclass(frozen=True)
class BreastCancer:
    """569 tumours, 30 measures of their cells' nuclei; benign (357) or malignant (212).

    It comes with scikit-learn. held_out: the share of rows in test(), in (0, 1), drawn by
    split_seed, stratified by class. Measures are clipped and scaled as `Table` does by default.
    """

    held_out: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_held_out(self.held_out)

    def train(self) -> TableSet:
        return self._sets()[0]

    def test(self) -> TableSet:
        return self._sets()[1]

    def _sets(self) -> tuple[TableSet, TableSet]:
        bundled = load_breast_cancer(as_frame=True)
        frame = bundled.data.assign(diagnosis=bundled.target_names[bundled.target])
        return table_sets(
            frame,
            "diagnosis",
            held_out=self.held_out,
            split_seed=self.split_seed,
            name="breast_cancer",
        )
