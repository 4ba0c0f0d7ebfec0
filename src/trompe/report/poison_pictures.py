"""Pictures of a poison run: how crafting converged, what was changed, what victims' maps show.

| file                            | what                                                           |
|---------------------------------|----------------------------------------------------------------|
| convergence.png                 | both objectives per epoch (figure 5 of Zhang, Gao & Su 2021)   |
| poison-NN/changes.png           | of a target: its poisons beside what they were made from       |
| maps-<fingerprint>.png          | wanted, un-attacked and poisoned victims' maps (figure 4)      |
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from trompe.files import real
from trompe.interfaces import InputError, PoisonSet
from trompe.poison_sets import read_card, read_poison_set, set_folders
from trompe.report.pictures import heat_pixels
from trompe.report.style import COLOURS, INK, canvas, literally, short
from trompe.run_shapes import PoisonCard, VictimNumbers
from trompe.runs import RunFolder

_WIDTH = 9.5  # inches of a figure
_BLUE, _ORANGE, _GREEN = COLOURS[:3]
_WANTED = {"color": _GREEN, "alpha": 0.18, "lw": 0}  # behind a wanted place
_FEATURES = 20  # rows of a table's sheet
_PLACES = 40  # bars of a table's map
_POISONS = 6  # columns of an image's sheet, beside the target
_TARGETS = 4  # rows of the maps
_MORE = 5  # times that an image's changes are shown
_LETTERS = 34  # of a feature's name


class _Set(NamedTuple):
    """A poison set with its card and folder."""

    poison: PoisonSet
    card: PoisonCard
    folder: Path

    @property
    def is_images(self) -> bool:
        return self.poison.samples.ndim == 4

    @property
    def title(self) -> str:
        number = int(self.folder.name.removeprefix("poison-")) + 1
        return f"target {number}, {literally(self.card['class_names'][self.card['label']])}"

    def places(self) -> list[str]:
        """Names of the map's places: features, or a layer's units."""
        names = self.card["feature_names"] or []
        count = self.poison.target.wanted_map.numel()
        return list(names) if len(names) == count else [f"unit {i}" for i in range(count)]

    def wanted(self) -> Tensor:
        """bool (places,), where the map shall be high."""
        flat = self.poison.target.wanted_map.flatten()
        return flat > flat.nan_to_num(0).amax() / 2


def draw_poisons(folder: RunFolder) -> list[Path]:
    """Convergence, and a sheet for each target; the files. InputError for another kind of run."""
    done, sets = [], _sets(folder)
    history = folder.read_history()
    if history:
        with canvas(folder.path / "convergence.png", _WIDTH, 3.0) as figure:
            _draw_convergence(figure, history)
        done.append(folder.path / "convergence.png")
    for one in sets:
        file = one.folder / "changes.png"
        if one.is_images:
            with canvas(file, _WIDTH, 4.1) as figure:
                _draw_images(figure, one)
        else:
            rows = min(_FEATURES, one.poison.samples.shape[1])
            with canvas(file, _WIDTH, 1.3 + 0.24 * rows) as figure:
                _draw_features(figure, one, rows)
        done.append(file)
    return done


def draw_maps(folder: RunFolder, name: str) -> Path:
    """For some targets, the maps in `name`.safetensors (victims-<fingerprint>); the file."""
    numbers, maps = folder.read(name, VictimNumbers), folder.read_tensors(name)
    sets = _sets(folder)[:_TARGETS]
    file = folder.path / f"{name.replace('victims', 'maps', 1)}.png"
    means = {
        kind: [np.mean([real(v) for v in row]) for row in numbers[kind]["values"]["l1"]]
        for kind in ("unattacked", "poisoned")
    }
    if sets[0].is_images:
        with canvas(file, _WIDTH, 0.4 + 2.45 * len(sets)) as figure:
            _draw_heat(figure, sets, maps, means)
    else:
        with canvas(file, _WIDTH, 1.9 + 1.6 * len(sets)) as figure:
            _draw_bars(figure, sets, maps, means)
    return file


def _sets(folder: RunFolder) -> list[_Set]:
    numbers = folder.read("numbers")
    if "poisons" not in numbers:
        raise InputError(f"folder {folder.path}: is no poison run; trompe report shows others")
    return [_Set(read_poison_set(f), read_card(f), f) for f in set_folders(folder.path)]


def _draw_convergence(figure: Figure, history: Sequence[Any]) -> None:
    panels = (
        ("adversarial", "Upper-level", r"$\mathcal{L}_{adv}$, mean over the models"),
        ("training", "Lower-level", r"$\mathcal{L}_{train}$, mean over the models"),
    )
    axes = figure.subplots(1, 2)
    for axis, colour, (term, level, label) in zip(axes, COLOURS, panels, strict=False):
        values = [record.terms.get(term, math.nan) for record in history]
        epochs = [record.epoch for record in history]
        look = {"marker": "o", "markersize": 3, "clip_on": False}
        axis.plot(epochs, values, color=colour, **look)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.set_title(f"{level} objective")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y")


def _draw_features(figure: Figure, one: _Set, rows: int) -> None:
    """Of the features that were changed most: their means before and after, and the change."""
    poison, names = one.poison, one.card["feature_names"] or []
    change = poison.samples - poison.bases
    order = change.abs().mean(0).argsort(descending=True, stable=True)[:rows]
    before, after, signed, target = (
        values[order].numpy()
        for values in (
            poison.bases.mean(0),
            poison.samples.mean(0),
            change.mean(0),
            poison.target.sample[0],
        )
    )
    at = np.arange(rows)
    wanted = one.wanted() if one.places() == names else torch.zeros(len(names), dtype=torch.bool)
    left, right = figure.subplots(1, 2, sharey=True)
    for axis in (left, right):
        for row in at[wanted[order].numpy()]:
            axis.axhspan(row - 0.5, row + 0.5, **_WANTED)
        axis.grid(axis="x")
    left.hlines(at, before, after, color=INK, lw=1)
    left.plot(before, at, "o", color=_BLUE, markerfacecolor="white", label="base")
    left.plot(after, at, "o", color=_ORANGE, label="poison")
    left.plot(target, at, "|", color=INK, markersize=9, label="target", zorder=1)
    left.set_yticks(at, [short(names[i], _LETTERS) for i in order])
    left.set_ylim(rows - 0.5, -0.5)
    left.set_xlim(-0.02, 1.02)
    left.set_xlabel("mean value, scaled to 0..1")
    if bool(wanted.any()):
        left.fill_between([], [], [], label="wanted in the map", **_WANTED)
    right.barh(at, signed, 0.6, color=[_ORANGE if v > 0 else _BLUE for v in signed.tolist()])
    right.axvline(0, color=INK, lw=0.8)
    right.set_xlabel("mean change, with its sign")
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.set_axisbelow(True)
    right.tick_params(axis="y", length=0)
    title = f"{one.title}: {len(poison)} poisons"
    if rows < len(names):
        title += f", the {rows} of {len(names)} features changed most"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4)


def _draw_images(figure: Figure, one: _Set) -> None:
    """Columns: the target, then some poisons. Rows: what it was, what it is, the difference."""
    poison = one.poison
    # Of poisons from one base the first will do: others look alike.
    seen = dict.fromkeys(poison.base_index.tolist())
    first = [poison.base_index.tolist().index(i) for i in seen]
    others = [i for i in range(len(poison)) if i not in first]
    chosen = sorted((first + others)[:_POISONS])
    axes = figure.subplots(3, 1 + _POISONS)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(_pixels(poison.target.sample[0]))
    axes[0, 0].set_title("target", loc="center")
    axes[1, 0].imshow(heat_pixels(_bytes(poison.target.sample[0]), poison.target.wanted_map[0]))
    axes[1, 0].set_title("wanted map", loc="center")
    for column, i in zip(axes.T[1:], chosen, strict=False):
        base, sample = poison.bases[i], poison.samples[i]
        column[0].imshow(_pixels(base))
        column[0].set_title(f"poison {i + 1}", loc="center")
        column[1].imshow(_pixels(sample))
        column[2].imshow(_pixels(0.5 + _MORE * (sample - base)))
    for axis, label in zip(axes[:, 1], ("base", "poison", f"difference x{_MORE}"), strict=True):
        axis.text(
            *(-0.06, 0.5),
            label,
            transform=axis.transAxes,
            rotation=90,
            ha="right",
            va="center",
        )
    text = f"{one.title}: {len(chosen)} of {len(poison)} poisons"
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)


def _draw_heat(
    figure: Figure, sets: Sequence[_Set], maps: dict[str, Tensor], means: dict[str, list[Any]]
) -> None:
    columns = ("wanted", "unattacked", "poisoned")
    axes = figure.subplots(len(sets), 4, squeeze=False)
    heads = ("", "wanted", "un-attacked victims", "poisoned victims")
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, loc="center")
    for i, (row, one) in enumerate(zip(axes, sets, strict=True)):
        sample = one.poison.target.sample[0]
        row[0].imshow(_pixels(sample))
        row[0].set_xlabel(one.title)
        for axis, kind in zip(row[1:], columns, strict=True):
            axis.imshow(heat_pixels(_bytes(sample), maps[kind][i]))
            if kind in means:
                axis.set_xlabel(f"L1 {means[kind][i]:.3f}")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)


def _draw_bars(
    figure: Figure, sets: Sequence[_Set], maps: dict[str, Tensor], means: dict[str, list[Any]]
) -> None:
    """One row a target, the places below; where the map is wanted, they are shaded."""
    names, count = sets[0].places(), maps["wanted"][0].numel()
    flat = {kind: maps[kind][: len(sets)].flatten(1) for kind in ("unattacked", "poisoned")}
    wanted = torch.stack([one.wanted() for one in sets])
    # Where many: those wanted, then those highest; in the data's order.
    height = torch.maximum(flat["unattacked"], flat["poisoned"]).amax(0)
    chosen = (height + 2 * wanted.any(0)).argsort(descending=True, stable=True)[:_PLACES]
    chosen = chosen.sort().values
    at = np.arange(len(chosen))
    axes = figure.subplots(len(sets), 1, sharex=True, squeeze=False)[:, 0]
    looks = {
        "unattacked": {"color": COLOURS[5], "label": "un-attacked"},
        "poisoned": {"color": _ORANGE, "label": "poisoned"},
    }
    for i, (axis, one) in enumerate(zip(axes, sets, strict=True)):
        for place in at[wanted[i][chosen].numpy()]:
            axis.axvspan(place - 0.5, place + 0.5, label="wanted", **_WANTED)
        for shift, (kind, look) in zip((-0.2, 0.2), looks.items(), strict=True):
            axis.bar(at + shift, flat[kind][i][chosen].numpy(), 0.4, **look)
        axis.set_ylim(0, 1)
        axis.set_xlim(-0.6, len(chosen) - 0.4)
        l1 = f"L1 {means['unattacked'][i]:.3f} un-attacked, {means['poisoned'][i]:.3f} poisoned"
        axis.set_title(f"{one.title}: {l1}")
    _name_places(axes[-1], [names[i] for i in chosen])
    if len(chosen) < count:
        axes[-1].set_xlabel(f"{len(chosen)} of {count} places: those wanted, then the highest")
    figure.supylabel("mean of the victims' maps", fontsize=9)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3)


def _name_places(axis: Axes, names: list[str]) -> None:
    axis.set_xticks(range(len(names)), [short(n, _LETTERS) for n in names], rotation=90, fontsize=8)
    axis.tick_params(axis="x", length=0)


def _pixels(image: Tensor) -> np.ndarray:
    return _bytes(image).permute(1, 2, 0).numpy()


def _bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
