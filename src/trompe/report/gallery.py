"""Figure 1: for some images, clean and triggered, what each model says and what its map shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trompe.maps import is_degenerate
from trompe.report.pictures import heat_uri, image_uri
from trompe.report.reading import Condition, Run, is_flat
from trompe.report.tables import number


@dataclass(frozen=True)
class Cell:
    """One map over its image, with the class that the model predicts.

    mark: "right", "wrong", or "target" where the wrong class is the one that the adversary wants.
    wanted: the map that was wanted, or None where it is the one of the reference beside it.
    """

    picture: str
    alt: str
    predicted: str
    mark: str
    empty: bool
    wanted: str | None = None


@dataclass(frozen=True)
class Film:
    """One image's map after each epoch; frames: (picture, loss, is it fooled)."""

    true: str  # the reference's map
    frames: list[tuple[str, str, bool]]


def films(run: Run) -> list[Film]:
    """Figures 3 and 4 of Fang & Choromanska 2020: maps of the same images as training goes on."""
    if not run.timeline or run.fooling is None:
        return []
    tau = run.fooling.threshold
    first = run.timeline[0]
    return [
        Film(
            heat_uri(image, first.true_maps[i]),
            [
                (heat_uri(image, m.maps[i]), number(float(m.losses[i])), float(m.losses[i]) < tau)
                for m in run.timeline
            ],
        )
        for i, image in enumerate(first.images)
    ]


@dataclass(frozen=True)
class Line:
    """One condition of one image; a cell is None where a run knows no such trigger."""

    title: str
    picture: str
    alt: str
    reference: Cell
    cells: list[Cell | None]


@dataclass(frozen=True)
class Sample:
    """One image: its true class and its lines."""

    true: str
    lines: list[Line]


@dataclass(frozen=True)
class Gallery:
    """Samples that several runs with one reference share; columns: the runs' titles."""

    title: str
    columns: list[str]
    samples: list[Sample]


def galleries(runs: Sequence[Run]) -> list[Gallery]:
    """One gallery for each set of images and reference model, in order of appearance."""
    return [_gallery(members) for members in sharing(runs)]


def sharing(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups that have their images and reference in common."""
    sets: list[list[Run]] = []
    for run in runs:
        same = next((members for members in sets if _share(members[0], run)), None)
        if same is None:
            sets.append([run])
        else:
            same.append(run)
    return sets


def titles(runs: Sequence[Run]) -> list[str]:
    """What tells the runs apart, as short as it can be: goals, seed, experiment, folder."""
    short, seeded, long = (
        [run.goals for run in runs],
        [f"{run.goals}, seed {run.seed}" for run in runs],
        [f"{run.name}, seed {run.seed}" for run in runs],
    )
    return [
        next((way[i] for way in (short, seeded, long) if way.count(way[i]) == 1), _last_resort(run))
        for i, run in enumerate(runs)
    ]


def _last_resort(run: Run) -> str:
    return run.path.name if run.alone else f"{run.path.name} · {run.explainer}"


def _share(one: Run, other: Run) -> bool:
    a, b = one.shown[one.clean.name], other.shown[other.clean.name]
    return (
        one.classes == other.classes
        and torch.equal(one.labels, other.labels)
        and torch.equal(a.images, b.images)
        and torch.equal(a.reference_maps, b.reference_maps)
    )


def _gallery(runs: list[Run]) -> Gallery:
    lines = matched(runs)
    samples = [
        Sample(runs[0].classes[int(label)], [_line(title, row, i) for title, row in lines])
        for i, label in enumerate(runs[0].labels)
    ]
    return Gallery(title(runs), titles(runs), samples)


def title(runs: Sequence[Run]) -> str:
    """Of runs that share their images."""
    return ", ".join(titles(runs)) + ("" if runs[0].alone else f" · {runs[0].explainer}")


_Row = list[tuple[Run, Condition | None]]  # each run's condition on one line


def matched(runs: Sequence[Run]) -> list[tuple[str, _Row]]:
    """The lines of every sample: per run the condition with the same images, or None.

    The triggers of two runs share a line if they make the same images.
    """
    rows: list[tuple[Tensor, list[Condition | None]]] = []
    for k, run in enumerate(runs):
        for condition in run.conditions:
            images = run.shown[condition.name].images
            fits = (row for known, row in rows if row[k] is None and torch.equal(known, images))
            row = next(fits, None)
            if row is None:
                row = [None] * len(runs)
                rows.append((images, row))
            row[k] = condition
    names = ["clean", *(["trigger"] if len(rows) == 2 else map("trigger {}".format, range(1, 99)))]
    return [
        (name, list(zip(runs, row, strict=True)))
        for name, (_, row) in zip(names, rows, strict=False)
    ]


def _line(title: str, row: _Row, i: int) -> Line:
    run, condition = next((run, c) for run, c in row if c is not None)
    shown = run.shown[condition.name]
    true = run.classes[int(run.labels[i])]
    reference = _cell(
        run, shown.images[i], shown.reference_maps[i], shown.reference_predicted[i], i
    )
    return Line(
        title,
        image_uri(shown.images[i]),
        f"image of class {true}, {title}",
        reference,
        [None if c is None else _manipulated(r, c, i) for r, c in row],
    )


def _manipulated(run: Run, condition: Condition, i: int) -> Cell:
    shown = run.shown[condition.name]
    lie = shown.wanted_maps[i]
    # The truth is beside it already; a lie that leaves pixels open is no picture.
    plain = torch.equal(lie, shown.reference_maps[i]) or bool(lie.isnan().any())
    wanted = None if plain else lie
    label = int(shown.wanted_labels[i])
    return _cell(run, shown.images[i], shown.maps[i], shown.predicted[i], i, label, wanted)


def _cell(
    run: Run,
    image: Tensor,
    heat: Tensor,
    predicted: Tensor,
    i: int,
    target: int = -1,
    wanted: Tensor | None = None,
) -> Cell:
    true, said = int(run.labels[i]), int(predicted)
    name = run.classes[said]
    return Cell(
        heat_uri(image, heat),
        f"heat map, predicted {name}",
        name,
        mark(true, said, target),
        bool(is_degenerate(heat[None])) and not (wanted is not None and is_flat(wanted)),
        None if wanted is None else heat_uri(None, wanted),
    )


def mark(true: int, said: int, target: int) -> str:
    """Of a predicted class, see `Cell`; target: -1 if the adversary wants none."""
    return "right" if said == true else "target" if said == target else "wrong"
