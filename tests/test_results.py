"""What README and results/ say is what was measured."""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "noppel2023"))
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
