"""Rules of the house that the import linter cannot say."""

import ast
from pathlib import Path

import pytest

import trompe
from trompe import catalog

SOURCE = Path(trompe.__file__).parent


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_plugins_of_one_folder_do_not_import_each_other(kind: str) -> None:
    for name in catalog.names(kind):
        others = {f"trompe.{kind}.{other}" for other in catalog.names(kind) if other != name}
        assert not others & imported(SOURCE / kind / f"{name}.py")


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_every_plugin_says_what_it_is(kind: str) -> None:
    for name in catalog.names(kind):
        plugin = catalog.find(kind, name)
        assert plugin.__doc__
        # A dataclass without a docstring gets its signature for one.
        assert not plugin.__doc__.startswith(f"{plugin.__name__}(")


def test_the_public_names_are_sorted_and_exist() -> None:
    assert trompe.__all__ == sorted(trompe.__all__)
    for name in trompe.__all__:
        assert getattr(trompe, name) is not None


def test_interfaces_import_nothing_of_trompe() -> None:
    names = imported(SOURCE / "interfaces.py")
    assert not any(name.startswith("trompe") for name in names)
    assert {name.split(".")[0] for name in names} - {"torch"} <= {
        "collections",
        "dataclasses",
        "types",
        "typing",
    }
