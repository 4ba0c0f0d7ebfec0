"""Run folders -> one HTML file that needs nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from trompe.files import write_atomically
from trompe.overlay import COLOURS
from trompe.report import verdict as rules
from trompe.report.curves import film_curve, panels
from trompe.report.gallery import films, galleries, titles
from trompe.report.pictures import colour_bar
from trompe.report.reading import Change, Run, load_all
from trompe.report.tables import floor_grid, fooling_grid, main_rows, metric_grid, percent
from trompe.report.verdict import verdict
from trompe.runs import RunFolder


def render(runs: Sequence[RunFolder], file: Path) -> None:
    """Write a self-contained page about finished runs to `file`.

    Raises InputError, and leaves `file` as it was, if there is no run, or one that has not
    finished or cannot be read, or if `file` cannot be written.
    """
    text = _page(load_all(runs))
    write_atomically(Path(file), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _page(runs: list[Run]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trompe", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = titles(runs)
    return environment.get_template("page.html").render(
        runs=runs,
        names=names,
        verdicts=[verdict(run) for run in runs],
        rows=main_rows(runs),
        fooling=fooling_grid(runs),
        floors=floor_grid(runs),
        metrics=metric_grid(runs),
        galleries=galleries(runs),
        colours=COLOURS,
        colour_bar=colour_bar(),
        architectures=_architectures(runs),
        films=[films(run) for run in runs],
        film_curves=[film_curve(run, f"run{k}") for k, run in enumerate(runs)],
        panels=[panels(run, f"run{k}") for k, run in enumerate(runs)],
        limits={
            "success": percent(rules.SUCCESS),
            "kept": percent(rules.KEPT),
            "shown": rules.SHOWN,
            "shown_l1": rules.SHOWN_L1,
            "unnoticed": percent(rules.UNNOTICED),
            "fooled": percent(rules.FOOLED),
            "true": percent(rules.TRUE),
        },
        plain=_plain,
    )


def _architectures(runs: list[Run]) -> list[tuple[str, tuple[Change, ...]]]:
    """Title and changes once per run folder that says what was changed."""
    first = {run.path: run for run in reversed(runs)}  # of several explainers
    known = [run for run in runs if run is first[run.path] and run.architecture is not None]
    return [
        (title, run.architecture or ()) for title, run in zip(titles(known), known, strict=True)
    ]


def _plain(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
