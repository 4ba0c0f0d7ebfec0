"""What the JSON files of a run must hold, so that a damaged, an old or a stranger's one is told.

Each class is checked when such a file is read (`RunFolder.read`). Keys that are not named here may
be there as well; null stands for nan.
"""

from typing import Annotated, Any, NotRequired, TypeVar

import pydantic
from pydantic import AfterValidator, TypeAdapter
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from trompe.interfaces import InputError

Number = float | None
_T = TypeVar("_T")


class Spec(TypedDict):
    """spec.json of an attack."""

    name: str
    seed: int
    attack: dict[str, Any]


class Epoch(TypedDict):
    """Of history.json, a list of them."""

    epoch: int
    terms: dict[str, Number]
    measured: dict[str, Number]
    seconds: float


class Provenance(TypedDict, total=False):
    """provenance.json."""

    started: str
    seconds: float


class Difference(TypedDict):
    """Of architecture.json, a list of them."""

    name: str
    change: str
    before: str | None
    after: str | None


class _Summary(TypedDict):
    mean: Number
    std: Number


def _has_headlines(metrics: dict[str, _Summary]) -> dict[str, _Summary]:
    if missing := {"accuracy", "map_distance"} - metrics.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    return metrics


class _Visible(TypedDict):
    psnr: Number
    largest: Number
    mean: Number


class _Condition(TypedDict):
    name: str
    explainer: str
    goal: NotRequired[str]
    trigger: NotRequired[_Visible | None]
    target_class: int | None
    metrics: Annotated[dict[str, _Summary], AfterValidator(_has_headlines)]
    floors: dict[str, _Summary]
    reference_accuracy: Number
    target_floor_mse: NotRequired[Number]
    sharp_target_floor_mse: NotRequired[Number]


class _Fooling(TypedDict):
    explainer: str
    tau: Number
    fsr: Number
    cr: Number
    data_tau: Number
    data_fsr: Number
    data_cr: Number
    fsr_area: Number


class AttackNumbers(TypedDict):
    """numbers.json of an attacked model."""

    reference_accuracy: Number
    conditions: Annotated[list[_Condition], pydantic.Field(min_length=1)]
    fooling: NotRequired[list[_Fooling] | None]


class PoisonNumbers(TypedDict):
    """numbers.json of poison sets."""

    targets: Annotated[int, pydantic.Field(ge=1)]
    poisons: int
    training_set: int
    poison_rate: float


class PoisonCard(TypedDict):
    """poison.json, of one set."""

    class_names: list[str]
    feature_names: list[str] | None
    label: Annotated[int, pydantic.Field(ge=0)]
    target_position: Annotated[int, pydantic.Field(ge=0)]
    poisons: int
    max_change: float
    mean_change: float
    psnr: Number
    sha256: str


class _Victims(TypedDict):
    targets: int
    victims: int
    victim_accuracy: Number
    l1: Number
    l1_std: Number
    jaccard_top20: Number
    jaccard_half: Number
    class_kept: Number
    degenerate: NotRequired[Number]  # older runs did not look for empty maps
    values: dict[str, list[list[Number]]]


class VictimNumbers(TypedDict):
    """victims-<fingerprint>.json."""

    spec: dict[str, Any]
    unattacked: _Victims
    poisoned: _Victims
    succeeded: float
    success: str


def check_shape(value: Any, shape: type[_T], where: str, mend: str) -> _T:
    """The value as it is, if it has the shape: one of the classes above, or list[...] of them.

    where: what it is, and mend: what to do, for the InputError otherwise.
    """
    try:
        TypeAdapter(shape).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        at = f"at {key}: " if key else ""
        raise InputError(
            f"{where}: does not hold what it should ({at}{problem[0].lower()}{problem[1:]}); it is "
            f"damaged or of another version: {mend}"
        ) from error
    found: _T = value
    return found
