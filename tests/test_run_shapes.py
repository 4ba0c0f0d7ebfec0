"""Damaged, old and strangers' files are told in one sentence."""

import copy
from typing import Any

import pytest

from trompe.interfaces import InputError
from trompe.run_shapes import AttackNumbers, Epoch, PoisonCard, check_shape

SUMMARY = {"mean": 0.5, "std": None, "images": 3}
NUMBERS: dict[str, Any] = {
    "reference_accuracy": 1,  # JSON has one kind of number
    "epochs": 2,
    "conditions": [
        {
            "name": "clean",
            "explainer": "gradcam",
            "target_class": None,
            "trigger": None,
            "metrics": {"accuracy": SUMMARY, "map_distance": SUMMARY},
            "floors": {"zero map": SUMMARY},
            "reference_accuracy": None,
        }
    ],
}


def changed(path: tuple[Any, ...], *value: Any) -> dict[str, Any]:
    """NUMBERS with another value there, or none."""
    table: Any = copy.deepcopy(NUMBERS)
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    if value:
        (inner[path[-1]],) = value
    else:
        del inner[path[-1]]
    return table


def check(value: Any, shape: Any = AttackNumbers) -> Any:
    return check_shape(value, shape, "file a.json", "bring it back")


def test_what_has_the_shape_comes_back_as_it_is() -> None:
    assert check(NUMBERS) is NUMBERS
    assert check([], list[Epoch]) == []


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "(input should be a valid dictionary)"),
        (None, "(input should be a valid dictionary)"),
        ({}, "(at reference_accuracy: field required)"),
        (changed(("conditions",), []), "(at conditions: list should have at least 1 item"),
        (changed(("conditions", 0, "name")), "(at conditions.0.name: field required)"),
        (
            changed(("conditions", 0, "metrics", "accuracy", "mean"), "high"),
            "(at conditions.0.metrics.accuracy.mean: input should be a valid number)",
        ),
        (
            changed(("conditions", 0, "metrics", "map_distance")),
            "(at conditions.0.metrics: lacks map_distance)",
        ),
        (
            changed(("conditions", 0, "trigger"), {"psnr": 20.0}),
            "(at conditions.0.trigger.largest: field required)",
        ),
    ],
)
def test_what_is_wrong_is_named(value: Any, told: str) -> None:
    with pytest.raises(InputError) as refused:
        check(value)
    words = str(refused.value)
    assert words.startswith(f"file a.json: does not hold what it should {told}")
    assert words.endswith("it is damaged or of another version: bring it back")
    assert "\n" not in words


def test_a_label_below_0_is_none() -> None:
    with pytest.raises(InputError, match="at label: input should be greater than or equal to 0"):
        check({"class_names": [], "feature_names": None, "label": -1}, PoisonCard)
