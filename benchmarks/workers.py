"""How many small runs two processes finish in the time of one.

python benchmarks/workers.py [--rounds 5] [--runs 6] [--epochs 4] [--workers 1 2] [--out FILE]

A turn is a number of independent attacks on drawn traffic signs, each process with one CPU thread:
one after the other in this process, or side by side in so many others. Turns alternate (A B, B A,
...), so that other work on the machine slows all alike. Two times are taken of each: all of it,
with the start of the processes, and from the first run's begin to the last one's end. A ratio is
the median over rounds of (runs per second / runs per second of one process in the same round).
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track

from trompe.experiment import AttackJob
from trompe.files import unite_rows, write_atomically
from trompe.machine import cores
from trompe.many import Crew, Place, run_jobs
from trompe.runs import provenance
from trompe.screen import Screen

ATTACK: dict[str, Any] = {
    "reference": "shipped:signs_resnet20_seed0",
    "witness": "shipped:signs_resnet20_seed1",
    "data": {"kind": "signs", "size": 32, "train_images": 400, "test_images": 200},
    "attack": {
        "kind": "explanation_aware_backdoors",
        "goals": [
            {
                "trigger": {"kind": "rectangle", "top": 20, "left": 11, "height": 5, "width": 10},
                "label": 7,
                "wanted_map": {"kind": "picture", "shape": "triangle"},
            }
        ],
    },
}


@dataclass(frozen=True)
class Timed:
    """An attack that says when it began and ended, in seconds since 1970."""

    job: AttackJob

    @property
    def name(self) -> str:
        return self.job.name

    def __call__(self, place: Place, screen: Screen) -> tuple[float, float]:
        began = time.time()
        self.job(place, screen)
        return began, time.time()


def turn(workers: int, runs: int, epochs: int) -> tuple[float, float]:
    """Seconds of it all, and from the first run's begin to the last one's end."""
    training = {"epochs": epochs, "batch_size": 32}
    table = {**ATTACK, "name": "small", "attack": {**ATTACK["attack"], "training": training}}
    jobs = [Timed(AttackJob({**table, "seed": seed})) for seed in range(runs)]
    began = time.time()
    with tempfile.TemporaryDirectory() as root:
        found = list(run_jobs(jobs, Place(Path(root), "cpu"), Crew(workers, threads=1)))
    ended = time.time()
    if failed := [outcome.error for outcome in found if outcome.error]:
        raise SystemExit(failed[0])
    times = [outcome.result for outcome in found]
    return ended - began, max(end for _, end in times) - min(begin for begin, _ in times)


def measure(counts: Sequence[int], runs: int, epochs: int, rounds: int) -> list[dict[str, Any]]:
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for number in track(range(rounds), "workers"):
        for count in counts if number % 2 == 0 else reversed(counts):
            found[count].append(turn(count, runs, epochs))
    made = provenance(torch.device("cpu"))
    rows = []
    for count in counts:
        row: dict[str, Any] = {"workers": count, "runs": runs, "epochs": epochs, "rounds": rounds}
        for which, name in enumerate(("whole", "running")):
            ratios = [
                one[which] / own[which]
                for one, own in zip(found[counts[0]], found[count], strict=True)
            ]
            row[name] = {
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "seconds": median(own[which] for own in found[count]),
            }
        rows.append({**row, "cores": cores(), "provenance": made})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Runs per second of processes side by side, as a multiple of one process",
        "",
        "Made by `python benchmarks/workers.py`. Median over rounds, in brackets the range. "
        "Attacks with ResNet-20 on 400 drawn signs of 32 x 32, one CPU thread a process. "
        "running: from the first run's begin to the last one's end; whole: with the start of the "
        "processes.",
        "",
        "| processes | cores | runs, epochs each | running | whole | seconds, running | whole |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratios = [
            f"{r[name]['ratio']:.2f} ({r[name]['lowest']:.2f}-{r[name]['highest']:.2f})"
            for name in ("running", "whole")
        ]
        lines.append(
            f"| {r['workers']} | {r['cores']} | {r['runs']}, {r['epochs']} | {ratios[0]} | "
            f"{ratios[1]} | {r['running']['seconds']:.1f} | {r['whole']['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="the first: one")
    parser.add_argument("--out", type=Path, help="a .json, whose rows are kept, and a .md")
    chosen = parser.parse_args()
    rows = measure(chosen.workers, chosen.runs, chosen.epochs, chosen.rounds)
    print(markdown(rows))
    if chosen.out is not None:
        every = unite_rows(chosen.out, rows, ("workers", "cores", "runs", "epochs"))
        write_atomically(
            chosen.out.with_suffix(".md"), lambda place: place.write_text(markdown(every), "utf-8")
        )


if __name__ == "__main__":
    main()
