"""An experiment's spec and its pipeline, top to bottom on one page."""

import importlib.resources
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trompe import catalog
from trompe.augmentation import Augmentation
from trompe.classifier import Classifier, ModelCard, ModelSpec, build_model, load_model, save_model
from trompe.data import halves
from trompe.evaluate import answers, share_right
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import (
    Attack,
    Attacked,
    Data,
    EpochRecord,
    Explainer,
    ImageSet,
    InputError,
)
from trompe.measure import gallery, measure
from trompe.objectives import ClassLoss
from trompe.poison import ShuffledBatches, compose
from trompe.runs import FileLogbook, RunFolder, fingerprint, provenance
from trompe.screen import Screen, Silent
from trompe.train import Training, fit


@dataclass(frozen=True)
class HonestTraining:
    """How the clean models are made: the reference and, with another seed, the witness."""

    training: Training = Training(epochs=15, batch_size=128, learning_rate=0.1)
    augmentation: Augmentation | None = Augmentation()


@dataclass(frozen=True)
class Experiment:
    """One attack on one model and one data set, from data to numbers.

    seed: of everything random. reference, witness: saved models (a file, folder or shipped:NAME)
    to start from and to compare with; None trains them as `honest` says, with `reference_seed`
    (default: seed) and `witness_seed` (default: another one), and keeps them for later runs.
    split_seed: of the two halves of the test set, the first for choices, the second for numbers.
    selection_images: how many of the first half are looked at after each epoch.
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


def experiment_table(file: Path | str) -> dict[str, Any]:
    """The table in a TOML file, named after the file. InputError if it is none."""
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"experiment {file}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"experiment {file}: is no valid TOML ({error})") from error
    table.setdefault("name", Path(file).stem)
    return table


def read_experiment(source: Path | str | dict[str, Any], where: str = "") -> Experiment:
    """An experiment from a TOML file or its table.

    Raises InputError that names the file, the key, and for an unknown key its nearest neighbour.
    """
    table = source if isinstance(source, dict) else experiment_table(source)
    experiment: Experiment = catalog.build_dataclass(Experiment, table, where or str(source))
    return experiment


def shipped_experiment(name: str) -> Experiment:
    """An experiment that comes with the package: "demo"."""
    return read_experiment(
        Path(str(importlib.resources.files("trompe"))) / "shipped" / f"{name}.toml"
    )


def run(
    experiment: Experiment,
    root: Path | str = "runs",
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> RunFolder:
    """Data -> clean models -> attack -> numbers, maps, model, in a folder below `root`.

    The folder is named after the spec: a finished run is read, an interrupted one goes on.
    Raises InputError for settings that do not fit, Diverged if training does (then the folder
    keeps the last good state).
    """
    screen = screen or Silent()
    spec = catalog.describe(experiment)
    folder = run_folder(experiment, root)
    if folder.finished:
        screen.note(f"{folder.path} is finished already")
        return folder
    scene = set_up(experiment, root, device, screen)
    folder.open(spec)

    made = provenance(torch.device(device))
    screen.stage("attack")
    logbook = FileLogbook(folder.path / "checkpoint.pt", screen)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(experiment.seed)
    try:
        attacked = experiment.attack(
            scene.reference, scene.train, generator, scene.selecting, logbook
        )
    except InputError:  # settings that do not fit the data: nothing was begun
        folder.discard_if_empty()
        raise
    # What an interrupted run did before counts as well.
    seconds = max(time.perf_counter() - started, sum(r.seconds for r in attacked.history))
    folder.write("history", _numbers_of(attacked.history))
    timeline = {f"{r.epoch}.{name}": v for r in attacked.history for name, v in r.shown.items()}
    if timeline:
        folder.write_tensors("timeline", timeline)
    folder.write("provenance", {**made, "seconds": round(seconds, 1)})
    card = _card(experiment.model.name, scene.train, attacked.model, experiment.seed, spec, made)
    save_model(attacked.model, card, folder.path / "model.safetensors")  # type: ignore[arg-type]

    _write_numbers(folder, experiment, scene, attacked, screen)
    logbook.close()
    return folder


def run_folder(experiment: Experiment, root: Path | str = "runs") -> RunFolder:
    """Where `run` keeps this experiment: its name, seed and a hash of all settings."""
    digest = fingerprint(catalog.describe(experiment))
    return RunFolder(Path(root) / f"{experiment.name}-s{experiment.seed}-{digest}")


def remeasure(
    folder: RunFolder,
    root: Path | str = "runs",
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Measure a finished run's saved model again; writes and returns its numbers."""
    screen = screen or Silent()
    experiment = catalog.build_dataclass(Experiment, folder.read("spec"), str(folder.path))
    model, _ = load_model(folder.path, _own_architecture(experiment.model))
    scene = set_up(experiment, root, device, screen)
    attacked = Attacked(
        model.to(device),
        getattr(experiment.attack, "goals", ()),
        tuple(EpochRecord(**record) for record in folder.read("history")),
    )
    return _write_numbers(folder, experiment, scene, attacked, screen)


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
    screen.stage("reading data")
    train, test = experiment.data.train(), experiment.data.test()
    selecting, reporting = (test.subset(i) for i in halves(test.labels, experiment.split_seed))
    selecting = _some(selecting, experiment.selection_images, experiment.split_seed)
    skipped = len(train.skipped) + len(test.skipped)
    screen.note(
        f"{train.name}: {len(train)} training and {len(test)} test images of "
        f"{len(train.class_names)} classes" + (f"; {skipped} unreadable skipped" if skipped else "")
    )
    reference = clean_model(experiment, train, test, "reference", root, device, screen)
    witness = clean_model(experiment, train, test, "witness", root, device, screen)
    explainers: tuple[Explainer, ...] = getattr(experiment.attack, "explainers", (GradCam(),))
    for explainer in explainers:
        layers = ", ".join(explainer.watches(reference))
        screen.note(f"{type(explainer).__name__} reads layer {layers}")
    return Scene(train, test, selecting, reporting, reference, witness, explainers)


def _write_numbers(
    folder: RunFolder, experiment: Experiment, scene: Scene, attacked: Attacked, screen: Screen
) -> dict[str, Any]:
    screen.stage("measuring")
    measured = measure(
        scene.reference,
        scene.witness,
        attacked,
        scene.explainers,
        scene.reporting,
        experiment.seed,
        getattr(experiment.attack, "explained", "predicted"),
        getattr(experiment.attack, "thresholds", None),
    )
    numbers = {
        **measured.numbers,
        "epochs": len(attacked.history),
        "seconds": folder.read("provenance")["seconds"],
        "training_images": len(scene.train),
        "reporting_images": len(scene.reporting),
        "skipped_images": list(scene.train.skipped + scene.test.skipped),
    }
    folder.write_tensors("evidence", measured.evidence)
    shown = gallery(measured, scene.reporting, experiment.gallery_images, experiment.split_seed)
    folder.write_tensors("gallery", shown)
    folder.write("classes", list(scene.reporting.class_names))
    folder.write("numbers", numbers)  # last: a run with numbers is finished
    return numbers


# --- clean models ---------------------------------------------------------------------------------


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
    given = experiment.reference if role == "reference" else experiment.witness
    file: str | Path
    if given is None:
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
    else:
        file = given
    model, card = load_model(file, _own_architecture(experiment.model))
    if card.class_names != train.class_names:
        raise InputError(
            f"{role} model {file}: was made for {len(card.class_names)} classes "
            f"({', '.join(card.class_names[:3])}, ...), but data {train.name!r} has "
            f"{len(train.class_names)} ({', '.join(train.class_names[:3])}, ...); "
            "use a model and data that belong together"
        )
    return model.to(device).to(memory_format=torch.channels_last)  # a third faster


def seed_of(experiment: Experiment, role: str) -> int:
    """Seeds of the clean models; by default the witness of seeds 0, 1, 2 is 1, 0, 1."""
    if role == "reference":
        given = experiment.reference_seed
        return experiment.seed if given is None else given
    given = experiment.witness_seed
    return abs(seed_of(experiment, "reference") - 1) if given is None else given


def train_clean_model(
    train: ImageSet,
    test: ImageSet,
    data: Data,
    model: ModelSpec,
    honest: HonestTraining,
    seed: int,
    root: Path,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
    out: Path | None = None,
) -> Path:
    """Train a model honestly; returns its .safetensors file. Resumes, and is not done twice.

    Kept in `out`, or below `root` under a name made from the settings.
    """
    screen = screen or Silent()
    spec = catalog.describe({"data": data, "model": model, "honest": honest, "seed": seed})
    folder = RunFolder(
        out or root / f"{train.name}-{_plain_name(model.name)}-s{seed}-{fingerprint(spec)}"
    )
    file = folder.path / "model.safetensors"
    if folder.finished:
        if folder.read("spec") != spec:
            folder.open(spec)  # says so
        return file
    folder.open(spec)
    made = provenance(torch.device(device))
    screen.stage(f"training a clean model (seed {seed})")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = build_model(model, len(train.class_names)).to(device)
    generator = torch.Generator().manual_seed(seed)
    triples = compose(train, (), 0.0, generator, device, honest.augmentation)
    batches = ShuffledBatches(triples, honest.training.batch_size)
    objective = ClassLoss(honest.training.label_smoothing)
    logbook = FileLogbook(folder.path / "checkpoint.pt", screen)
    history = list(
        fit(classifier, batches, objective, (), honest.training, generator, None, logbook)
    )
    screen.stage("measuring the clean model")
    numbers = {
        "test_accuracy": share_right(answers(classifier, (), test).scores, test.labels),
        "test_images": len(test),
        "epochs": len(history),
        "seconds": round(sum(r.seconds for r in history), 1),
        "skipped_images": list(train.skipped + test.skipped),
    }
    card = _card(model.name, train, classifier, seed, spec, made, numbers)
    save_model(classifier, card, file)
    folder.write("history", _numbers_of(history))
    folder.write("provenance", made)
    folder.write("numbers", numbers)
    logbook.close()
    screen.note(f"clean model (seed {seed}): test accuracy {numbers['test_accuracy']:.4f}")
    return file


# --- small things ---------------------------------------------------------------------------------


def _some(data: ImageSet, count: int, seed: int) -> ImageSet:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:count].sort().values)


def _numbers_of(history: Sequence[EpochRecord]) -> list[dict[str, Any]]:
    """Records as plain JSON, without the tensors."""
    fields = ("epoch", "terms", "measured", "seconds")
    return [{field: getattr(record, field) for field in fields} for record in history]


def _card(
    name: str,
    data: ImageSet,
    model: nn.Module,
    seed: int,
    spec: dict[str, Any],
    made: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> ModelCard:
    # float32 as decimals: 0.485, not 0.48500001430511475
    mean = tuple(round(v, 6) for v in model.mean.flatten().tolist())  # type: ignore[operator]
    std = tuple(round(v, 6) for v in model.std.flatten().tolist())  # type: ignore[operator]
    return ModelCard(
        name,
        data.class_names,
        data.size[0],
        mean,
        std,
        seed=seed,
        spec=spec,
        metrics=metrics or {},
        provenance=made,
    )


def _own_architecture(model: ModelSpec) -> str | None:
    """A package.module:callable that the user's own experiment names, which is thus trusted."""
    return model.name if ":" in model.name else None


def _plain_name(name: str) -> str:
    return name.replace(":", ".").replace("/", ".")
