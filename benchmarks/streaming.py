"""Images in memory beside images that stay on disk: peak memory and speed, for few and for many.

python benchmarks/streaming.py [--counts 1000 100000] [--rounds 3] [--size 64] [--out FILE]

| contender    | where the images are                                                         |
|--------------|------------------------------------------------------------------------------|
| in memory    | decoded once, all kept                                                       |
| streamed, k  | on disk; decoded when needed, k processes reading ahead (0: none but this)   |

Drawn signs are written as JPEG files, one folder a class. Each contender is a process of its own
that reads the set (all files once: an unreadable one shall be known before a training begins),
composes it with a trigger, passes once through its shuffled batches with a forward pass each, and
asks for scores and Grad-CAM maps of all images. A network small enough to wait for its images.

Memory is the process's peak, plus that of the largest reading process times their number; beside
it, what the process had before it read any image, torch being most of it. Contenders take turns
(A B C D, A B C D), so that other work on the machine slows all alike; a ratio is the median over
rounds of (contender's images a second / those in memory in the same round).
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import nn

from trompe.data.image_folder import ImageFolder
from trompe.data.signs import CLASS_NAMES, draw
from trompe.evaluate import answers
from trompe.explainers.gradcam import GradCam
from trompe.files import unite_rows, write_atomically
from trompe.interfaces import Goal, ImageSet
from trompe.machine import choose_threads
from trompe.poison import ShuffledBatches, compose
from trompe.runs import provenance
from trompe.target_maps.reference import Reference
from trompe.triggers.rectangle import Rectangle

CONTENDERS = {"in memory": None, **{f"streamed, {k}": k for k in (0, 1, 2)}}
PHASES = ("reading", "epoch", "answers")
TEST_SHARE, BATCH, AT_ONCE = 0.02, 128, 1000


def write_images(root: Path, count: int, size: int) -> None:
    """So many drawn signs as root/<class>/<number>.jpg, a thousand in memory at a time."""
    for name in CLASS_NAMES:
        (root / name).mkdir(parents=True)
    dice = torch.Generator().manual_seed(0)
    for start in track(range(0, count, AT_ONCE), f"drawing {count} images"):
        labels = torch.arange(start, min(start + AT_ONCE, count)) % len(CLASS_NAMES)
        for number, image in enumerate(draw(labels, size, dice).images, start=start):
            file = root / CLASS_NAMES[number % len(CLASS_NAMES)] / f"{number:07}.jpg"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, quality=90)


def network() -> nn.Module:
    """Two convolutions: about the cheapest model that has a Grad-CAM."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, len(CLASS_NAMES)),
    ).eval()


def one(root: Path, size: int, readers: int | None) -> dict[str, float]:
    """Seconds of each phase, and memory in MB. readers None: in memory."""
    choose_threads(1)
    model, goal = network(), Goal(Rectangle(), 0, Reference())
    before = _peak(os.getpid())
    source = ImageFolder(
        str(root), size, TEST_SHARE, in_memory=readers is None, readers=readers or 0
    )
    found: dict[str, float] = {"before": before}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        found[phase] = time.perf_counter() - started
        return result

    data: ImageSet = timed("reading", source.train)
    timed("epoch", lambda: epoch(model, data, goal))
    timed("answers", lambda: answers(model, (GradCam("3"),), data))
    found["images"] = len(data)
    reading = multiprocessing.active_children()
    found["reader"] = max((_peak(process.pid or 0) for process in reading), default=0.0)
    found["peak"] = _peak(os.getpid()) + found["reader"] * len(reading)
    return found


def epoch(model: nn.Module, data: ImageSet, goal: Goal) -> None:
    dice = torch.Generator().manual_seed(0)
    triples = compose(data, (goal,), 0.1, dice)
    with torch.no_grad():
        for batch in ShuffledBatches(triples, BATCH)(dice):
            model(batch.images)


def _peak(pid: int) -> float:
    """MB of memory that a process has had at most. (Linux; getrusage counts its parent's, too.)"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def apart(root: Path, size: int, contender: str) -> dict[str, float]:
    """`one`, in a process of its own."""
    command = [sys.executable, __file__, "--one", contender, str(root), "--size", str(size)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(told.stdout)
    return result


def measure(count: int, size: int, rounds: int, place: Path) -> list[dict[str, Any]]:
    root = place / str(count)
    write_images(root, count, size)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in track(range(rounds), f"{count} images"):
        for name in CONTENDERS:
            found[name].append(apart(root, size, name))
    made = provenance(torch.device("cpu"))
    return [
        {
            "images": int(runs[0]["images"]),
            "size": size,
            "contender": name,
            **{key: max(run[key] for run in runs) for key in ("peak", "before", "reader")},
            "seconds": {phase: median(run[phase] for run in runs) for phase in PHASES},
            "ratios": {
                phase: sorted(
                    memory[phase] / run[phase]
                    for memory, run in zip(found["in memory"], runs, strict=True)
                )
                for phase in PHASES
            },
            "rounds": rounds,
            "provenance": made,
        }
        for name, runs in found.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Images in memory and images on disk",
        "",
        "Made by `python benchmarks/streaming.py`. Drawn signs as JPEG files; a network so small "
        "that it waits for its images. Memory: the highest peak over rounds, that of reading "
        "processes included, less what the process had before it read an image. Speed: images a "
        "second, as a multiple of those in memory in the same round; median over rounds, in "
        "brackets the range. Reading: each file once, in memory by 4 threads.",
        "",
        "| images | size | contender | memory, MB | a reader's | reading | epoch | answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratios = " | ".join(
            f"{median(v):.2f} ({v[0]:.2f}-{v[-1]:.2f})" for v in r["ratios"].values()
        )
        lines.append(
            f"| {r['images']} | {r['size']} | {r['contender']} | {r['peak'] - r['before']:.0f} | "
            f"{r['reader']:.0f} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 100_000])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a .json, whose rows are kept, and a .md")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a contender and a folder
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(Path(chosen.one[1]), chosen.size, CONTENDERS[chosen.one[0]])))
        return
    with tempfile.TemporaryDirectory() as place:
        rows = [
            row
            for count in chosen.counts
            for row in measure(count, chosen.size, chosen.rounds, Path(place))
        ]
    print(markdown(rows))
    if chosen.out is not None:
        every = unite_rows(chosen.out, rows, ("images", "size", "contender"))
        write_atomically(
            chosen.out.with_suffix(".md"), lambda place: place.write_text(markdown(every), "utf-8")
        )


if __name__ == "__main__":
    main()
