"""What the documentation names is there."""

import ast
import dataclasses
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trompe

ROOT = Path(__file__).parent.parent
SOURCE = Path(trompe.__file__).parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAPERS = {"fang2020", "noppel2023", "viering2019", "zhang2021"}


def table_rows(text: str) -> Iterator[str]:
    """Rows of Markdown tables, outside fenced code."""
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and line.startswith("|"):
            yield line


def is_path(token: str) -> bool:
    return re.fullmatch(r"[\w./-]+(/|\.(py|toml|md|html))", token) is not None


def located(path: str) -> Path | None:
    """A path as the documents write it: below src/trompe, or below the repository's root."""
    return next((base / path for base in (SOURCE, ROOT) if (base / path).exists()), None)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_no_sentence_is_there_twice(page: Path) -> None:
    """A merge once left a page with a whole section doubled."""
    lines = [line for line in page.read_text().splitlines() if len(line) > 60]
    assert sorted(lines) == sorted(set(lines))


def named_in(file: Path) -> set[str]:
    """Functions, classes, methods, fields and constants of a Python file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def rows_with_code() -> list[Any]:
    rows = []
    for page in PAGES:
        for row in table_rows(page.read_text()):
            tokens = re.findall(r"`([^`]+)`", row)
            if tokens:
                rows.append(pytest.param(tokens, id=f"{page.stem}: {' '.join(tokens)[:60]}"))
    return rows


@pytest.mark.parametrize("tokens", rows_with_code())
def test_paths_and_names_in_tables_exist(tokens: list[str]) -> None:
    words = [word for token in tokens for word in token.split()]
    paths = [word for word in words if is_path(word) and not word.startswith("results/")]
    missing = [path for path in paths if located(path) is None]
    assert not missing, f"named in the docs, but not there: {missing}"

    files = [file for path in paths if path.endswith(".py") and (file := located(path))]
    known = named_in(SOURCE / "interfaces.py").union(*(named_in(file) for file in files))
    dotted = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
    names = [token for token in tokens if re.fullmatch(dotted, token) and not is_path(token)]
    unknown = [name for name in names if files and not set(name.split(".")) <= known]
    assert not unknown, f"not defined in {[file.name for file in files]}: {unknown}"


def test_the_nouns_are_those_of_interfaces() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## Nouns")[1].split("##")[0]
    nouns = {match[1] for row in table_rows(table) if (match := re.match(r"\| `(\w+)`", row))}
    assert nouns
    assert nouns <= named_in(SOURCE / "interfaces.py")


def test_every_file_and_folder_of_the_source_is_explained() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## Files")[1].split("\n## ")[0]
    explained = {m[1] for row in table_rows(table) if (m := re.match(r"\| `([\w.]+)/?`", row))}
    here = {p.name for p in SOURCE.iterdir() if p.suffix == ".py" or any(p.glob("*.*"))}
    assert here - {"__pycache__"} <= explained


def decisions() -> list[dict[str, Any]]:
    return tomllib.loads((ROOT / "docs" / "decisions.toml").read_text())["decision"]


def test_decisions_have_all_keys_and_ids_of_their_own() -> None:
    keys = {"id", "papers", "question", "paper", "code", "default", "setting"}
    assert all(set(decision) == keys for decision in decisions())
    assert all(decision["question"] and decision["default"] for decision in decisions())
    assert all(set(decision["papers"]) <= PAPERS for decision in decisions())
    ids = [decision["id"] for decision in decisions()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "setting", sorted({decision["setting"] for decision in decisions()} - {""})
)
def test_settings_of_decisions_are_fields(setting: str) -> None:
    module, cls, field = setting.rsplit(".", 2)
    fields = dataclasses.fields(getattr(importlib.import_module(module), cls))
    assert field in {f.name for f in fields}


def test_pages_name_decisions_by_their_ids() -> None:
    ids = {decision["id"] for decision in decisions()}
    for page in PAGES:
        linked = set(re.findall(r"\[([\w-]+)\]\(decisions\.toml\)", page.read_text()))
        assert linked - {"decisions"} <= ids, page.name
