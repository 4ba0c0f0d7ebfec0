"""How visible a change is: by hand."""

import json
import math

import pytest
import torch

from trompe.files import strict_json
from trompe.interfaces import ImageSet
from trompe.triggers.checkerboard import Checkerboard
from trompe.visibility import Visibility, visibility


def test_by_hand() -> None:
    before = torch.full((2, 1, 2, 2), 0.5)
    after = before.clone()
    after[0, 0, 0, 0] += 0.4  # of 8 places: mean square .02
    found = visibility(after, before)
    assert found.psnr == pytest.approx(10 * math.log10(1 / 0.02), rel=1e-5)
    assert (found.largest, found.mean) == pytest.approx((0.4, 0.05))
    assert str(found) == "PSNR 17.0 dB, at most 102 of 255"


def test_the_checkerboard_of_the_paper(shapes: ImageSet) -> None:
    grey = torch.full_like(shapes.floats(slice(2)), 0.5)  # nothing is cut off
    found = visibility(Checkerboard()(grey), grey)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)
    assert 255 * found.largest == pytest.approx(5, abs=1e-3)


def test_nothing_changed_survives_a_file() -> None:
    same = visibility(torch.zeros(3), torch.zeros(3))
    assert same.psnr == math.inf
    assert str(same).startswith("nothing changed")
    row = json.loads(json.dumps(strict_json(vars(same)), allow_nan=False))
    assert Visibility.read(row) == same
