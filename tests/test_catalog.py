"""A name in a file becomes an object, and the object a table again."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trompe import catalog
from trompe.attacks.explanation_aware_backdoors import ExplanationAwareBackdoors
from trompe.augmentation import Augmentation
from trompe.explainers.gradcam import GradCam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Goal, InputError
from trompe.metrics.accuracy import accuracy
from trompe.models.resnet20 import resnet20
from trompe.target_maps.border import Border
from trompe.target_maps.picture import Picture
from trompe.target_maps.reference import Reference
from trompe.train import Training
from trompe.triggers.rectangle import Rectangle

BAR: dict[str, Any] = {"kind": "rectangle"}
GOAL: dict[str, Any] = {"trigger": "rectangle", "label": 1, "wanted_map": "reference"}
ATTACK: dict[str, Any] = {"kind": "explanation_aware_backdoors", "goals": [GOAL]}

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {  # plug-ins that cannot be built from defaults
    ("attacks", "explanation_aware_backdoors"): {"goals": [GOAL]},
    ("attacks", "saliency_backdoors"): {
        "systems": [
            {"explainer": {"kind": "gradcam", "normalise": "max"}, "lie": {"kind": "border"}}
        ]
    },
    ("attacks", "interpretation_poisoning"): {"explainer": "cam", "wanted_map": "region"},
    ("attacks", "watermark_poisoning"): {"explainer": "cam", "wanted_map": "region"},
    ("data", "cub"): {"root": "somewhere"},
    ("data", "image_folder"): {"root": "somewhere"},
    ("data", "stanford_dogs"): {"root": "somewhere"},
    ("data", "table"): {"file": "some.csv", "outcome": "died"},
}
OF_SETTINGS = ("data", "triggers", "target_maps", "explainers", "attacks")
EVERY_PLUGIN = [(kind, name) for kind in catalog.KINDS for name in catalog.names(kind)]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), EVERY_PLUGIN)
def test_every_plug_in_has_one_public_object(kind: str, name: str) -> None:
    found = catalog.find(kind, name)
    assert callable(found)
    assert found.__module__ == f"trompe.{kind}.{name}"
    assert inspect.getdoc(found)


def test_names_are_sorted_and_leave_out_helpers() -> None:
    assert catalog.names("triggers") == (*("checkerboard", "rectangle", "sticker", "stickers"),)
    assert "gradcam" in catalog.names("explainers")
    assert not any(name.startswith("_") for _, name in EVERY_PLUGIN)


def test_functions_are_found_as_they_are() -> None:
    assert catalog.find("metrics", "accuracy") is accuracy
    assert catalog.find("models", "resnet20") is resnet20


def test_a_hyphen_reads_as_an_underscore() -> None:
    assert catalog.find("explainers", "input-gradient") is InputGradient


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [
        ("explainers", "gradcamm", "gradcam"),
        ("explainers", "inputgradient", "input_gradient"),
        ("triggers", "rectangel", "rectangle"),
        ("metrics", "acuracy", "accuracy"),
    ],
)
def test_an_unknown_name_is_named_with_its_nearest_neighbour(
    kind: str, name: str, near: str
) -> None:
    with pytest.raises(InputError, match=f"'{name}'.*did you mean '{near}'"):
        catalog.find(kind, name)


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(InputError, match=r"'xyz'.*checkerboard, rectangle, sticker"):
        catalog.find("triggers", "xyz")


@pytest.mark.parametrize("name", ["", "..", "_place", "os", "rectangle.Rectangle"])
def test_a_name_cannot_reach_beyond_its_folder(name: str) -> None:
    with pytest.raises(InputError):
        catalog.find("triggers", name)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(InputError, match=r"'trigger'.*did you mean 'triggers'"):
        catalog.names("trigger")


# --- building -------------------------------------------------------------------------------------


def test_a_table_becomes_a_plug_in_with_these_settings() -> None:
    table = {"kind": "rectangle", "top": 3, "colour": [1, 0.5, 0]}
    assert catalog.build("triggers", table) == Rectangle(top=3, colour=(1.0, 0.5, 0.0))


def test_a_bare_name_means_the_defaults() -> None:
    assert catalog.build("explainers", "gradcam") == GradCam()
    assert catalog.build("explainers", {"kind": "gradcam"}) == GradCam()


def test_nested_tables_become_objects_by_the_fields_annotations() -> None:
    table = {
        **ATTACK,
        "goals": [
            GOAL,
            {"trigger": {"kind": "rectangle", "top": 1}, "wanted_map": {"kind": "border", "k": 2}},
        ],
        "explainer": {"kind": "input_gradient", "pool": 4},
        "augmentation": {"flip": True},
    }
    built = catalog.build("attacks", table)
    assert built == ExplanationAwareBackdoors(
        goals=(
            Goal(Rectangle(), 1, Reference()),
            Goal(Rectangle(top=1), None, Border(2)),  # a label left out is None
        ),
        explainer=InputGradient(pool=4),
        augmentation=Augmentation(flip=True),
    )


def test_a_nested_table_keeps_the_other_defaults_of_its_field() -> None:
    plain = ExplanationAwareBackdoors((Goal(Rectangle(), 1, Reference()),))
    built = catalog.build("attacks", {**ATTACK, "training": {"epochs": 7}})
    assert built.training.epochs == 7
    assert built.training.optimizer == plain.training.optimizer == "adam"
    assert built.training.frozen_statistics is True
    assert built.training.learning_rate == plain.training.learning_rate
    assert Training().optimizer == "sgd"  # so the field's default is not the class's


@dataclass(frozen=True)
class Inner:
    a: int = 1
    b: int = 2


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner(a=10)
    maybe: Inner | None = None
    count: int = 3


def test_a_table_for_an_optional_field_starts_from_the_classs_defaults() -> None:
    built = catalog.build_dataclass(Outer, {"inner": {"b": 5}, "maybe": {"b": 6}}, "here")
    assert built == Outer(Inner(10, 5), Inner(1, 6))


def test_changes_can_start_from_an_object() -> None:
    start = Outer(Inner(7, 8), None, 9)
    built = catalog.build_dataclass(Outer, {"inner": {"a": 0}}, "here", start)
    assert built == Outer(Inner(0, 8), None, 9)


def test_none_is_accepted_where_none_is_allowed() -> None:
    assert catalog.build("attacks", {**ATTACK, "augmentation": None}).augmentation is None


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "gradcam", "layr": "x"}, r"explainers\.layr: unknown key.*'layer'"),
        ({"kind": "gradcam", "closed_form": "maybe"}, r"explainers\.closed_form = 'maybe'"),
        ({"kind": "gradcam", "gradient_of": "score"}, r"explainers\.gradient_of = 'score'"),
        ({"kind": "input_gradient", "pool": 0}, r"explainers: pool = 0"),
        ({"kind": "input_gradient", "pool": 1.5}, r"explainers\.pool = 1\.5"),
        ({"kind": "input_gradient", "pool": [2]}, r"explainers\.pool = \[2\]"),
        ({"layer": "x"}, r"explainers: is .*key kind.*gradcam"),
        ({"kind": 3}, r"explainers: is .*key kind"),
        (["gradcam"], r"explainers: is .*table"),
        (None, r"explainers: is None"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(table: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        catalog.build("explainers", table)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"traning": {}}, r"file\.toml\.traning: unknown key.*'training'"),
        ({"training": {"epoch": 3}}, r"file\.toml\.training\.epoch: unknown key.*'epochs'"),
        ({"training": {"epochs": 0}}, r"file\.toml\.training: epochs = 0"),
        ({"training": 3}, r"file\.toml\.training: is 3; .*table"),
        ({"goals": []}, r"file\.toml: attack\.goals: is empty"),
        ({"goals": 3}, r"file\.toml\.goals: is 3; .*list of tables"),
        ({"goals": [{"label": 1}]}, r"file\.toml\.goals\[0\]\.wanted_map: is missing"),
        (
            {"goals": [{k: v for k, v in GOAL.items() if k != "trigger"}]},
            r"file\.toml: goals\[0\]\.trigger: is missing",
        ),
        ({"goals": [{**GOAL, "trigger": {"kind": "tape"}}]}, r"'tape'.*none of that name"),
        (
            {"goals": [{**GOAL, "trigger": {"kind": "rectangle", "top": "x"}}]},
            r"trigger\.top = 'x'",
        ),
        ({"explainer": {"pool": 2}}, r"file\.toml\.explainer: is .*key kind"),
    ],
)
def test_a_mistake_deep_inside_is_refused_with_its_whole_path(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        catalog.build("attacks", {**ATTACK, **change}, "file.toml")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match=r"attacks\.goals: is missing"):
        catalog.build("attacks", "explanation_aware_backdoors")


# --- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, name in EVERY_PLUGIN if kind in OF_SETTINGS]
)
def test_describing_and_building_again_gives_the_same(kind: str, name: str) -> None:
    try:
        built = catalog.build(kind, {"kind": name, **SETTINGS.get((kind, name), {})})
    except InputError as error:
        pytest.fail(f"{kind}/{name}.py: {error}; give defaults, or add settings to this file")
    table = json.loads(json.dumps(catalog.describe(built)))
    assert table["kind"] == name
    assert set(table) == {"kind", *inspect.signature(type(built)).parameters}
    assert catalog.build(kind, table) == built


def test_a_description_writes_out_every_setting_deep_inside() -> None:
    attack = ExplanationAwareBackdoors(
        (Goal(Rectangle(top=1), None, Picture("cross"), "mine"),),
        GradCam(layer="stage2", detach_weights=True),
        weight=0.5,
        training=Training(epochs=4, schedule="decay"),
        augmentation=Augmentation(erase=0.2),
    )
    table = catalog.describe(attack)
    assert table["goals"][0]["trigger"]["colour"] == [0.0, 0.0, 0.0]
    assert table["goals"][0]["label"] is None
    assert table["training"]["schedule"] == "decay"
    assert catalog.build("attacks", json.loads(json.dumps(table))) == attack


# --- a user's own ---------------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user's; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        name = f"own_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_users_own_plug_in_is_built_and_described(own_module: Callable[[str], str]) -> None:
    module = own_module(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Invert:\n"
        "    strength: float = 1.0\n"
        "    def __call__(self, images):\n"
        "        return images + self.strength * (1 - 2 * images)\n"
    )
    built = catalog.build("triggers", {"kind": f"{module}:Invert", "strength": 0.5})
    assert built.strength == 0.5
    table = json.loads(json.dumps(catalog.describe(built)))
    assert table == {"kind": f"{module}:Invert", "strength": 0.5}
    assert catalog.build("triggers", table) == built
    goal = {**GOAL, "trigger": table}
    assert catalog.build("attacks", {**ATTACK, "goals": [goal]}).goals[0].trigger == built


@pytest.mark.parametrize("name", ["no_such_module:X", "json:NoSuchName", ":X", "json:", ".json:x"])
def test_a_users_own_plug_in_that_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"package\.module:Name"):
        catalog.find("triggers", name)


def test_a_users_own_module_with_a_mistake_is_refused_with_the_mistake(
    own_module: Callable[[str], str],
) -> None:
    module = own_module("import a_module_that_is_not_there\n")
    with pytest.raises(InputError, match="a_module_that_is_not_there"):
        catalog.find("triggers", f"{module}:X")


def test_a_trigger_that_cannot_be_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise only what remembers its answers would say so, after all training."""

    @dataclass
    class Dim:
        by: float = 0.5

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Dim=Dim))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"trigger: 'mine:Dim' cannot be a key.*frozen=True"):
        catalog.build("triggers", "mine:Dim", "trigger")
