"""The search of Noppel & Wressnegger 2023, section 5, as tables: a row for each point of the grid.

    trompe replicate noppel2023 search_dual --workers 2     # and search_ep, search_pp

The points, hours of work, are kept in the search's folder below --root; --workers take them from
there together, and so do several such commands. The choice's own row is in the table `searched`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import trompe
from trompe import experiments
from trompe.catalog import describe
from trompe.experiment import experiment_table
from trompe.files import Row, read_json
from trompe.many import Place
from trompe.replicating import Plan, Table
from trompe.report.search_pictures import draw_scores
from trompe.runs import fingerprint
from trompe.screen import Screen
from trompe.search import SearchSpec

HERE = Path(__file__).parent
GOALS = {"dual": "dual", "ep": "explanation-preserving", "pp": "prediction-preserving"}
PARAMETERS = ("lambda", "learning rate")
HANDS = 4  # workers that may share a search
PAPER_EPOCHS = 100  # of a point, at most (section 5); four epochs without progress end it
GTSRB_IMAGES = 26640  # in the training set
STEP = {  # the benchmark's row: this network and its size
    "model": "resnet20",
    "size": 40,
    "precision": "float32",
    "statistics": "frozen",
    "explainer": "gradcam",
}


def spec_of(goal: str, data: Path = Path("data")) -> SearchSpec:
    table = experiment_table(HERE / f"search-{goal}.toml")
    table["data"]["root"] = str(data)
    return trompe.read_search(table, f"search-{goal}.toml")


@cache
def settings_of(goal: str) -> str:
    """A hash of what decides about the scores, wherever the data lie."""
    spec = spec_of(goal)
    attack = describe(spec.at({}).attack)
    return fingerprint({"search": describe(spec.search), "attack": attack})


@dataclass(frozen=True)
class Searching:
    """One worker at the search of a goal, which gives all points when none is left."""

    goal: str
    hand: int
    plan: Plan
    usual: bool = False  # it takes hours

    @property
    def row(self) -> str:
        return GOALS[self.goal]

    @property
    def name(self) -> str:
        return f"noppel2023 search_{self.goal}, worker {self.hand}"

    def known(self, rows: Sequence[Row]) -> bool:
        of, points = settings_of(self.goal), spec_of(self.goal).search.points
        return sum(r["of"] == of and r["state"] in ("complete", "pruned") for r in rows) == points

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        spec = spec_of(self.goal, self.plan.data)
        found = trompe.search(spec, place.root, place.device, screen=screen).read()
        return rows_of(self.goal, found)


def rows_of(goal: str, found: Mapping[str, Any]) -> list[Row]:
    """A search's points, flat, without what only its machine knows."""
    rows = [
        {
            **{name.replace(" ", "_"): of["settings"][name] for name in PARAMETERS},
            **{name: of[name] for name in ("epochs", "pruned", "score", "state", "seconds")},
            "of": settings_of(goal),
            "provenance": found["provenance"],
        }
        for of in found["rows"]
    ]
    return sorted(rows, key=lambda r: (r["lambda"], r["learning_rate"]))


def beside(goal: str, rows: list[Row]) -> dict[str, Any]:
    """What the whole search took and saved, and what it was."""
    spec = spec_of(goal)
    epochs, seconds = (sum(r[name] for r in rows) for name in ("epochs", "seconds"))
    left = sum(_planned(spec) - r["epochs"] for r in rows if r["pruned"])
    return {
        "goal": GOALS[goal],
        "points": spec.search.points,
        "seconds": round(seconds, 1),
        "seconds_saved": round(left * seconds / epochs, 1) if epochs else 0.0,
        "search": describe(spec.search),
        "attack": describe(spec.at({}).attack),
    }


def _planned(spec: SearchSpec) -> int:
    """Epochs of a point that is not given up."""
    attack: Any = spec.at({}).attack
    return int(attack.training.epochs)


def shrinking(goal: str, rows: list[Row], seconds: float) -> list[str]:
    """What each economy divides the search's cost by, and all together."""
    spec = spec_of(goal)
    attack: Any = spec.at({}).attack
    epochs, taken = attack.training.epochs, attack.training_images
    run, planned = sum(r["epochs"] for r in rows), epochs * len(rows)
    steps = experiments.FOLDER.parent / "results" / "benchmarks" / "attack_step.json"
    if not run or not steps.exists():  # an installed package has no results
        return []
    (step,) = (
        row
        for row in read_json(steps)["rows"]
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
    hours = seconds / 3600
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
        f"Without them these {len(rows)} points would take up to {hours * whole / 24:,.0f}"
        f" days of one such core instead of {hours:.1f} hours. The authors' search is said to have "
        "taken about 50 days on four GPUs; its grid and how many epochs ran are not published. If "
        "all four economies applied to it in full, which nobody has tried, that would be "
        f"{50 * 4 * 24 / whole:,.1f} hours of one such GPU.",
    ]


def best_of(rows: list[Row]) -> Row | None:
    complete = [r for r in rows if r["state"] == "complete"]
    return min(complete, key=lambda r: r["score"], default=None)


def markdown(goal: str, rows: list[Row]) -> str:
    """The grid as a table of scores, and what made it cheap."""
    points = {(r["lambda"], r["learning_rate"]): r for r in rows}
    lambdas, rates = (sorted({point[i] for point in points}) for i in (0, 1))
    best, held = best_of(rows), beside(goal, rows)
    counts = {
        state: sum(r["state"] == state for r in rows) for state in ("complete", "pruned", "failed")
    }

    def cell(r: Row | None) -> str:
        if r is None or r["score"] is None or r["state"] == "failed":
            return "" if r is None else str(r["state"])
        text = f"{r['score']:.4f}"
        if r["pruned"]:
            return f"({text} after {r['epochs']})"
        return f"**{text}**" if r is best else text

    made = rows[0]["provenance"]
    lines = [
        f"# Noppel & Wressnegger 2023, section 5: the search, {GOALS[goal]}",
        "",
        f"ResNet-20 on GTSRB at 40x40, {held['attack']['training_images']:,} training images, "
        "Grad-CAM. Score of the four metrics on "
        "images of the first half of the test set, lower is better, after the last epoch; in "
        "brackets of a point that was given up, after so many epochs.",
        "",
        f"{len(points)} of {held['points']} points: {counts['complete']} to the end, "
        f"{counts['pruned']} given up, {counts['failed']} failed. {held['seconds'] / 3600:.2f} "
        f"hours of training; pruning saved about {held['seconds_saved'] / 3600:.2f}.",
        "",
        "| lambda | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for value in lambdas:
        cells = (cell(points.get((value, rate))) for rate in rates)
        lines.append(f"| {value:g} | " + " | ".join(cells) + " |")
    lines += shrinking(goal, rows, held["seconds"])
    lines += ["", f"{made['device']}, {made['cores']} cores, {made['threads']} thread(s)."]
    return "\n".join(lines) + "\n"


def draw(goal: str, rows: list[Row], file: Path) -> None:
    """The scores over the grid."""
    search = spec_of(goal).search
    points = [
        {**r, "settings": {name: r[name.replace(" ", "_")] for name in PARAMETERS}} for r in rows
    ]
    draw_scores(points, list(search.parameters.values()), search.score, file)


def cells(goal: str, plan: Plan) -> Iterator[Searching]:
    for hand in range(1, HANDS + 1):
        yield Searching(goal, hand, plan)


TABLES = tuple(
    Table(
        f"search_{goal}",
        ("lambda", "learning_rate"),
        partial(cells, goal),
        partial(markdown, goal),
        beside=partial(beside, goal),
        picture=partial(draw, goal),
        seeded=False,
    )
    for goal in GOALS
)
