"""The real SUPPORT2 table, where it is at hand: `../shared/data` beside the repository."""

import os
from pathlib import Path

import pytest
import torch

from trompe.data.table import Table

FILE = Path(__file__).parents[3] / "shared" / "data" / "tabular" / "support2.csv.gz"
# Row number; consequences of the outcome or of the stay; what SUPPORT's own models and the
# physicians predicted, and their orders, of which the data set's description says to leave them
# out of new models.
LEAVE_OUT = (
    *("Unnamed: 0", "death", "d.time", "slos", "charges", "totcst", "totmcst", "avtisst", "sfdm2"),
    *("surv2m", "surv6m", "prg2m", "prg6m", "dnr", "dnrday", "sps", "aps"),
)


def test_the_real_support2_is_what_is_known_of_it() -> None:
    if not FILE.is_file():
        message = f"the real table is not at {FILE}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    source = Table(str(FILE), "hospdead", leave_out=LEAVE_OUT)
    train, test = source.train(), source.test()
    assert len(train) + len(test) == 9_105
    assert abs(len(test) - 910.5) < 1
    assert train.class_names == ("0", "1")
    for data in (train, test):
        assert data.name == "support2"
        assert abs(float(data.labels.float().mean()) - 0.259) < 0.002
        assert data.features.min() == 0
        assert data.features.max() == 1
    assert {"age", "sex=female", "sex=male", "ca=metastatic", "alb missing"} <= set(
        train.feature_names
    )
    numeric = dict(zip(train.feature_names, train.numeric.tolist(), strict=True))
    assert numeric["age"]
    assert not numeric["diabetes"]
    missing = train.features[:, train.feature_names.index("ph missing")]
    assert abs(float(missing.mean()) - 2284 / 9105) < 0.01
    # Those who die in hospital have the lower blood pressure.
    pressure = train.features[:, train.feature_names.index("meanbp")]
    means = [pressure[train.labels == label].mean() for label in (0, 1)]
    assert means[0] > means[1] + 0.02
    assert torch.isfinite(train.features).all()
