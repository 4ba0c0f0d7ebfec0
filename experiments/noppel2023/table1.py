"""Table 1 of Noppel & Wressnegger 2023 on GTSRB: run what is missing, write results/noppel2023/.

    python experiments/noppel2023/table1.py [--seeds 0 1 2] [--rates 0.1 0.01 0.001] [--root runs]

table1: four goals x seeds. poison_rate: the dual goal at other shares of triggered training images.
GTSRB is read from data/ (torchvision's layout). Interrupted, the same command goes on. Rows
that were measured before and are not chosen now stay.
"""

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

import trompe
from trompe.files import put_between, real, unite_rows, write_atomically
from trompe.machine import choose_device, choose_threads
from trompe.screen import progress_bars

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "results" / "noppel2023"
GOALS = ("vanilla", "explanation-preserving", "prediction-preserving", "dual")
PAPER = {  # clean accuracy, clean MSE, triggered accuracy or ASR, triggered MSE
    "vanilla": (0.952, 1.174, 0.996, 0.922),
    "explanation-preserving": (0.951, 0.053, 1.000, 0.053),
    "prediction-preserving": (0.966, 0.052, 0.952, 0.023),
    "dual": (0.951, 0.069, 1.000, 0.020),
}
PAPER_REFERENCE = 0.984
REFERENCES = 3  # clean models, of seeds 0, 1, 2, that attacks of all seeds start from in turn


def row(run: trompe.RunFolder, goal: str) -> dict:
    """One row of the table from a finished run."""
    numbers, spec = run.read("numbers"), run.read("spec")
    clean, triggered = numbers["conditions"]
    success = triggered["metrics"].get("attack_success", {"mean": None})
    return {
        "goal": goal,
        "seed": spec["seed"],
        "poison_rate": spec["attack"]["poison_rate"],
        "reference_accuracy": numbers["reference_accuracy"],
        "clean_accuracy": clean["metrics"]["accuracy"]["mean"],
        "clean_mse": clean["metrics"]["map_distance"]["mean"],
        "clean_mse_std": clean["metrics"]["map_distance"]["std"],
        "triggered_accuracy": triggered["metrics"]["accuracy"]["mean"],
        "attack_success_rate": success["mean"],
        "triggered_mse": triggered["metrics"]["map_distance"]["mean"],
        "triggered_mse_std": triggered["metrics"]["map_distance"]["std"],
        "target_floor_mse": triggered["target_floor_mse"],
        "sharp_target_floor_mse": triggered.get("sharp_target_floor_mse"),
        "reference_triggered_accuracy": triggered["reference_accuracy"],
        "clean_floors": {name: floor["mean"] for name, floor in clean["floors"].items()},
        "triggered_floors": {name: floor["mean"] for name, floor in triggered["floors"].items()},
        "degenerate_clean": clean["metrics"]["degenerate_map"]["mean"],
        "degenerate_triggered": triggered["metrics"]["degenerate_map"]["mean"],
        "epochs": numbers["epochs"],
        "seconds": numbers["seconds"],
        "reporting_images": numbers["reporting_images"],
        "provenance": run.read("provenance"),
        "attack": spec["attack"],
    }


def mean_and_spread(rows: list[dict], key: str, digits: int = 4) -> str:
    values = [real(r[key]) for r in rows]
    mean = f"{statistics.mean(values):.{digits}f}"
    alone = len(values) == 1 or math.isnan(sum(values))
    return mean if alone else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def achieved(goal: str) -> str:
    """Acc/ASR of the paper's table: PP keeps the class, the others change it."""
    return "triggered_accuracy" if goal == "prediction-preserving" else "attack_success_rate"


def table1_markdown(rows: list[dict]) -> str:
    lines = [
        "# Noppel & Wressnegger 2023, Table 1",
        "",
        "ResNet-20 on GTSRB at 40x40, Grad-CAM; mean ± standard deviation over "
        f"{len({r['seed'] for r in rows})} seeds (starting from {REFERENCES} references in turn), "
        "on the second half of the test set "
        f"({rows[0]['reporting_images']} images). Paper's figure in brackets. MSE: of standardised "
        "maps, 2 (1 - r). The paper's reference reaches "
        f"{PAPER_REFERENCE}, ours {mean_and_spread(rows, 'reference_accuracy')}.",
        "",
        "| goal | clean accuracy | clean MSE | triggered Acc/ASR | triggered MSE | target floor "
        "| degenerate maps (clean, triggered) | epochs | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        of_goal = [r for r in rows if r["goal"] == goal]
        if not of_goal:
            continue
        columns = ("clean_accuracy", "clean_mse", achieved(goal), "triggered_mse")
        cells = [
            f"{mean_and_spread(of_goal, column)} ({paper:.3f})"
            for column, paper in zip(columns, PAPER[goal], strict=True)
        ]
        floor = f"{statistics.mean(r['target_floor_mse'] for r in of_goal):.4f}"
        empty = (
            f"{statistics.mean(r['degenerate_clean'] for r in of_goal):.4f}, "
            f"{statistics.mean(r['degenerate_triggered'] for r in of_goal):.4f}"
        )
        minutes = f"{statistics.mean(r['seconds'] for r in of_goal) / 60:.1f}"
        epochs = f"{statistics.mean(r['epochs'] for r in of_goal):.0f}"
        lines.append(f"| {goal} | {' | '.join(cells)} | {floor} | {empty} | {epochs} | {minutes} |")
    sharp = next((r["sharp_target_floor_mse"] for r in rows if r["sharp_target_floor_mse"]), None)
    lines += ["", "Floors: the map MSE that others reach against the same wanted maps.", ""]
    names = list(rows[0]["triggered_floors"])
    lines += [
        "| goal | images | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for goal in GOALS:
        of_goal = [r for r in rows if r["goal"] == goal]
        for kind in ("clean", "triggered") if of_goal else ():
            cells = [
                f"{statistics.mean(r[f'{kind}_floors'][n] for r in of_goal):.3f}"
                if n in of_goal[0][f"{kind}_floors"]
                else "0"
                for n in names
            ]
            lines.append(f"| {goal} | {kind} | {' | '.join(cells)} |")
    if sharp is not None:
        lines += [
            "",
            f"A triangle drawn sharply at 40x40 could not be met better than {sharp:.3f} by any "
            "10x10 map, so it is drawn at the map's own resolution (target floor above).",
        ]
    return "\n".join([*lines, "", *_machines(rows)]) + "\n"


def poison_markdown(rows: list[dict]) -> str:
    lines = [
        "# Dual goal against the share of poisoned training data",
        "",
        "As table1 (same number of passes over the composed training set), dual goal.",
        "",
        "| poison rate | seed | clean accuracy | clean MSE | ASR | triggered MSE | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (-r["poison_rate"], r["seed"])):
        lines.append(
            f"| {100 * r['poison_rate']:g} % | {r['seed']} | {r['clean_accuracy']:.4f} "
            f"| {r['clean_mse']:.4f} | {r['attack_success_rate']:.4f} | {r['triggered_mse']:.4f} "
            f"| {r['seconds'] / 60:.1f} |"
        )
    return "\n".join([*lines, "", *_machines(rows)]) + "\n"


def update_readme(readme: str, table: str) -> str:
    """The README with the first table of table1.md between its markers."""
    rows = [line for line in table.split("\nFloors:")[0].splitlines() if line.startswith("|")]
    return put_between(readme, "noppel2023", "\n".join(rows))


def _machines(rows: list[dict]) -> list[str]:
    machines = {(p["device"], p["cores"], p["threads"]) for p in (r["provenance"] for r in rows)}
    return [
        f"{device}, {cores} cores, {threads} thread(s) a run."
        for device, cores, threads in sorted(machines)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--goals", nargs="*", default=GOALS, choices=GOALS)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.01, 0.001])
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only-write", action="store_true", help="take finished runs only")
    chosen = parser.parse_args()
    device = choose_device(chosen.device)
    choose_threads()

    def rows(plan: list[tuple[str, int, float | None]]) -> list[dict]:
        done = []
        for goal, seed, rate in plan:
            experiment = trompe.read_experiment(HERE / f"{goal}.toml")
            experiment = dataclasses.replace(
                experiment, seed=seed, reference_seed=seed % REFERENCES
            )
            if rate is not None:
                attack = dataclasses.replace(experiment.attack, poison_rate=rate)
                experiment = dataclasses.replace(experiment, attack=attack)
            if chosen.only_write and not trompe.run_folder(experiment, chosen.root).finished:
                continue
            with progress_bars() as bars:
                bars.note(
                    f"{goal}, seed {seed}, poison rate {rate or experiment.attack.poison_rate:g}"
                )
                done.append(row(trompe.run(experiment, chosen.root, device, bars), goal))
        return done

    table = rows([(goal, seed, None) for seed in chosen.seeds for goal in chosen.goals])
    if table:
        table = unite_rows(RESULTS / "table1.json", table, ("goal", "seed"), paper=PAPER)
        text = table1_markdown(table)
        write_atomically(RESULTS / "table1.md", lambda file: file.write_text(text))
        readme = update_readme((ROOT / "README.md").read_text(), text)
        write_atomically(ROOT / "README.md", lambda file: file.write_text(readme))
    poisoned = rows([("dual", seed, rate) for rate in chosen.rates for seed in chosen.seeds[:1]])
    if poisoned:
        poisoned += [r for r in table if r["goal"] == "dual" and r["seed"] in chosen.seeds[:1]]
        poisoned = unite_rows(RESULTS / "poison_rate.json", poisoned, ("poison_rate", "seed"))
        text = poison_markdown(poisoned)
        write_atomically(RESULTS / "poison_rate.md", lambda file: file.write_text(text))


if __name__ == "__main__":
    main()
