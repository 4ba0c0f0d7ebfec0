"""Curves and distributions as inline SVG that takes the page's own text colour."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from trompe.report.reading import Run, distances
from trompe.report.style import COLOURS, INK, STYLE
from trompe.report.tables import OTHER_CLEAN_MODEL, title

_MARKERS = "osD^vP"
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # 0.01, not 10^-2
_LEAST = 1e-4  # smaller map distances are drawn here


class Panel(NamedTuple):
    """A small figure. alt: what it shows, in words; svg: the element."""

    alt: str
    svg: str


_TITLES = {
    "loss": "Loss terms",
    "share": "Accuracy and success",
    "rate": "Fooling and correct rate",
    "distance": "Mean map distance",
    "lie": "Mean loss against the lie",
    "score": "Other measures",
}
_OF_A_SYSTEM = ("fsr", "cr", "lie_loss")  # measured of each attacked explainer
_Points = tuple[list[int], list[float]]  # epochs and values


def panels(run: Run, key: str) -> list[Panel]:
    """Loss terms, shares and map distances per epoch, then map distances per image.

    key: a word, another one for each run of a page: it keeps the figures' ids apart.
    """
    done = []
    for name, curves in _curves(run).items():
        if curves:
            with _canvas() as (figure, axis):
                _draw_curves(axis, name, curves, run)
                alt = f"{_TITLES[name]} per epoch: {', '.join(_label(c, run) for c in curves)}"
                done.append(Panel(alt, _svg(figure, f"{key}-{name}")))
    known = {c.name: values for c in run.conditions if (values := distances(run, c)) is not None}
    if known:
        with _canvas() as (figure, axis):
            _draw_distances(axis, run, known)
            alt = "How many images have which map distance"
            done.append(Panel(alt, _svg(figure, f"{key}-images")))
    if run.fooling is not None:
        with _canvas() as (figure, axis):
            _draw_fooling(axis, run)
            done.append(
                Panel("Share of fooled maps at every threshold", _svg(figure, f"{key}-fsr"))
            )
    return done


def film_curve(run: Run, key: str) -> Panel | None:
    """L_p of a film's images after each epoch, to stand below their maps; None without a film.

    As wide as the film: a column for the true maps, where the axis stands, and one for each epoch.
    """
    if not run.timeline or run.fooling is None:
        return None
    losses = np.array([moment.losses.tolist() for moment in run.timeline])  # (epochs, images)
    frames = np.arange(1, len(losses) + 1)
    columns = len(losses) + 1
    means = {r.epoch: r.measured["lie_loss"] for r in run.history if "lie_loss" in r.measured}
    mean = [means.get(moment.epoch, np.nan) for moment in run.timeline]
    tau = run.fooling.threshold
    lowest = max(np.nanmin([tau, *mean]) / 5, _LEAST)  # an image's loss may be 0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.08 * columns, 1.5))
        box = {"left": 1 / columns, "right": 1, "top": 0.97, "bottom": 0.05}
        axis = figure.subplots(gridspec_kw=box)
        axis.plot(frames, losses.clip(lowest), color=INK, lw=0.8, alpha=0.5)
        axis.plot(frames, mean, color=COLOURS[0], lw=2, marker=_MARKERS[0], markersize=4)
        axis.axhline(tau, color=INK, lw=1, ls="--")
        axis.set_ylim(bottom=lowest * 0.9)
        _log_scale(axis)
        axis.set_xlim(0.5, len(losses) + 0.5)
        axis.set_xticks(frames, [""] * len(frames))  # the columns above have the epochs
        axis.grid(axis="y")
        axis.set_ylabel("L_p")
        return Panel("L_p of these images after each epoch, and tau", _svg(figure, f"{key}-film"))


@contextmanager
def _canvas() -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6, 2.75))
        box = {"left": 0.17, "right": 0.96, "top": 0.91, "bottom": 0.42}  # below it: the legend
        yield figure, figure.subplots(gridspec_kw=box)


def _curves(run: Run) -> dict[str, dict[str, _Points]]:
    """Per panel: each curve's epochs and values."""
    panels: dict[str, dict[str, _Points]] = {name: {} for name in _TITLES}
    for record in run.history:
        for name, value in record.terms.items():
            _append(panels["loss"], name, record.epoch, value)
        for name, value in record.measured.items():
            _append(panels[_panel(name)], name, record.epoch, value)
    return panels


def _panel(name: str) -> str:
    if name in ("fsr", "cr"):
        return "rate"
    if name == "lie_loss":
        return "lie"
    if name.endswith(("accuracy", "success")):
        return "share"
    if name.endswith(("mse", "distance")):
        return "distance"
    return "score"


def _append(curves: dict[str, _Points], name: str, epoch: int, value: float) -> None:
    epochs, values = curves.setdefault(name, ([], []))
    epochs.append(epoch)
    values.append(value)


def _draw_curves(axis: Axes, panel: str, curves: Mapping[str, _Points], run: Run) -> None:
    for k, (name, (epochs, values)) in enumerate(curves.items()):
        colour, marker = COLOURS[k % len(COLOURS)], _MARKERS[k % len(_MARKERS)]
        axis.plot(
            epochs, values, color=colour, marker=marker, markersize=4, label=_label(name, run)
        )
    if panel in ("share", "rate"):
        if panel == "share":
            accuracy = run.clean.reference_accuracy
            axis.axhline(accuracy, color=INK, lw=1, ls=":", label="reference's accuracy")
        axis.set_ylim(min(0.9, axis.get_ylim()[0]), 1.005)
    elif panel in ("distance", "lie"):
        if panel == "lie" and run.fooling is not None:
            style, how = ("--", "") if run.fooling.tau is not None else (":", ", data")
            label = _whose("tau", run) + how
            axis.axhline(run.fooling.threshold, color=INK, lw=1, ls=style, label=label)
        _log_scale(axis)
    else:
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    last = max(record.epoch for record in run.history)
    axis.set_xlim(0.5, last + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    _finish(axis, _TITLES[panel])


def _log_scale(axis: Axes) -> None:
    axis.set_yscale("log")
    lowest, highest = axis.get_ylim()
    subs = (1, 2, 5) if highest < 50 * lowest else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.yaxis.set_minor_formatter(NullFormatter())


def _label(name: str, run: Run) -> str:
    """The curve's title; of one system among several with its explainer."""
    return _whose(title(name), run) if name in _OF_A_SYSTEM else title(name)


def _whose(what: str, run: Run) -> str:
    return what if run.alone else f"{what} of {run.explainer}"


def _draw_distances(axis: Axes, run: Run, known: Mapping[str, Tensor]) -> None:
    """How many images have which map distance; the dotted line is another clean model's mean."""
    edges = np.geomspace(_LEAST, 4, 41)
    for k, condition in enumerate(run.conditions):
        if (values := known.get(condition.name)) is not None:
            shares = np.full(len(values), 100 / len(values))
            drawn = values.double().clamp(_LEAST, 4).numpy()  # float32's 1e-4 is left of the axis
            look = {"color": COLOURS[k % len(COLOURS)], "label": condition.name}
            axis.hist(drawn, edges, weights=shares, histtype="step", lw=1.6, **look)  # type: ignore[arg-type]
    other = run.clean.floors.get(OTHER_CLEAN_MODEL)
    if other is not None and other.mean > 0:
        axis.axvline(other.mean, color=INK, lw=1, ls=":", label=OTHER_CLEAN_MODEL)
    axis.set_xscale("log")
    axis.set_xlim(_LEAST, 4)
    axis.set_xlabel("map distance of an image")
    axis.set_xticks((1e-4, 1e-2, 1), ("0.0001", "0.01", "1"))
    axis.set_xticks((1e-3, 1e-1), minor=True)
    axis.xaxis.set_minor_formatter(NullFormatter())
    _finish(axis, "Images (%)")


def _draw_fooling(axis: Axes, run: Run) -> None:
    """FSR(tau): of the images that are lied about, of the others, and of another clean model."""
    assert run.fooling is not None
    shown = {"lied": "lie wanted", "kept": "truth wanted", "witness": OTHER_CLEAN_MODEL}
    for k, (whose, label) in enumerate(shown.items()):
        losses = np.sort(run.evidence[f"{run.explainer}.{whose}.lie_loss"].numpy())
        shares = 100 * np.arange(1, len(losses) + 1) / len(losses)
        axis.plot(losses, shares, color=COLOURS[k], lw=1.6, label=label, drawstyle="steps-post")
    for tau, style in ((run.fooling.tau, "--"), (run.fooling.data_tau, ":")):
        if tau is not None:
            axis.axvline(tau, color=INK, lw=1, ls=style)
    axis.set_xlim(left=0)
    axis.set_ylim(0, 101)
    axis.set_xlabel("tau (dotted: from the data)")
    _finish(axis, "Fooled maps (%)")


def _finish(axis: Axes, text: str) -> None:
    axis.set_title(text)
    axis.grid(axis="y")
    axis.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.33), borderaxespad=0)  # below the axis


def _svg(figure: Figure, key: str) -> str:
    """The figure as an <svg> element whose ids are its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    return text.replace(INK, "currentColor")
