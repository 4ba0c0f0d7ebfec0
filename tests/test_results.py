"""What README and results/ say is what was measured."""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "experiments" / paper) for paper in ("noppel2023", "fang2020")]
TABLE = ROOT / "results" / "noppel2023" / "table1.json"

ROW_KEYS = {
    "goal",
    "seed",
    "reference_accuracy",
    "clean_accuracy",
    "clean_mse",
    "triggered_accuracy",
    "attack_success_rate",
    "triggered_mse",
    "target_floor_mse",
    "epochs",
    "seconds",
}


def test_table1_has_all_goals_seeds_and_keys() -> None:
    rows = json.loads(TABLE.read_text())["rows"]
    assert all(set(row) >= ROW_KEYS for row in rows)
    goals = {row["goal"] for row in rows}
    assert goals == {"vanilla", "explanation-preserving", "prediction-preserving", "dual"}
    assert all(len({r["seed"] for r in rows if r["goal"] == goal}) >= 3 for goal in goals)
    assert all(row["provenance"]["commit"] for row in rows)


def test_markdown_and_readme_are_made_from_the_rows() -> None:
    import table1

    rows = json.loads(TABLE.read_text())["rows"]
    text = TABLE.with_suffix(".md").read_text()
    assert text == table1.table1_markdown(rows)
    readme = (ROOT / "README.md").read_text()
    assert readme == table1.update_readme(readme, text)


def test_the_markdown_shows_means_of_the_rows() -> None:
    rows = json.loads(TABLE.read_text())["rows"]
    text = TABLE.with_suffix(".md").read_text()
    dual = [row["triggered_mse"] for row in rows if row["goal"] == "dual"]
    assert f"{statistics.mean(dual):.4f} ± {statistics.stdev(dual):.4f} (0.020)" in text


def test_the_poison_rates_are_there_with_provenance() -> None:
    rows = json.loads((TABLE.parent / "poison_rate.json").read_text())["rows"]
    assert {row["poison_rate"] for row in rows} >= {0.5, 0.1, 0.01, 0.001}
    assert all(set(row) >= ROW_KEYS and row["provenance"]["commit"] for row in rows)


def test_the_attack_steps_cost_is_there() -> None:
    file = ROOT / "results" / "benchmarks" / "attack_step.json"
    rows = json.loads(file.read_text())["rows"]
    assert {"resnet20"} <= {row["model"] for row in rows} <= {"resnet20", "vgg16", "resnet50"}
    for row in rows:
        assert set(row) >= {"model", "explainer", "step_ratio", "memory_ratio"}
        if row["explainer"] in ("gradcam", "simplegrad"):
            assert row["naive_ratio"] > row["step_ratio"]


FANG = ROOT / "results" / "fang2020"
FANG_KEYS = {
    *("setting", "model", "attacked", "observed", "kind", "inverted", "seed", "tau", "cr", "fsr"),
    *("fsr_area", "data_tau", "data_cr", "data_fsr", "reference_top1_clean"),
    *("reference_top1_triggered", "top1_clean", "top1_triggered", "top5_clean", "top5_triggered"),
}


def test_fangs_tables_hold_what_they_say() -> None:
    import tables

    for table, (systems, inverted) in tables.TABLES.items():
        file = FANG / f"table{table}.json"
        if not file.exists():
            assert table in {"4a", "4b"}, f"{file} is missing"  # not run yet
            continue
        rows = json.loads(file.read_text())["rows"]
        assert rows
        for row in rows:
            assert set(row) >= FANG_KEYS
            assert len(row["attacked"].split("+")) == systems
            assert row["inverted"] == inverted
            assert row["provenance"]["commit"]
            assert "+changes" not in row["provenance"]["commit"]
        text = file.with_suffix(".md").read_text()
        assert text == tables.markdown(f"Table {table}", rows)


def test_the_readme_shows_fangs_rows() -> None:
    import tables

    readme = (ROOT / "README.md").read_text()
    table = tables.readme_table(tables.measured())
    assert readme == tables.put_between(readme, "fang2020", table)


# --- Viering et al. 2019 --------------------------------------------------------------------------

VIERING = ROOT / "results" / "viering2019"


def tables_of(paper: str) -> Any:
    """experiments/<paper>/tables.py; several have this name."""
    file = ROOT / "experiments" / paper / "tables.py"
    spec = importlib.util.spec_from_file_location(f"{paper}_tables", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def viering() -> Any:
    return tables_of("viering2019")


@pytest.mark.parametrize("number", ["1", "2"])
def test_vierings_tables_hold_what_they_say(number: str) -> None:
    rows = json.loads((VIERING / f"table{number}.json").read_text())["rows"]
    keys = {"technique", "model", "data", "dtype", "accuracy", "accuracy_change"}
    keys |= {"score_change_max", "score_change_mean", "map_l1_sum", "map_l1_mean"}
    keys |= {"overflow", "bound"}
    for row in rows:
        assert "refused" in row or set(row) >= keys
        assert row["provenance"]["commit"]
        assert "+changes" not in row["provenance"]["commit"]
    float32 = {(r["model"], r["technique"]) for r in rows if r["dtype"] == "float32"}
    models = {"resnet20", "vgg_small", "squeezenet", "mobilenet_v2"}
    techniques = {"1": {"T1", "T2", "T3", "T5 flat"}, "2": {"T4"}}[number]
    assert float32 >= {(m, t) for m in models for t in techniques}
    text = (VIERING / f"table{number}.md").read_text()
    assert text == viering().markdown(f"Table {number}", rows)


def test_no_measured_change_of_vierings_scores_is_above_its_bound() -> None:
    rows = [r for n in "12" for r in json.loads((VIERING / f"table{n}.json").read_text())["rows"]]
    for row in rows:
        if "refused" not in row and row["bound"] is not None and row["overflow"] == 0:
            moved, unit = row["score_change_max"], {"float64": 1e-9}.get(row["dtype"], 1e-4)
            if row["dtype"] in ("float32", "float64"):  # in half precision scores round as well
                assert moved <= row["bound"] + unit, row


def test_the_readme_and_the_other_pages_show_vierings_rows() -> None:
    tables, readme = viering(), (ROOT / "README.md").read_text()
    assert readme == tables.put_between(readme, "viering2019", tables.readme_table())
    pages = {"detections": tables.detection_markdown, "transfer": tables.transfer_markdown}
    for name, page in pages.items():
        rows = json.loads((VIERING / f"{name}.json").read_text())["rows"]
        assert not any(math.isnan(v) for r in rows for v in r.values() if isinstance(v, float))
        assert (VIERING / f"{name}.md").read_text() == page(rows)


ZHANG_KEYS = {
    *("data", "interpreter", "attack", "victims", "targets", "l1_mean", "l1_std"),
    *("jaccard_top20", "jaccard_half", "class_kept", "victim_accuracy"),
    *("clean_victim_accuracy", "poison_rate"),
}


def test_zhangs_rows_are_there_and_their_pages_are_made_from_them() -> None:
    tables = tables_of("zhang2021")
    file = ROOT / "results" / "zhang2021" / "table2.json"
    rows = json.loads(file.read_text())["rows"]
    assert all(set(row) >= ZHANG_KEYS for row in rows)
    assert all(row["provenance"]["commit"] for row in rows)
    assert all(row["targets"] == 10 and row["victims"] == 10 for row in rows)
    main = {
        (r["data"], r["interpreter"], r["attack"])
        for r in rows
        if tables.who(r) == "as trained for" and not r["changed"]
    }
    assert main == {
        (data, interpreter, attack)
        for data in tables.DATA
        for interpreter in tables.INTERPRETERS
        for attack in ("none", "wm", "imf", "eq4")
    }
    assert file.with_suffix(".md").read_text() == tables.markdown(rows)
    readme = (ROOT / "README.md").read_text()
    assert readme == tables.put_between(readme, "zhang2021", tables.readme_table(rows))
