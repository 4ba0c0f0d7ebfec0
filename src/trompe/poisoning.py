"""Poisoning a training set: spec and pipeline.

A run is a folder (see runs.py for those files that all runs have):

| file                       | what                                                                |
|----------------------------|---------------------------------------------------------------------|
| spec.json                  | the experiment, but for its victims                                 |
| victims.json               | whom the experiment names as victims                                |
| clean.safetensors          | weights of the clean model that poisons and victims start from      |
| poison-00, ...             | for each target, its samples (see poison_sets.py)                   |
| numbers.json               | how many of them (written last: a run with it is finished)          |
| victims-<hash>.*           | what victims did with them (see measure_victims.py)                 |
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trompe import catalog
from trompe.augmentation import Augmentation
from trompe.classifier import Classifier, ModelSpec, build_model, build_table_model
from trompe.data import halves
from trompe.evaluate import answers
from trompe.experiment import check_attack_makes, check_makes, check_name, experiment_table
from trompe.files import read_json
from trompe.interfaces import (
    Data,
    InputError,
    Poisoning,
    PoisonSet,
    Samples,
    TableSet,
    Target,
)
from trompe.lockstep import Lockstep
from trompe.maps import is_degenerate
from trompe.poison_sets import (
    CRAFT_AGAIN,
    read_card,
    read_poison_set,
    set_folders,
    write_poison_set,
)
from trompe.runs import FileLogbook, RunFolder, fingerprint, provenance
from trompe.screen import Screen, Silent
from trompe.train import Training
from trompe.victims import (
    RECIPE,
    Start,
    check_in_memory,
    encode,
    train_together,
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
        if not 0 <= self.noise < math.inf:
            raise InputError(
                f"noise = {self.noise}: is a standard deviation; it must be at least 0, and finite"
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
        check_name(self.name)
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


def set_up(
    experiment: PoisoningExperiment,
    screen: Screen | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Scene:
    """Read the data, train the clean model, choose the targets.

    weights: the clean model's, which is not trained then. Raises InputError for settings that do
    not fit the data.
    """
    screen = screen or Silent()
    screen.stage("reading data")
    train, test = _data(experiment)
    if weights is None:
        screen.stage("training the clean model")
        clean = clean_model(experiment, experiment.model, train, screen)
    else:
        clean = _with(weights, experiment, train)
    pool = pool_of(experiment, test)
    screen.stage("choosing targets")
    said = answers(clean, (experiment.attack.explainer,), test, explained="label")
    right = pool[said.scores[pool].argmax(1) == test.labels[pool]]
    if len(right) < experiment.targets:
        raise InputError(
            f"targets = {experiment.targets}: of the {len(pool)} samples for {experiment.pool} the "
            f"clean model classifies {len(right)} correctly; "
            f"{'ask for fewer' if len(right) else 'train it for longer (clean.epochs)'}"
        )
    dice = torch.Generator().manual_seed(experiment.target_seed)
    positions = right[torch.randperm(len(right), generator=dice)[: experiment.targets]]
    samples = test.floats(positions)
    wanted = experiment.attack.wanted_map(said.maps[0][positions], samples)
    if wanted.isnan().any():
        raise InputError(
            f"attack.wanted_map ({type(experiment.attack.wanted_map).__name__}): leaves open what "
            "parts of the map show, but poisons need to know it everywhere; take another"
        )
    if (constant := is_degenerate(wanted)).any():
        raise InputError(
            f"attack.wanted_map ({type(experiment.attack.wanted_map).__name__}): is the same "
            f"everywhere for {int(constant.sum())} of {len(wanted)} targets, but maps are compared "
            "from their lowest to their highest value; take another"
        )
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
    try:
        folder.check_inputs(catalog.contents(experiment), "the poisons were made")
        train, test = _data(experiment)
    except InputError as error:
        raise InputError(
            f"run folder {folder.path}: {error}; a file that its spec names is looked for from the "
            "folder in which the poisons were crafted"
        ) from error
    clean = _with(folder.read_tensors("clean"), experiment, train)
    sets = poison_sets(folder)
    positions = torch.tensor([read_card(f)["target_position"] for f in set_folders(folder.path)])
    targets = tuple(one.target for one in sets)
    samples = torch.cat([target.sample for target in targets])
    same = int(positions.max()) < len(test) and samples.shape[1:] == test.floats(slice(1)).shape[1:]
    if not same or not torch.equal(test.floats(positions), samples):
        raise InputError(
            f"data {test.name!r}: are not those that the poisons were made for (the targets are "
            "not where they were); bring them back, or craft the poisons again"
        )
    return Scene(train, test, clean, targets, positions)


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
    seed, steps = experiment.seed, Steps(screen or Silent())
    generator = torch.Generator().manual_seed(seed)
    frozen = experiment.frozen_until if spec == experiment.model else None
    networks = Lockstep([untrained(spec, train, seed)], frozen_until=frozen)
    train_together(networks, (encode(networks, train),), experiment.clean, generator, steps)
    trained: Any = networks.network(0)
    return trained


def _with(
    weights: dict[str, Tensor], experiment: PoisoningExperiment, train: Samples
) -> Classifier:
    """The clean model that was kept; in eval mode."""
    clean = untrained(experiment.model, train, experiment.seed)
    try:
        clean.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"clean.safetensors: holds weights of another network than {experiment.model.name!r}; "
            f"{CRAFT_AGAIN}"
        ) from error
    return clean.eval()


def untrained(spec: ModelSpec, train: Samples, seed: int) -> Classifier:
    """A classifier as it begins, for data like these."""
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
                # An interrupted one goes on with its own: another number of threads would train
                # another clean model, and choose other targets.
                begun = (folder.path / "clean.safetensors").is_file()
                kept = folder.read_tensors("clean") if begun else None
                scene = set_up(experiment, screen, kept)
                folder.open(spec, inputs)
                folder.write_tensors("clean", scene.clean.state_dict())
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
    except InputError:
        if not logbook.file.exists():  # settings that do not fit the data: nothing was begun
            (folder.path / "clean.safetensors").unlink()
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
    return tuple(read_poison_set(part) for part in set_folders(folder.path))


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


@dataclass(frozen=True)
class Steps:
    """A Logbook that tells a screen of each step and keeps nothing."""

    screen: Screen

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None: ...

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.screen.step(epoch, step, steps, terms)


def pool_of(experiment: PoisoningExperiment, test: Samples) -> Tensor:
    """Positions of the half of the test set that choices, or numbers, are made with."""
    selecting, reporting = halves(test.labels, experiment.split_seed)
    return reporting if experiment.pool == "reporting" else selecting
