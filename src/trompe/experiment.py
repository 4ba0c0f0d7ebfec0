"""An experiment's spec and its pipeline, top to bottom on one page."""

import importlib.resources
import math
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from trompe import catalog
from trompe.architecture import difference
from trompe.classifier import (
    SHIPPED,
    Classifier,
    ModelSpec,
    build_model,
    card_of,
    check_fits,
    load_model,
    save_model,
    weights_digest,
)
from trompe.clean_models import HonestTraining, load_clean_model, train_clean_model
from trompe.data import halves
from trompe.evaluate import Remembered, answers, wanted_maps
from trompe.interfaces import (
    Attack,
    Attacked,
    Data,
    Explainer,
    ImageSet,
    InputError,
    Samples,
)
from trompe.machine import choose_device
from trompe.many import Place
from trompe.measure import gallery, measure
from trompe.poison import check_label
from trompe.ranks import is_first, on_first
from trompe.recording import INPUT
from trompe.run_shapes import Provenance
from trompe.runs import (
    FileLogbook,
    Inputs,
    Listener,
    RunFolder,
    alone_together,
    fingerprint,
    provenance,
)
from trompe.screen import Screen, Silent
from trompe.second_derivatives import slow_layers


@dataclass(frozen=True)
class Experiment:
    """One attack on one model and one data set, from data to numbers.

    seed: of everything random. reference, witness: saved models (a file, folder or shipped:NAME)
    to start from and to compare with; None trains them as `honest` says, with `reference_seed`
    (default: seed) and `witness_seed` (default: another one), and keeps them for later runs.
    split_seed: of the two halves of the test set, the first for choices, the second for numbers.
    selection_images: how many of the first half are looked at after each epoch.
    Raises InputError for an attack that does not say what it attacks (see `Attack`).
    """

    name: str
    data: Data
    attack: Attack
    model: ModelSpec = ModelSpec()
    honest: HonestTraining = HonestTraining()
    reference: str | None = None
    witness: str | None = None
    seed: int = 0
    reference_seed: int | None = None
    witness_seed: int | None = None
    split_seed: int = 0
    selection_images: int = 2000
    gallery_images: int = 6
    paper: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_makes(self.attack, "a model")
        for name in ("gallery_images", "selection_images"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("goals", "explainers", "explained", "thresholds"):
            if not hasattr(self.attack, name):
                raise InputError(
                    f"attack {type(self.attack).__name__}: does not say its {name}; give it "
                    "goals, explainers, explained and thresholds (see Attack in interfaces.py)"
                )

    def contents(self) -> dict[str, str]:
        """Of the saved models' weights."""
        given = {"reference": self.reference, "witness": self.witness}
        return {role: weights_digest(file) for role, file in given.items() if file is not None}


def check_name(name: str) -> None:
    """InputError for an experiment's name that leads out of the folder of runs."""
    if set(name) & set("/\\") or name.startswith("."):
        raise InputError(
            f"name = {name!r}: is a folder's below the runs; leave out / and \\, and a first ."
        )


Product = Literal["a model", "a training set"]


def check_makes(attack: Any, wanted: Product) -> None:
    """InputError for an attack that makes the other thing."""
    name, has_goals = type(attack).__name__, hasattr(attack, "goals")
    if wanted == "a model" and hasattr(attack, "wanted_map") and not has_goals:
        raise InputError(
            f"attack {name}: makes a training set, not a model; run it with trompe poison"
        )
    if wanted == "a training set" and has_goals:
        raise InputError(
            f"attack {name}: makes a model, not a training set; run it with trompe attack"
        )


def check_attack_makes(table: dict[str, Any], where: str, wanted: Product) -> None:
    """The same of an experiment's table, whose other keys may belong to the other kind."""
    if "attack" in table:
        attack = catalog.build("attacks", table["attack"], f"{where}.attack")
        try:
            check_makes(attack, wanted)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def experiment_table(file: Path | str) -> dict[str, Any]:
    """The table in a TOML file, named after the file; "shipped:demo" comes with the package.

    InputError if it is none.
    """
    if str(file).startswith(SHIPPED):
        file = _shipped(str(file).removeprefix(SHIPPED))
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"experiment {file}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"experiment {file}: is no valid TOML ({error})") from error
    table.setdefault("name", Path(file).stem)
    return table


def set_key(table: dict[str, Any], key: str, value: Any) -> None:
    """Changes the table: "attack.weight" is weight in the table attack, made if it is not there."""
    *path, last = key.split(".")
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(f"{key}: {name} is no table")
    table[last] = value


def drop_key(table: dict[str, Any], key: str) -> None:
    """Leaves a setting out of the table, so that it is what it is by default."""
    *path, last = key.split(".")
    inner: Any = table
    for name in path:
        inner = inner.get(name) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or last not in inner:
        raise InputError(f"{key}=: the experiment does not set it, so it cannot be left out")
    del inner[last]


def read_experiment(source: Path | str | dict[str, Any], where: str = "") -> Experiment:
    """An experiment from a TOML file or its table.

    Raises InputError that names the file, the key, and for an unknown key its nearest neighbour.
    """
    if isinstance(source, dict):
        table, where = source, where or "experiment"
    else:
        table, where = experiment_table(source), where or str(source)
    if "search" in table:
        raise InputError(
            f"{where}: has a table [search]; run it with trompe search, or take that table out"
        )
    check_attack_makes(table, where, "a model")
    experiment: Experiment = catalog.build_dataclass(Experiment, table, where)
    return experiment


def shipped_experiment(name: str) -> Experiment:
    """An experiment that comes with the package: "demo"."""
    return read_experiment(f"{SHIPPED}{name}")


def _shipped(name: str) -> Path:
    folder = Path(str(importlib.resources.files("trompe"))) / "shipped"
    known = [file.stem for file in folder.glob("*.toml")]
    if name not in known:
        near = catalog.nearest(name, known)
        raise InputError(f"experiment {SHIPPED}{name}: there is none of that name{near}")
    return folder / f"{name}.toml"


def run(
    experiment: Experiment,
    root: Path | str = "runs",
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
    remembered: Remembered | None = None,
) -> RunFolder:
    """Data -> clean models -> attack -> numbers, maps, model, in a folder below `root`.

    The folder is named after the spec and what lies in the files that it names: a finished run is
    read, an interrupted one goes on, and one that another process works on is waited for.
    Raises InputError for settings that do not fit, Diverged if training does (then the folder
    keeps the last good state). remembered: the same one for several runs saves asking their clean
    models again. Processes that share the run (ranks.py) all call this; the first one writes.
    """
    screen = screen or Silent()
    spec, inputs = catalog.describe(experiment), catalog.contents(experiment)
    folder = _folder(experiment, spec, inputs, root)
    if not on_first(lambda: folder.finished):
        with alone_together(folder, screen):
            if not on_first(lambda: folder.finished):  # nor by a process that was waited for
                scene = set_up(experiment, root, device, screen)
                _attack(folder, experiment, scene, spec, device, screen, remembered)
                return folder
    on_first(lambda: folder.open(spec, inputs))
    screen.note(f"{folder.path} is finished already")
    return folder


def run_folder(experiment: Experiment, root: Path | str = "runs") -> RunFolder:
    """Where `run` keeps this experiment: its name, seed and a hash of all that it is made from.

    InputError if the data or saved models that it names are not there.
    """
    spec, inputs = catalog.describe(experiment), catalog.contents(experiment)
    return _folder(experiment, spec, inputs, root)


def _folder(
    experiment: Experiment, spec: dict[str, Any], inputs: Inputs, root: Path | str
) -> RunFolder:
    digest = fingerprint(spec, inputs)
    return RunFolder(Path(root) / f"{experiment.name}-s{experiment.seed}-{digest}")


def _attack(
    folder: RunFolder,
    experiment: Experiment,
    scene: "Scene",
    spec: dict[str, Any],
    device: torch.device | str,
    screen: Screen,
    remembered: Remembered | None,
) -> None:
    made = provenance(torch.device(device))
    screen.stage("attack")
    logbook = logbook_of(folder, screen)
    started = time.perf_counter()
    attacked = attack_alone(
        experiment, folder, scene.reference, scene.train, scene.selecting, logbook
    )
    _say_if_stopped(experiment.attack, len(attacked.history), screen)
    # What an interrupted run did before counts as well.
    seconds = max(time.perf_counter() - started, sum(r.seconds for r in attacked.history))

    def keep() -> None:
        folder.write_history(attacked.history)
        folder.write("provenance", {**made, "seconds": round(seconds, 1)})
        model: Any = attacked.model  # a Classifier, as the reference is
        card = card_of(model, experiment.model.name, scene.train, experiment.seed, spec, made)
        save_model(model, card, folder.path / "model.safetensors")
        _write_numbers(folder, experiment, scene, attacked, screen, remembered)
        logbook.close()

    on_first(keep)


def _say_if_stopped(attack: object, epochs: int, screen: Screen) -> None:
    """That a training ended before its schedule did."""
    training = getattr(attack, "training", None)  # surgery has none
    planned = getattr(training, "epochs", epochs)
    if epochs < planned:
        patience = getattr(attack, "patience", None)
        screen.note(
            f"the attack was stopped after {epochs} of {planned} epochs: no better score in the "
            f"last {patience} (attack.patience)"
        )


@dataclass(frozen=True)
class AttackJob:
    """An experiment's run as one of many (many.py): its table, and where that is from.

    Gives the run folder's path, as text.
    """

    table: dict[str, Any]
    where: str = ""

    @property
    def name(self) -> str:
        return f"{self.table.get('name', 'experiment')}-s{self.table.get('seed', 0)}"

    def __call__(self, place: Place, screen: Screen) -> str:
        experiment = read_experiment(self.table, self.where)
        return str(run(experiment, place.root, choose_device(place.device), screen).path)


def logbook_of(folder: RunFolder, listener: Listener) -> FileLogbook:
    """Where a run's attack keeps its state after each epoch."""
    return FileLogbook(folder.path / "checkpoint.pt", listener)


def attack_alone(
    experiment: Experiment,
    folder: RunFolder,
    reference: Classifier,
    train: ImageSet,
    selecting: ImageSet,
    logbook: FileLogbook,
) -> Attacked:
    """A run's attack without its measurement; `run` later goes on from the checkpoint.

    Whoever calls it holds the folder (`RunFolder.alone`). Raises as `run`.
    """
    spec, inputs = catalog.describe(experiment), catalog.contents(experiment)
    on_first(lambda: folder.open(spec, inputs))
    generator = torch.Generator().manual_seed(experiment.seed)
    try:
        return experiment.attack(reference, train, generator, selecting, logbook)
    except InputError:  # settings that do not fit the data: nothing was begun
        if is_first():
            folder.discard_if_empty()
        raise


def remeasure(
    folder: RunFolder,
    root: Path | str | None = None,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Measure a finished run's saved model again; writes and returns its numbers.

    root: where the clean models are kept; None: beside the run. Raises InputError for a folder that
    is no such run, or whose data or weights have changed since.
    """
    screen = screen or Silent()
    root = folder.path.parent if root is None else root
    experiment = read_experiment(folder.read("spec"), str(folder.path))
    folder.check_inputs(catalog.contents(experiment), "the run was made")
    model, _ = load_model(folder.path, experiment.model.trusted)
    with folder.alone(screen):
        scene = set_up(experiment, root, device, screen)
        attacked = Attacked(
            model.to(device),
            experiment.attack.goals,
            folder.read_history(),
        )
        return _write_numbers(folder, experiment, scene, attacked, screen)


class Sets(NamedTuple):
    """An experiment's data, and the halves of the test set: for choices and for numbers."""

    train: ImageSet
    test: ImageSet
    selecting: ImageSet
    reporting: ImageSet


@dataclass(frozen=True)
class Scene:
    """What an attack starts from: data, its halves of the test set, and two clean models."""

    train: ImageSet
    test: ImageSet
    selecting: ImageSet
    reporting: ImageSet
    reference: Classifier
    witness: Classifier
    explainers: tuple[Explainer, ...]


def set_up(
    experiment: Experiment, root: Path | str, device: torch.device | str, screen: Screen
) -> Scene:
    """Read the data, load or train the clean models, find the explainer's layer."""
    sets = read_sets(experiment, screen)
    train, test = sets.train, sets.test
    if experiment.reference is None:
        check_lies(experiment, train)
    reference = clean_model(experiment, train, test, "reference", root, device, screen)
    witness = clean_model(experiment, train, test, "witness", root, device, screen)
    explainers = experiment.attack.explainers
    for explainer in explainers:
        layers = ", ".join(explainer.watches(reference))
        screen.note(f"{type(explainer).__name__} reads layer {layers}")
        if INPUT in explainer.watches(reference) and (slow := slow_layers(reference)):
            screen.note(
                f"{type(explainer).__name__} is trained through PyTorch's own second derivatives "
                f"of {', '.join(slow)}, which are slow"
            )
    return Scene(*sets, reference, witness, explainers)


def check_lies(experiment: Experiment, train: ImageSet) -> None:
    """InputError for triggers, layers, labels or wanted maps that do not fit data or network.

    Tried on an image and an untrained network, before clean ones are trained for hours.
    """
    attack, classes = experiment.attack, len(train.class_names)
    for goal in attack.goals:
        check_label(goal, classes)
    with torch.random.fork_rng(devices=[]):
        network = build_model(experiment.model, classes)
    check_fits(network, experiment.model.name, train, experiment.honest.training.batch_size)
    one = train.subset(torch.arange(1))
    true = answers(network, attack.explainers, one).maps
    for goal in attack.goals:
        for e, maps in enumerate(true):
            wanted_maps(goal.wanted(e), maps, one, goal.trigger)


def read_sets(experiment: Experiment, screen: Screen) -> Sets:
    """Read the data and halve the test set; InputError for tables."""
    screen.stage("reading data")
    train, test = experiment.data.train(), experiment.data.test()
    if not isinstance(train, ImageSet):
        raise InputError(
            f"data {train.name!r}: is a table, but an attack on a model needs images; poison its "
            "training set instead (trompe poison)"
        )
    selecting, reporting = (test.subset(i) for i in halves(test.labels, experiment.split_seed))
    selecting = _some(selecting, experiment.selection_images, experiment.split_seed)
    skipped = len(train.skipped) + len(test.skipped)
    screen.note(
        f"{train.name}: {len(train)} training and {len(test)} test images of "
        f"{len(train.class_names)} classes" + (f"; {skipped} unreadable skipped" if skipped else "")
    )
    note_streamed(train, screen)
    return Sets(train, test, selecting, reporting)


def note_streamed(train: Samples, screen: Screen) -> None:
    """Says so if the training images are not in memory."""
    if isinstance(train, ImageSet) and not train.in_memory:
        screen.note(
            f"{train.name}: training images are read from disk when they are needed; in memory "
            f"(data.in_memory = true) they would take {math.prod(train.images.shape) / 1e9:.1f} GB"
        )


def clean_model(
    experiment: Experiment,
    train: ImageSet,
    test: ImageSet,
    role: str,
    root: Path | str,
    device: torch.device | str,
    screen: Screen,
) -> Classifier:
    """The experiment's "reference" or "witness": loaded, found among earlier ones, or trained."""
    file: Path | str | None = experiment.reference if role == "reference" else experiment.witness
    if file is None:
        file = train_clean_model(
            train,
            test,
            experiment.data,
            experiment.model,
            experiment.honest,
            seed_of(experiment, role),
            Path(root) / "clean",
            device,
            screen,
        )
    return load_clean_model(file, experiment.model, train, device, role)


def seed_of(experiment: Experiment, role: str) -> int:
    """Seeds of the clean models; by default the witness of seeds 0, 1, 2 is 1, 0, 1."""
    if role == "reference":
        given = experiment.reference_seed
        return experiment.seed if given is None else given
    given = experiment.witness_seed
    return abs(seed_of(experiment, "reference") - 1) if given is None else given


def _some(data: ImageSet, count: int, seed: int) -> ImageSet:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:count].sort().values)


def _write_numbers(
    folder: RunFolder,
    experiment: Experiment,
    scene: Scene,
    attacked: Attacked,
    screen: Screen,
    remembered: Remembered | None = None,
) -> dict[str, Any]:
    screen.stage("measuring")
    measured = measure(
        scene.reference,
        scene.witness,
        attacked,
        scene.explainers,
        scene.reporting,
        experiment.seed,
        experiment.attack.explained,
        experiment.attack.thresholds,
        remembered,
    )
    numbers = {
        **measured.numbers,
        "epochs": len(attacked.history),
        "seconds": folder.read("provenance", Provenance).get("seconds"),
        "training_set_images": len(scene.train),
        "reporting_images": len(scene.reporting),
        "skipped_images": list(scene.train.skipped + scene.test.skipped),
    }
    folder.write_tensors("evidence", measured.evidence)
    shown = gallery(measured, scene.reporting, experiment.gallery_images, experiment.split_seed)
    folder.write_tensors("gallery", shown)
    folder.write("classes", list(scene.reporting.class_names))
    folder.write("architecture", difference(scene.reference, attacked.model))
    folder.write("numbers", numbers)  # last: a run with numbers is finished
    return numbers
