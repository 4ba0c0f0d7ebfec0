"""Poisoning a training set, and measuring victims that trained on it: spec and pipeline.

A run is a folder (see runs.py for those files that all runs have):

| file                       | what                                                                |
|----------------------------|---------------------------------------------------------------------|
| spec.json                  | the experiment, but for its victims                                 |
| victims.json               | whom the experiment names as victims                                |
| clean.safetensors          | weights of the clean model that poisons and victims start from      |
| poison-00, ...             | for each target, its samples (see poison_sets.py)                   |
| numbers.json               | how many of them (written last: a run with it is finished)          |
| victims-<hash>.json        | what was measured of victims, on the clean and on the poisoned sets |
| victims-<hash>.safetensors | per target, the wanted map and the victims' mean maps               |
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trompe import catalog
from trompe.augmentation import Augmentation
from trompe.classifier import Classifier, ModelSpec, build_model, build_table_model
from trompe.data import halves
from trompe.evaluate import answers
from trompe.experiment import check_attack_makes, check_makes, experiment_table
from trompe.files import clear_temporaries, read_json, real
from trompe.interfaces import (
    Data,
    Evidence,
    Explainer,
    InputError,
    Poisoning,
    PoisonSet,
    Samples,
    TableSet,
    Target,
)
from trompe.lockstep import Lockstep
from trompe.maps import normalise
from trompe.metrics.accuracy import accuracy
from trompe.metrics.degenerate_map import degenerate_map
from trompe.metrics.jaccard_half import jaccard_half
from trompe.metrics.jaccard_top20 import jaccard_top20
from trompe.metrics.min_max_l1 import min_max_l1
from trompe.poison_sets import read_poison_set, write_poison_set
from trompe.runs import FileLogbook, RunFolder, fingerprint, provenance
from trompe.screen import Screen, Silent
from trompe.train import Training
from trompe.victims import (
    RECIPE,
    Start,
    check_in_memory,
    encode,
    fresh,
    train_together,
    with_poison,
)

METRICS = {
    "l1": min_max_l1,
    "jaccard_top20": jaccard_top20,
    "jaccard_half": jaccard_half,
    "class_kept": accuracy,  # the explained class is the target's own
    "degenerate": degenerate_map,
}
SUCCEEDED = (
    0.8  # an attack on a target did, if its mean L1 is at most this share of the un-attacked
)


@dataclass(frozen=True)
class Victims:
    """Who trains on the poisoned set.

    count: networks for each target, with seeds of their own. start: from the clean model, or its
    body with a new head, or from scratch. model: another architecture, which starts from a clean
    model of its own; None: the one that the poison was made for. noise: standard deviation of
    normal noise on all training samples, anew in each batch (of tables, as a rule). augmentation:
    of images, the poisons included, anew in each batch; None: none. whole: they train all layers,
    whatever the experiment's `frozen_until` says.
    """

    count: int = 10
    start: Start = "clean model"
    training: Training = RECIPE
    model: ModelSpec | None = None
    noise: float = 0.0
    whole: bool = False
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"count = {self.count}: must be at least 1")
        if self.noise < 0:
            raise InputError(
                f"noise = {self.noise}: is a standard deviation; it must be at least 0"
            )


@dataclass(frozen=True)
class PoisoningExperiment:
    """Poison sets for a few samples of the test set, and victims that train on them.

    targets: how many, drawn by target_seed among the samples of `pool` that the clean model
    classifies correctly. pool: the half of the test set ("selecting" for trying out settings,
    "reporting" for numbers). clean: how the clean model is trained, from which others start.
    frozen_until: the layer up to which the clean model, and victims that start from it, keep the
    weights with which the model is built (of ImageNet, say); it is run once. None: all is trained.
    seed: of everything else that is random.
    """

    name: str
    data: Data
    attack: Poisoning
    model: ModelSpec = ModelSpec("mlp")
    clean: Training = replace(RECIPE, epochs=10)
    frozen_until: str | None = None
    victims: Victims = Victims()
    targets: int = 10
    pool: str = "reporting"
    target_seed: int = 0
    split_seed: int = 0
    seed: int = 0
    paper: str = ""

    def __post_init__(self) -> None:
        if self.pool not in ("selecting", "reporting"):
            raise InputError(f'pool = {self.pool!r}: must be "selecting" or "reporting"')
        if self.targets < 1:
            raise InputError(f"targets = {self.targets}: must be at least 1")
        check_makes(self.attack, "a training set")


def read_poisoning(source: Path | str | dict[str, Any], where: str = "") -> PoisoningExperiment:
    """An experiment from a TOML file or its table. Raises InputError as `read_experiment`."""
    table = source if isinstance(source, dict) else experiment_table(source)
    where = where or ("experiment" if isinstance(source, dict) else str(source))
    check_attack_makes(table, where, "a training set")
    experiment: PoisoningExperiment = catalog.build_dataclass(PoisoningExperiment, table, where)
    return experiment


@dataclass(frozen=True)
class Scene:
    """Data, a clean model, and the targets with what their explanations shall show."""

    train: Samples
    test: Samples
    clean: Classifier
    targets: tuple[Target, ...]
    positions: Tensor  # of the targets in `test`


def set_up(experiment: PoisoningExperiment, screen: Screen | None = None) -> Scene:
    """Read the data, train the clean model, choose the targets."""
    screen = screen or Silent()
    screen.stage("reading data")
    train, test = _data(experiment)
    screen.stage("training the clean model")
    clean = clean_model(experiment, experiment.model, train, screen)
    pool = _pool(experiment, test)
    screen.stage("choosing targets")
    said = answers(clean, (experiment.attack.explainer,), test, explained="label")
    right = pool[said.scores[pool].argmax(1) == test.labels[pool]]
    if len(right) < experiment.targets:
        raise InputError(
            f"targets = {experiment.targets}: of the {len(pool)} samples for {experiment.pool} the "
            f"clean model classifies only {len(right)} correctly; ask for fewer"
        )
    dice = torch.Generator().manual_seed(experiment.target_seed)
    positions = right[torch.randperm(len(right), generator=dice)[: experiment.targets]]
    samples = test.floats(positions)
    wanted = experiment.attack.wanted_map(said.maps[0][positions], samples)
    targets = tuple(
        Target(samples[i : i + 1], int(test.labels[p]), wanted[i : i + 1])
        for i, p in enumerate(positions)
    )
    return Scene(train, test, clean, targets, positions)


def set_up_again(
    folder: RunFolder, experiment: PoisoningExperiment, screen: Screen | None = None
) -> Scene:
    """The scene in which a finished folder's sets were made, with their own targets.

    InputError if the data are no longer the same.
    """
    (screen or Silent()).stage("reading data")
    there = catalog.contents(experiment)
    for key, digest in folder.inputs.items():
        if key in there and there[key] != digest:
            raise InputError(
                f"{key}: what lies there has changed since the poisons were made "
                f"({folder.path / 'inputs.json'}); bring it back, or craft the poisons again"
            )
    train, test = _data(experiment)
    clean = _untrained(experiment.model, train, experiment.seed)
    clean.load_state_dict(folder.read_tensors("clean"))
    cards = [read_json(part / "poison.json") for part in _set_folders(folder)]
    positions = torch.tensor([card["target_position"] for card in cards])
    sets = poison_sets(folder)
    targets = tuple(one.target for one in sets)
    samples = torch.cat([target.sample for target in targets])
    same = int(positions.max()) < len(test) and samples.shape[1:] == test.floats(slice(1)).shape[1:]
    if not same or not torch.equal(test.floats(positions), samples):
        raise InputError(
            f"data {test.name!r}: are not those that the poisons were made for (the targets are "
            "not where they were); bring them back, or craft the poisons again"
        )
    return Scene(train, test, clean.eval(), targets, positions)


def _data(experiment: PoisoningExperiment) -> tuple[Samples, Samples]:
    train: Samples = experiment.data.train()
    check_in_memory(train)
    return train, experiment.data.test()


def clean_model(
    experiment: PoisoningExperiment,
    spec: ModelSpec,
    train: Samples,
    screen: Screen | None = None,
) -> Classifier:
    """A classifier, honestly trained as the experiment says; in eval mode."""
    seed, steps = experiment.seed, _Steps(screen or Silent())
    generator = torch.Generator().manual_seed(seed)
    frozen = experiment.frozen_until if spec == experiment.model else None
    networks = Lockstep([_untrained(spec, train, seed)], frozen_until=frozen)
    train_together(networks, (encode(networks, train),), experiment.clean, generator, steps)
    trained: Any = networks.network(0)
    return trained


def _untrained(spec: ModelSpec, train: Samples, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(train, TableSet):
            return build_table_model(spec, train)
        return build_model(spec, len(train.class_names))


def poison(
    experiment: PoisoningExperiment,
    root: Path | str = "runs",
    screen: Screen | None = None,
) -> RunFolder:
    """Craft a poison set for each target, in a folder below `root` that is named after the spec.

    A finished one is read, an interrupted one goes on, one that another process crafts is waited
    for. The folder also keeps who shall train on them (victims.json). Raises InputError for
    settings that do not fit the data.
    """
    screen = screen or Silent()
    victims = catalog.describe(experiment.victims)
    crafted = replace(experiment, victims=Victims())  # they may differ later
    spec, inputs = catalog.describe(crafted), catalog.contents(crafted)
    name = f"{experiment.name}-s{experiment.seed}-{fingerprint(spec, inputs)}"
    folder = RunFolder(Path(root) / name)
    if not folder.finished:
        with folder.alone(screen):
            if not folder.finished:  # nor by a process that was waited for
                scene = set_up(experiment, screen)
                folder.open(spec, inputs)
                _craft(folder, experiment, scene, screen)
                return folder
    folder.open(spec, inputs)
    screen.note(f"{folder.path} is finished already")
    folder.write("victims", victims)
    return folder


def _craft(
    folder: RunFolder, experiment: PoisoningExperiment, scene: Scene, screen: Screen
) -> None:
    made = provenance(torch.device("cpu"))
    screen.stage("crafting")
    started = time.perf_counter()
    logbook = FileLogbook(folder.path / "checkpoint.pt", screen)
    generator = torch.Generator().manual_seed(experiment.seed)
    try:
        sets = experiment.attack(scene.clean, scene.train, scene.targets, generator, logbook)
    except InputError:  # settings that do not fit the data: nothing was begun
        folder.discard_if_empty()
        raise
    history = sets[0].history
    seconds = max(time.perf_counter() - started, sum(r.seconds for r in history))
    for number, (one, position) in enumerate(zip(sets, scene.positions.tolist(), strict=True)):
        write_poison_set(one, folder.path / f"poison-{number:02}", scene.train, position, made)
    folder.write_history(history)
    folder.write("provenance", {**made, "seconds": round(seconds, 1)})
    folder.write("classes", list(scene.train.class_names))
    folder.write("victims", catalog.describe(experiment.victims))
    folder.write_tensors("clean", scene.clean.state_dict())
    folder.write(
        "numbers",
        {
            "targets": len(sets),
            "poisons": len(sets[0]),
            "training_set": len(scene.train),
            "poison_rate": len(sets[0]) / len(scene.train),
            "seconds": round(seconds, 1),
        },
    )
    logbook.close()


def poison_sets(folder: RunFolder) -> tuple[PoisonSet, ...]:
    """The sets that `poison` left in a folder, one for each target."""
    return tuple(read_poison_set(part) for part in _set_folders(folder))


def _set_folders(folder: RunFolder) -> list[Path]:
    return [folder.path / f"poison-{n:02}" for n in range(folder.read("numbers")["targets"])]


def read_run(folder: RunFolder) -> PoisoningExperiment:
    """The experiment of a folder that `poison` finished, with the victims that it named.

    Raises InputError for any other folder.
    """
    file = folder.path / "spec.json"
    spec = read_json(file) if file.is_file() else None
    if not isinstance(spec, dict) or "target_seed" not in spec:
        raise InputError(
            f"folder {folder.path}: is no poison run; give the folder that trompe poison printed"
        )
    if not folder.finished:
        raise InputError(
            f"folder {folder.path}: its poisons are not finished; the same trompe poison command "
            "goes on with them"
        )
    file = folder.path / "victims.json"
    victims = read_json(file) if file.is_file() else {}
    return read_poisoning({**spec, "victims": victims}, str(folder.path))


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
    found: dict[str, Any] = folder.read(name)
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
    """The share of targets whose victims' mean L1 is at most SUCCEEDED of the un-attacked ones'."""
    means = [
        torch.tensor([[real(v) for v in row] for row in numbers["values"]["l1"]]).mean(1)
        for numbers in (before, after)
    ]
    return float((means[1] <= SUCCEEDED * means[0]).double().mean())


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
    steps = _Steps(screen)
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
    maps = normalise(evidence.maps, "min-max").unflatten(0, (len(scene.targets), -1)).mean(1)
    return Measured(numbers, maps)


@dataclass(frozen=True)
class _Steps:
    """A Logbook that tells a screen of each step and keeps nothing."""

    screen: Screen

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None: ...

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.screen.step(epoch, step, steps, terms)


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
    half = _pool(experiment, scene.test)
    with torch.no_grad():
        for index in half.split(256):
            samples = networks.encode(scene.test.floats(index))[None]
            samples = samples.expand(networks.count, *samples.shape[1:])
            predicted = networks.scores(networks.now, samples).argmax(2)
            right += (predicted == scene.test.labels[index]).sum(1)
    return right / len(half)


def _pool(experiment: PoisoningExperiment, test: Samples) -> Tensor:
    """Positions of the half of the test set that choices, or numbers, are made with."""
    selecting, reporting = halves(test.labels, experiment.split_seed)
    return reporting if experiment.pool == "reporting" else selecting
