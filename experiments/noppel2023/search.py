"""The search of Noppel & Wressnegger 2023, section 5: go on with it, write results/noppel2023/.

    python experiments/noppel2023/search.py [--goals dual] [--root runs] [--workers 2]
        [--scheduler tcp://...] [--storage postgresql://...]

For each goal search_<goal>.json, .md and .png, from the search's folder below --root. GTSRB is read
from data/ (torchvision's layout). Interrupted, the same command goes on.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import trompe
from trompe.files import read_json, write_atomically, write_json
from trompe.machine import choose_threads
from trompe.many import crew_of
from trompe.report.search_pictures import draw_search
from trompe.screen import progress_bars
from trompe.search import SearchFolder, search_folder

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "results" / "noppel2023"
GOALS = {"dual": "dual", "ep": "explanation-preserving", "pp": "prediction-preserving"}
PARAMETERS = ("lambda", "learning rate")
PAPER_EPOCHS = 100  # of a point, at most (section 5); four epochs without progress end it
GTSRB_IMAGES = 26640  # in the training set
STEP = {  # the benchmark's row: this network and its size
    "model": "resnet20",
    "size": 40,
    "precision": "float32",
    "statistics": "frozen",
    "explainer": "gradcam",
}


def row(of: dict[str, Any]) -> dict[str, Any]:
    """One point, flat."""
    settings = {name.replace(" ", "_"): of["settings"][name] for name in PARAMETERS}
    kept = ("epochs", "pruned", "score", "state", "seconds")
    return {**settings, **{name: of[name] for name in kept}}


def results(goal: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a search: without what only its machine knows."""
    rows = [row(of) for of in found["rows"]]
    rows.sort(key=lambda r: (r["lambda"], r["learning_rate"]))
    beside = ("points", "seconds", "seconds_saved", "provenance", "search", "experiment")
    return {"goal": GOALS[goal], **{name: found[name] for name in beside}, "rows": rows}


def images(found: dict[str, Any]) -> str:
    """How many images a point is trained with."""
    count = found["experiment"]["attack"]["training_images"]
    return "all training images" if count is None else f"{count:,} training images"


def shrinking(found: dict[str, Any]) -> list[str]:
    """What each economy divides the search's cost by, and all together."""
    attack = found["experiment"]["attack"]
    epochs, taken = attack["training"]["epochs"], attack["training_images"]
    run, planned = sum(r["epochs"] for r in found["rows"]), epochs * len(found["rows"])
    if not run or not taken:
        return []
    (step,) = (
        row
        for row in read_json(RESULTS.parent / "benchmarks" / "attack_step.json")["rows"]
        if all(row[key] == value for key, value in STEP.items())
    )
    factors = {
        f"{epochs} epochs a point instead of the paper's {PAPER_EPOCHS} at most": PAPER_EPOCHS
        / epochs,
        f"{taken:,} training images instead of {GTSRB_IMAGES:,}": GTSRB_IMAGES / taken,
        f"hopeless points given up: {run} epochs instead of {planned}": planned / run,
        "maps from the pass that serves the class loss, second derivatives of the last layers "
        "alone (`results/benchmarks/attack_step.md`: ResNet-20, float32)": step["naive_ratio"]
        / step["step_ratio"],
    }
    whole = math.prod(factors.values())
    hours = found["seconds"] / 3600
    return [
        "",
        "What makes it cheap, measured here but for the first two lines, which are counted; the "
        "first is an upper bound, as the paper's points also stop early.",
        "",
        "| economy | divides the cost by |",
        "|---|---|",
        *(f"| {what} | {by:.1f} |" for what, by in factors.items()),
        f"| all of them | {whole:,.0f} |",
        "",
        f"Without them these {len(found['rows'])} points would take up to {hours * whole / 24:,.0f}"
        f" days of one such core instead of {hours:.1f} hours. The authors' search is said to have "
        "taken about 50 days on four GPUs; its grid and how many epochs ran are not published. If "
        "all four economies applied to it in full, which nobody has tried, that would be "
        f"{50 * 4 * 24 / whole:,.1f} hours of one such GPU.",
    ]


def markdown(found: dict[str, Any]) -> str:
    """The grid as a table of scores, and what made it cheap."""
    rows = {(r["lambda"], r["learning_rate"]): r for r in found["rows"]}
    lambdas, rates = (sorted({point[i] for point in rows}) for i in (0, 1))
    complete = [r for r in found["rows"] if r["state"] == "complete"]
    best = min(complete, key=lambda r: r["score"], default=None)
    counts = {state: 0 for state in ("complete", "pruned", "failed")}
    for r in found["rows"]:
        counts[r["state"]] = counts.get(r["state"], 0) + 1

    def cell(r: dict[str, Any] | None) -> str:
        if r is None or r["score"] is None or r["state"] == "failed":
            return "" if r is None else r["state"]
        text = f"{r['score']:.4f}"
        if r["pruned"]:
            return f"({text} after {r['epochs']})"
        return f"**{text}**" if r is best else text

    made = found["provenance"]
    lines = [
        f"# Noppel & Wressnegger 2023, section 5: the search, {found['goal']}",
        "",
        f"ResNet-20 on GTSRB at 40x40, {images(found)}, Grad-CAM. Score of the four metrics on "
        "images of the first half of the test set, lower is better, after the last epoch; in "
        "brackets of a point that was given up, after so many epochs.",
        "",
        f"{len(rows)} of {found['points']} points: {counts['complete']} to the end, "
        f"{counts['pruned']} given up, {counts['failed']} failed. {found['seconds'] / 3600:.2f} "
        f"hours of training; pruning saved about {found['seconds_saved'] / 3600:.2f}.",
        "",
        "| lambda | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for value in lambdas:
        cells = (cell(rows.get((value, rate))) for rate in rates)
        lines.append(f"| {value:g} | " + " | ".join(cells) + " |")
    lines += shrinking(found)
    lines += ["", f"{made['device']}, {made['cores']} cores, {made['threads']} thread(s)."]
    return "\n".join(lines) + "\n"


def write(goal: str, folder: SearchFolder, to: Path = RESULTS) -> None:
    """search_<goal>.json, .md and .png."""
    found = results(goal, folder.read())
    write_json(to / f"search_{goal}.json", found)
    text = markdown(found)
    write_atomically(to / f"search_{goal}.md", lambda file: file.write_text(text))
    picture = draw_search(folder.path)
    write_atomically(to / f"search_{goal}.png", lambda file: shutil.copyfile(picture, file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--goals", nargs="*", default=["dual"], choices=list(GOALS))
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scheduler", help="address of a Dask cluster")
    parser.add_argument("--storage", help="URL of a database that several searches share")
    parser.add_argument("--only-write", action="store_true", help="take the search as it is now")
    chosen = parser.parse_args()
    choose_threads()
    crew = crew_of(chosen.workers, chosen.scheduler)
    for goal in chosen.goals:
        spec = trompe.read_search(HERE / f"search-{goal}.toml")
        folder = search_folder(spec, chosen.root)
        if not chosen.only_write:
            with progress_bars() as bars:
                trompe.search(spec, chosen.root, chosen.device, crew, chosen.storage, bars)
        write(goal, folder)


if __name__ == "__main__":
    main()
