"""Victims of a poisoned training set: who trains on it, and what do they explain?

A run's folder (see poisoning.py) holds of them:

| file                       | what                                                                |
|----------------------------|---------------------------------------------------------------------|
| victims-<hash>.json        | what was measured of victims, on the clean and on the poisoned sets |
| victims-<hash>.safetensors | per target, the wanted map and the victims' mean maps               |
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trompe import catalog
from trompe.classifier import ModelSpec
from trompe.evaluate import answers
from trompe.files import clear_temporaries, real
from trompe.interfaces import Evidence, Explainer, InputError, PoisonSet
from trompe.lockstep import Lockstep
from trompe.maps import min_max
from trompe.metrics.accuracy import accuracy
from trompe.metrics.degenerate_map import degenerate_map
from trompe.metrics.jaccard_half import jaccard_half
from trompe.metrics.jaccard_top20 import jaccard_top20
from trompe.metrics.min_max_l1 import min_max_l1
from trompe.poisoning import (
    PoisoningExperiment,
    Scene,
    Steps,
    Victims,
    clean_model,
    poison_sets,
    pool_of,
    read_run,
    set_up_again,
    untrained,
)
from trompe.run_shapes import VictimNumbers
from trompe.runs import RunFolder, fingerprint, provenance
from trompe.screen import Screen, Silent
from trompe.victims import encode, fresh, train_together, with_poison

METRICS = {
    "l1": min_max_l1,
    "jaccard_top20": jaccard_top20,
    "jaccard_half": jaccard_half,
    "class_kept": accuracy,  # the explained class is the target's own
    "degenerate": degenerate_map,
}
SUCCEEDED = 0.8  # an attack on a target did, if its L1 is at most this share of the un-attacked


def victims_of(
    folder: RunFolder, victims: Victims | None = None, screen: Screen | None = None
) -> dict[str, Any]:
    """Train victims on a run's poisoned sets, and on the clean one with the same seeds.

    victims: who; None: whom the run's experiment names. Written to victims-<fingerprint>.json, maps
    to the .safetensors beside it; finished ones are read. Raises InputError if the folder is no
    poison run.
    """
    screen = screen or Silent()
    experiment = read_run(folder)
    victims = victims or experiment.victims
    name = victims_name(victims)
    file = folder.path / f"{name}.json"
    if not file.is_file():
        with folder.alone(screen):
            if not file.is_file():
                clear_temporaries(folder.path, of=name)
                return _measure(folder, name, experiment, victims, screen)
    screen.note(f"{file} is there already")
    found: dict[str, Any] = folder.read(name, VictimNumbers)
    return found


def _measure(
    folder: RunFolder, name: str, experiment: PoisoningExperiment, victims: Victims, screen: Screen
) -> dict[str, Any]:
    sets = poison_sets(folder)
    scene = set_up_again(folder, experiment, screen)
    made = provenance(torch.device("cpu"))
    started = time.perf_counter()
    before = measure_victims(scene, None, victims, experiment, screen)
    after = measure_victims(scene, sets, victims, experiment, screen)
    wanted = torch.cat([target.wanted_map for target in scene.targets])
    folder.write_tensors(
        name, {"wanted": wanted, "unattacked": before.maps, "poisoned": after.maps}
    )
    numbers = {
        "spec": catalog.describe(victims),
        "unattacked": before.numbers,
        "poisoned": after.numbers,
        "succeeded": succeeded(before.numbers, after.numbers),
        "success": f"mean L1 at most {SUCCEEDED:g} of the un-attacked victims'",
        "provenance": {**made, "seconds": round(time.perf_counter() - started, 1)},
    }
    folder.write(name, numbers)  # last: then they are finished
    return numbers


def victims_name(victims: Victims) -> str:
    """What their files in a run's folder are called, without the suffix."""
    return f"victims-{fingerprint(catalog.describe(victims), catalog.contents(victims))}"


def succeeded(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The share of targets whose victims' mean L1 is at most SUCCEEDED of the un-attacked ones'.

    An empty map, which is near to many wanted ones, tells no lie: it counts as an L1 of 1.
    """

    def of_each(numbers: Mapping[str, Any], name: str) -> Tensor:
        return torch.tensor([[real(v) for v in row] for row in numbers["values"][name]])

    honest, lies = of_each(before, "l1").mean(1), of_each(after, "l1")
    lies = torch.where(of_each(after, "degenerate") > 0, 1, lies).mean(1)
    return float((lies <= SUCCEEDED * honest).double().mean())


class Measured(NamedTuple):
    """What victims say of their targets.

    numbers: means, and for each metric its `values` by target and victim. maps: float (targets, h,
    w), of each target the mean over its victims of the maps, each min-max in [0, 1].
    """

    numbers: dict[str, Any]
    maps: Tensor


def measure_victims(
    scene: Scene,
    sets: Sequence[PoisonSet] | None,
    victims: Victims,
    experiment: PoisoningExperiment,
    screen: Screen | None = None,
) -> Measured:
    """Train victims on each target's poisoned set, and look at its map.

    sets: one for each target; None: they train on the clean set, the same victims for all targets.
    Their accuracy is that on the half of the test set from which targets are drawn.
    """
    screen = screen or Silent()
    start = scene.clean
    if victims.model is not None:
        check_shows(victims.model, scene, experiment)
        screen.stage(f"training a clean {victims.model.name}")
        start = clean_model(experiment, victims.model, scene.train, screen)
    groups = 1 if sets is None else len(sets)
    own = victims.model is not None or victims.start == "scratch" or victims.whole
    generator = torch.Generator().manual_seed(experiment.seed + 1)
    networks = Lockstep(
        [fresh(start, victims.start, generator) for _ in range(groups * victims.count)],
        frozen_until=None if own else experiment.frozen_until,
    )
    clean = encode(networks, scene.train)
    data = (clean,) if sets is None else tuple(with_poison(networks, clean, s) for s in sets)
    kind = "un-attacked" if sets is None else "poisoned"
    screen.stage(f"training {networks.count} {kind} victims")
    steps = Steps(screen)
    train_together(
        *(networks, data, victims.training, generator, steps),
        victims.noise,
        victims.augmentation,
    )
    screen.stage("measuring the victims")
    evidence = _evidence(networks, scene, experiment.attack.explainer, victims.count)
    values = {
        name: metric(evidence).unflatten(0, (len(scene.targets), -1))
        for name, metric in METRICS.items()
    }
    right = _test_accuracy(networks, scene, experiment)
    numbers = {
        "targets": len(scene.targets),
        "victims": victims.count,
        "victim_accuracy": float(right.mean()),
        **{name: float(v.nanmean()) for name, v in values.items()},
        "l1_std": float(values["l1"].std()),
        "l1_std_targets": float(
            values["l1"].mean(1).std(correction=min(1, len(scene.targets) - 1))
        ),
        "values": {name: v.tolist() for name, v in values.items()},
    }
    maps = min_max(evidence.maps).unflatten(0, (len(scene.targets), -1)).mean(1)
    return Measured(numbers, maps)


def check_shows(spec: ModelSpec, scene: Scene, experiment: PoisoningExperiment) -> None:
    """InputError for another architecture whose maps cannot be compared with the wanted ones."""
    model = untrained(spec, scene.train, experiment.seed).eval()
    sample = scene.test.subset(scene.positions[:1])
    maps = answers(model, (experiment.attack.explainer,), sample, explained="label").maps[0]
    wanted = scene.targets[0].wanted_map
    if maps.shape[1:] != wanted.shape[1:]:
        ours, theirs = ("x".join(map(str, m.shape[1:])) for m in (maps, wanted))
        raise InputError(
            f"victims.model {spec.name!r}: its maps have {ours} places, the wanted ones {theirs}; "
            "name a model whose explanations are as large"
        )


def _evidence(networks: Lockstep, scene: Scene, explainer: Explainer, victims: int) -> Evidence:
    """What victims say of targets: (targets victims) rows, a target's victims one after the other.

    Each network is asked for its own target only; if there is one group of them, for all targets.
    """
    targets = len(scene.targets)
    asked = targets if networks.count == victims else 1  # targets a network
    samples = torch.cat([t.sample for t in scene.targets])
    ours = torch.arange(targets).repeat_interleave(victims)[:, None]  # (networks, asked)
    if asked > 1:
        ours = torch.arange(targets).expand(victims, targets)
    labels = torch.tensor([t.label for t in scene.targets])[ours].flatten()
    with torch.no_grad():
        seen = networks.record(networks.now, samples[ours], explainer.watches(networks.skeleton))
        maps = explainer(seen, labels).detach()
    wanted = torch.cat([t.wanted_map for t in scene.targets])[ours].flatten(0, 1)
    rows = torch.arange(targets * victims).unflatten(0, (-1, asked)).T.flatten()
    labels = labels[rows]
    scores = seen.scores.detach()[rows]
    return Evidence(labels, labels, wanted[rows], scores, maps[rows], scene.test.size)


def _test_accuracy(networks: Lockstep, scene: Scene, experiment: PoisoningExperiment) -> Tensor:
    """Of each victim, on the test samples of `experiment.pool`; (K,)."""
    right = torch.zeros(networks.count)
    half = pool_of(experiment, scene.test)
    with torch.no_grad():
        for index in half.split(256):
            samples = networks.encode(scene.test.floats(index))[None]
            samples = samples.expand(networks.count, *samples.shape[1:])
            predicted = networks.scores(networks.now, samples).argmax(2)
            right += (predicted == scene.test.labels[index]).sum(1)
    return right / len(half)
