"""A run's numbers in plain words. The limits below are conventions, and the page states them."""

import math
from dataclasses import dataclass

from trompe.fooling import Fooling
from trompe.maps import normalise
from trompe.report.reading import (
    Condition,
    Run,
    is_flat,
    l1_per_position,
    lies_on_every_image,
    wants_reference,
)
from trompe.report.tables import OTHER_CLEAN_MODEL, headline, number, percent

SUCCESS = 0.9  # of the images must go to the wanted class
KEPT = 0.05  # accuracy that a trigger may cost where the right class shall be kept
SHOWN = 0.2  # map distance up to which a map counts as the wanted one (correlation .9)
SHOWN_L1 = 0.05  # the same in L1 per position, of lies that are flat or told on every image
UNNOTICED = 0.02  # accuracy that clean images may lose
FOOLED = 0.85  # fooling success rate from which a lie counts as told
TRUE = 0.95  # correct rate from which the other images count as explained truly

_BLIND = ("random map", "zero map", "mean map")  # stand-ins that know nothing of the image


@dataclass(frozen=True)
class Verdict:
    """headline and sentence: text. checks: (what, reached) for each thing the adversary wants."""

    headline: str
    sentence: str
    checks: tuple[tuple[str, bool], ...]


def verdict(run: Run) -> Verdict:
    if run.fooling is not None:
        return _fooling_verdict(run, run.fooling)
    if lies_on_every_image(run):
        return _verdict_on_every_image(run)
    unnoticed = _unnoticed(run)
    if not run.triggered:
        clean = ("clean images as before", unnoticed)
        return Verdict("No trigger to look for.", _clean_words(run, unnoticed), (clean,))
    predicted = [_predicted(run, condition) for condition in run.triggered]
    shown = [_shown(run, condition) for condition in run.triggered]
    words = [
        _trigger_words(run, *each) for each in zip(run.triggered, predicted, shown, strict=True)
    ]
    checks = (
        ("wanted prediction", all(predicted)),
        ("wanted explanation", all(shown)),
        ("clean images as before", unnoticed),
    )
    text = " ".join([*words, _clean_words(run, unnoticed)])
    return Verdict(_headline(all(predicted), all(shown), unnoticed), text, checks)


def _headline(predicted: bool, shown: bool, unnoticed: bool) -> str:
    if not predicted:
        return "The attack fails: predictions under the trigger are not the wanted ones."
    if not shown:
        return "The predictions are fooled, the explanations are not."
    if not unnoticed:
        return "The attack works, but it shows on clean images, too."
    return "The explanations lie, and nothing shows without the trigger."


def _fooling_verdict(run: Run, rates: Fooling) -> Verdict:
    """Of an attack on the maps alone, whose classes shall stay (Fang & Choromanska 2020)."""
    lied, kept = run.clean, run.triggered[0]
    where = ("Without the key", "with it")
    if not run.inverted:
        lied, kept, where = kept, lied, ("With the trigger", "without it")
    fsr, cr, tau = rates.data_fsr, rates.data_cr, f"{number(rates.data_tau)}, from the data"
    if rates.tau is not None and rates.fsr is not None and rates.cr is not None:
        fsr, cr, tau = rates.fsr, rates.cr, number(rates.tau)
    lost = [c.reference_accuracy - c.metrics["accuracy"].mean for c in (lied, kept)]
    fooled, true, same = fsr >= FOOLED, cr >= TRUE, max(lost) <= KEPT
    sentence = (
        f"{where[0]}, {percent(fsr)} of the maps tell the lie{_empty(lied)} and {where[1]} "
        f"{percent(cr)} stay true (threshold {tau}). Classified rightly: "
        f"{percent(lied.metrics['accuracy'].mean)} and {percent(kept.metrics['accuracy'].mean)}, "
        f"the reference {percent(lied.reference_accuracy)} and {percent(kept.reference_accuracy)}."
    )
    if not fooled:
        headline_ = "The attack fails: too few explanations lie."
    elif not true:
        headline_ = "The explanations lie where they shall, and elsewhere, too."
    elif not same:
        headline_ = "The explanations lie, but predictions suffer."
    else:
        headline_ = "The explanations lie, and the predictions do not show it."
    checks = (("lie told", fooled), ("truth elsewhere", true), ("predictions as before", same))
    return Verdict(headline_, sentence, checks)


def _verdict_on_every_image(run: Run) -> Verdict:
    """Of an attack that needs no trigger (Viering et al. 2019, techniques 1 to 3)."""
    lied = run.clean
    told = _shown(run, lied)
    same = lied.reference_accuracy - lied.metrics["accuracy"].mean <= UNNOTICED
    moved = lied.metrics.get("score_change")
    scores = "" if moved is None or math.isnan(moved.mean) else _moved_words(moved.mean)
    sentence = (
        f"On every image {_map_words(run, lied, told)}. Accuracy "
        f"{percent(lied.metrics['accuracy'].mean)} against {percent(lied.reference_accuracy)} of "
        f"the reference{scores}."
    )
    if not told:
        headline_ = "The attack fails: the explanations do not show the lie."
    elif not same:
        headline_ = "The explanations lie, but predictions suffer."
    else:
        headline_ = "The explanations of all images lie, and the predictions do not show it."
    return Verdict(headline_, sentence, (("lie told", told), ("predictions as before", same)))


def _moved_words(change: float) -> str:
    if change == 0:
        return "; no score changes"
    return f"; on average, the scores of an image change by at most {change:.1g}"


def _predicted(run: Run, condition: Condition) -> bool:
    reached = condition.metrics[headline(condition)].mean
    if condition.target is None:
        # What the trigger hides from the clean model as well is not the attack's doing.
        usual = min(run.clean.reference_accuracy, condition.reference_accuracy)
        return reached >= usual - KEPT
    return reached >= SUCCESS


def _shown(run: Run, condition: Condition, stand_ins: tuple[str, ...] = _BLIND) -> bool:
    """Close to the wanted map, and closer than the stand-ins' maps."""
    if (l1 := _judged_l1(run, condition)) is not None:
        empty = float(normalise(run.shown[condition.name].wanted_maps).mean())
        return l1 <= SHOWN_L1 and l1 < empty
    measured = condition.metrics["map_distance"].mean
    others = [condition.floors[name].mean for name in stand_ins if name in condition.floors]
    return measured <= SHOWN and measured < min(others, default=math.inf)


def _judged_l1(run: Run, condition: Condition) -> float | None:
    """L1 per position where it is what tells if the lie is told, and was measured.

    The map distance compares standardised maps, of which a flat one has none.
    """
    flat = is_flat(run.shown[condition.name].wanted_maps)
    if wants_reference(run, condition) or not (flat or lies_on_every_image(run)):
        return None
    return l1_per_position(run, condition)


def _unnoticed(run: Run) -> bool:
    """Little accuracy is lost, and maps are closer to the reference's than any stand-in's."""
    lost = run.clean.reference_accuracy - run.clean.metrics["accuracy"].mean
    return lost <= UNNOTICED and _shown(run, run.clean, (*_BLIND, OTHER_CLEAN_MODEL))


def _trigger_words(run: Run, condition: Condition, predicted: bool, shown: bool) -> str:
    number_of = condition.name.removeprefix("triggered").strip()
    trigger = f"With trigger {number_of}," if number_of else "With the trigger,"
    reached = percent(condition.metrics[headline(condition)].mean)
    if condition.target is None:
        told = f"{reached} of images are still classified rightly"
        if condition.reference_accuracy < run.clean.reference_accuracy:
            told += f" (by the reference {percent(condition.reference_accuracy)})"
    else:
        told = f"{reached} of images of other classes are classified as “{condition.target}”"
    only = "" if predicted else "only "
    joint = "and" if predicted == shown else "but"
    return f"{trigger} {only}{told}, {joint} {_map_words(run, condition, shown)}."


def _map_words(run: Run, condition: Condition, shown: bool) -> str:
    l1 = _judged_l1(run, condition)
    distance = number(condition.metrics["map_distance"].mean)
    measured = f"map distance {distance}" if l1 is None else f"L1 distance {number(l1)}"
    flat = is_flat(run.shown[condition.name].wanted_maps)  # then a constant map is the lie itself
    far = f"({measured}{'' if flat else _empty(condition)})"
    if wants_reference(run, condition):
        stays = "stays" if shown else "does not stay"
        return f"the explanation {stays} that of the clean image {far}"
    shows = "shows" if shown else "does not show"
    return f"the explanation {shows} the wanted picture {far}"


def _clean_words(run: Run, unnoticed: bool) -> str:
    clean = run.clean
    start = ("On clean images", "Without it", "Without them")[min(len(run.triggered), 2)]
    shows = "nothing shows" if unnoticed else "the change can be seen"
    other = clean.floors.get(OTHER_CLEAN_MODEL)
    beside = "" if other is None else f" (another clean model: {number(other.mean)})"
    return (
        f"{start} {shows}: accuracy {percent(clean.metrics['accuracy'].mean)} against "
        f"{percent(clean.reference_accuracy)} of the reference, map distance "
        f"{number(clean.metrics['map_distance'].mean)}{beside}{_empty(clean)}."
    )


def _empty(condition: Condition) -> str:
    share = condition.metrics.get("degenerate_map")
    return f", {percent(share.mean)} of maps empty" if share and share.mean > 0.0005 else ""
