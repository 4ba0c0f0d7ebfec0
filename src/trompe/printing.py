"""What the command line shows in the terminal: one function for each table."""

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from trompe.files import real
from trompe.interfaces import InputError
from trompe.poison_sets import read_card, set_folders
from trompe.replicating import Cell, Paper, Plan, Results, misses, paper_names, read_paper, to_run
from trompe.replicating import choose as choose_cells
from trompe.run_list import HEADLINES, Run, differences, headline
from trompe.run_shapes import AttackNumbers, PoisonNumbers
from trompe.runs import RunFolder
from trompe.visibility import Visibility


def print_papers(results: Results) -> None:
    """Papers and their tables: which rows are there, and how many runs are missing."""
    plan = Plan(small=results.small)
    shown = Table(title=f"rows in {results.folder}")
    for column in ("paper", "table", "rows there", "runs", "missing or of other settings"):
        shown.add_column(column)
    for paper in map(read_paper, paper_names()):
        for table in paper.tables:
            if plan.small and not table.small:
                continue
            chosen = choose_cells(paper, plan, table.name)
            missing = to_run(paper, chosen, results).get(table.name, [])
            rows = len(results.rows(paper, table))
            runs = len(chosen.get(table.name, []))
            shown.add_row(paper.name, table.name, str(rows), str(runs), str(len(missing)))
    Console().print(shown)


def print_cells(chosen: dict[str, list[Cell]], missing: dict[str, list[Cell]]) -> None:
    """A line for each cell, which can be taken apart by other programs."""
    for table, cells in chosen.items():
        for cell in cells:
            there = "missing" if cell in missing.get(table, []) else "there"
            print(f"{table}\t{cell.row}\t{cell.name}\t{there}")


def print_table(paper: Paper, name: str, results: Results) -> None:
    """Ours beside what was asked and the floors; below it, why some was missed."""
    (table,) = (table for table in paper.tables if table.name == name)
    rows = results.rows(paper, table)
    figures = table.figures(rows) if rows else []
    file = results.file(paper, table).with_suffix(".md")
    if figures:
        causes = [] if results.small else misses(paper, table, rows)
        whys = list(dict.fromkeys(why for _, why in causes))
        numbers = {(f.row, f.column): whys.index(why) + 1 for f, why in causes}
        shown = Table(title=f"{paper.name} {name}")
        for column in ("row", "", "ours", "95 % CI", "seeds", "asked", "floors", "miss"):
            shown.add_column(column)
        for f in figures:
            interval = "" if math.isnan(f.ours.low) else f"{f.ours.low:.4g} .. {f.ours.high:.4g}"
            spread = "" if math.isnan(f.ours.std) else f" ± {f.ours.std:.2g}"
            asked = "" if math.isnan(f.asked) else f"{f.asked:.4g} ({f.by})"
            floors = ", ".join(f"{who} {real(value):.3g}" for who, value in f.floors.items())
            miss = str(numbers.get((f.row, f.column), ""))
            ours = f"{f.ours.mean:.4g}{spread}"
            shown.add_row(f.row, f.column, ours, interval, str(f.ours.seeds), asked, floors, miss)
        Console().print(shown)
        for number, why in enumerate(whys, 1):
            print(f"miss {number}: {why}")
    print(f"table {file}" if rows else f"table {file}: no row yet")


def print_numbers(folder: RunFolder) -> None:
    """Table 1's columns, with the floors beside each map distance."""
    numbers = folder.read("numbers", AttackNumbers)
    reference = real(numbers["reference_accuracy"])
    table = Table(title=f"{folder.path.name}: reference {reference:.4f}")
    for column in ("images", "accuracy", "ASR", "map MSE", "floors: map MSE of"):
        table.add_column(column)
    for row in numbers["conditions"]:
        metrics = row["metrics"]
        distance = metrics["map_distance"]
        success = metrics.get("attack_success")
        table.add_row(
            row["name"],
            f"{real(metrics['accuracy']['mean']):.4f}",
            "" if success is None else f"{real(success['mean']):.4f}",
            f"{real(distance['mean']):.4f} ± {real(distance['std']):.4f}",
            ", ".join(f"{name} {real(v['mean']):.3f}" for name, v in row["floors"].items()),
        )
    triggers = [c["trigger"] for c in numbers["conditions"] if c.get("trigger") is not None]
    seen = dict.fromkeys(str(Visibility.read(trigger)) for trigger in triggers)  # once each
    table.caption = f"trigger: {'; '.join(seen)}" if seen else None
    Console().print(table)
    if rates := numbers.get("fooling"):
        _print_fooling(rates)


def _print_fooling(rates: list[dict[str, Any]]) -> None:
    """How many maps lie and how many do not, of each attacked explainer."""
    table = Table(title="fooling success rate and correct rate, in %")
    for column in ("explainer", "tau", "FSR", "CR", "tau, data", "FSR", "CR", "area"):
        table.add_column(column)
    for row in rates:
        cells = [row["explainer"]]
        for of in ("", "data_"):
            cells += ["—" if row[f"{of}tau"] is None else f"{row[f'{of}tau']:.3f}"]
            shares = (row[f"{of}fsr"], row[f"{of}cr"])
            cells += ["—" if share is None else f"{100 * share:.1f}" for share in shares]
        table.add_row(*cells, f"{real(row['fsr_area']):.3f}")
    Console().print(table)


def print_runs(runs: list[Run]) -> None:
    """One a row, the newest first."""
    table = Table(title=f"{len(runs)} runs, {megabytes(runs):.1f} MB")
    table.add_column("run", overflow="fold")
    for column in ("kind", "state", "seed", "when", "MB", *HEADLINES):
        table.add_column(column)
    for one in runs:
        table.add_row(
            escape(one.name),
            one.kind,
            one.told_state,
            "" if one.seed is None else str(one.seed),
            one.started[:16].replace("T", " "),
            f"{megabytes([one]):.1f}",
            *(headline(one, title) for title in HEADLINES),
        )
    Console().print(table)


def megabytes(runs: list[Run]) -> float:
    return sum(one.size for one in runs) / 1e6


def print_differences(runs: list[Run]) -> None:
    """Settings that are not the same in all runs, and below them all numbers."""
    if len(runs) < 2:
        raise InputError(f"--compare: {len(runs)} runs found; name or filter at least two")
    table = Table("", *(Column(escape(one.name), overflow="fold") for one in runs))
    for key, values in differences(runs).items():
        table.add_row(key, *map(escape, values))
    table.add_section()
    for key in dict.fromkeys(key for one in runs for key in one.numbers):
        numbers = (one.numbers.get(key) for one in runs)
        table.add_row(key, *("" if number is None else f"{number:.4f}" for number in numbers))
    Console().print(table)


_SHOWN = 5  # best points


def print_search(found: dict[str, Any]) -> None:
    """The best points, and what they all took."""
    rows = [row for row in found["rows"] if row["state"] == "complete"]
    rows.sort(key=lambda row: row["score"])
    names = list(found["rows"][0]["settings"])
    states = [row["state"] for row in found["rows"]]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed")
    )
    spent, saved = (found[key] / 60 for key in ("seconds", "seconds_saved"))
    table = Table(
        title=f"{found['name']}: the best of {len(states)} points",
        caption=f"{counts}; {spent:.1f} minutes, pruning saved about {saved:.1f}",
    )
    for column in (*names, found["search"]["score"], "epochs", "seconds"):
        table.add_column(column)
    for row in rows[:_SHOWN]:
        values = (str(value) for value in row["settings"].values())
        table.add_row(*values, f"{row['score']:.4f}", str(row["epochs"]), f"{row['seconds']:.0f}")
    Console().print(table)


def print_poisons(folder: RunFolder) -> None:
    """How much was changed, for each target."""
    numbers = folder.read("numbers", PoisonNumbers)
    share = f"{numbers['poisons']} poisons for {numbers['training_set']} training samples"
    table = Table(title=f"{folder.path.name}: {share}")
    for column in ("target", "class", "poisons", "max change", "mean change", "PSNR, dB"):
        table.add_column(column)
    for number, one in enumerate(set_folders(folder.path), 1):
        card = read_card(one)
        table.add_row(
            str(number),
            escape(card["class_names"][card["label"]]),
            str(card["poisons"]),
            f"{card['max_change']:.3f}",
            f"{card['mean_change']:.4f}",
            "none changed" if card["psnr"] is None else f"{card['psnr']:.1f}",
        )
    Console().print(table)


def print_victims(folder: RunFolder, numbers: dict[str, Any]) -> None:
    """Victims of the clean and of the poisoned sets, one below the other."""
    caption = f"L1: from the wanted map, ± over all victims. Succeeded: {numbers['success']}."
    size = f"{numbers['poisoned']['victims']} victims for each of {numbers['poisoned']['targets']}"
    table = Table(title=f"{folder.path.name}: {size} targets", caption=caption)
    table.add_column("victims", no_wrap=True)
    for column in ("L1", "Jaccard top 20 %", "Jaccard > .5", "empty", "class kept", "accuracy"):
        table.add_column(column)
    table.add_column("targets succeeded")
    for name, key in (("un-attacked", "unattacked"), ("poisoned", "poisoned")):
        row = numbers[key]
        keys = ("jaccard_top20", "jaccard_half", "degenerate", "class_kept")
        means = [real(row.get(key)) for key in keys]  # older runs did not look for empty maps
        table.add_row(
            name,
            f"{real(row['l1']):.4f} ± {real(row['l1_std']):.4f}",
            *(f"{value:.3f}" for value in means),
            f"{row['victim_accuracy']:.4f}",
            f"{numbers['succeeded']:.2f}" if key == "poisoned" else "",
        )
    Console().print(table)
