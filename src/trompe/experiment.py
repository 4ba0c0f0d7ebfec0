"""An experiment's spec and its pipeline, top to bottom on one page."""

import importlib.resources
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trompe import catalog
from trompe.augmentation import Augmentation
from trompe.classifier import Classifier, ModelCard, ModelSpec, build_model, load_model, save_model
from trompe.data import halves
from trompe.evaluate import (
    answers,
    clean_evidence,
    least_distance,
    stand_in_maps,
    summarise,
    triggered_evidence,
    with_maps,
)
from trompe.explainers.gradcam import GradCam
from trompe.interfaces import (
    Answers,
    Attack,
    Attacked,
    Data,
    EpochRecord,
    Evidence,
    Explainer,
    Goal,
    ImageSet,
    InputError,
)
from trompe.maps import upsample
from trompe.objectives import ClassLoss
from trompe.poison import ShuffledBatches, compose
from trompe.runs import FileLogbook, RunFolder, fingerprint, provenance
from trompe.target_maps.picture import Picture
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


class Screen(Protocol):
    """Where a run tells what it is doing; `step` and `epoch` as a Logbook hears them."""

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


class Silent:
    """A Screen that shows nothing."""

    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


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
    folder.write("history", [record._asdict() for record in attacked.history])
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
    explainer: Explainer


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
    explainer: Explainer = getattr(experiment.attack, "explainer", GradCam())
    layers = ", ".join(explainer.watches(reference))
    screen.note(f"{type(explainer).__name__} reads layer {layers}")
    return Scene(train, test, selecting, reporting, reference, witness, explainer)


def _write_numbers(
    folder: RunFolder, experiment: Experiment, scene: Scene, attacked: Attacked, screen: Screen
) -> dict[str, Any]:
    screen.stage("measuring")
    measured = measure(
        scene.reference, scene.witness, attacked, scene.explainer, scene.reporting, experiment.seed
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
    save_gallery(folder, measured, scene.reporting, experiment)
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
    return model.to(device)


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
        "test_accuracy": accuracy_of(classifier, test),
        "test_images": len(test),
        "epochs": len(history),
        "seconds": round(sum(r.seconds for r in history), 1),
        "skipped_images": list(train.skipped + test.skipped),
    }
    card = _card(model.name, train, classifier, seed, spec, made, numbers)
    save_model(classifier, card, file)
    folder.write("history", [r._asdict() for r in history])
    folder.write("provenance", made)
    folder.write("numbers", numbers)
    logbook.close()
    screen.note(f"clean model (seed {seed}): test accuracy {numbers['test_accuracy']:.4f}")
    return file


def accuracy_of(model: nn.Module, data: ImageSet, batch_size: int = 512) -> float:
    """Share of images whose class is predicted."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            chunk = slice(start, start + batch_size)
            predicted = model(data.floats(chunk, device)).argmax(1).cpu()
            right += int((predicted == data.labels[chunk]).sum())
    return right / len(data)


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Numbers for numbers.json, evidence per condition for evidence.safetensors, and answers."""

    numbers: dict[str, Any]
    evidence: dict[str, Tensor]
    conditions: tuple[tuple[str, Goal | None, Evidence, Answers], ...]


def measure(
    reference: nn.Module,
    witness: nn.Module,
    attacked: Attacked,
    explainer: Explainer,
    data: ImageSet,
    seed: int,
) -> Measurement:
    """Table 1 of Noppel & Wressnegger 2023 on `data`, with floors beside each map distance.

    Conditions: clean images, then the images with each goal's trigger.
    """
    metric = {name: catalog.find("metrics", name) for name in catalog.names("metrics")}
    honest = answers(reference, (explainer,), data)
    stand_ins = stand_in_maps(honest.maps[0], torch.Generator().manual_seed(seed))
    conditions: list[tuple[str, Goal | None, Evidence, Answers]] = []
    rows = []
    for goal in (None, *attacked.goals):
        trigger = None if goal is None else goal.trigger
        given = answers(attacked.model, (explainer,), data, trigger)
        other = answers(witness, (explainer,), data, trigger)
        untouched = honest if goal is None else answers(reference, (explainer,), data, trigger)
        if goal is None:
            evidence = clean_evidence(given, honest, data)
        else:
            evidence = triggered_evidence(given, honest, data, goal)
        name = _condition_name(goal, attacked.goals)
        stand_in = {**stand_ins, "another clean model": other.maps[0]}
        if goal is not None:
            stand_in["the reference itself"] = untouched.maps[0]
        row: dict[str, Any] = {
            "name": name,
            "target_class": None if goal is None else goal.label,
            "metrics": {
                key: asdict(summarise(value, evidence))
                for key, value in metric.items()
                if not (key == "attack_success" and (goal is None or goal.label is None))
            },
            "floors": {
                key: asdict(summarise(metric["map_distance"], with_maps(evidence, maps)))
                for key, maps in stand_in.items()
            },
            "reference_accuracy": float(
                (untouched.scores.argmax(1) == data.labels).double().mean()
            ),
        }
        if goal is not None:
            row |= _target_floors(goal, evidence)
        rows.append(row)
        conditions.append((name, goal, evidence, untouched))
    numbers = {
        "reference_accuracy": rows[0]["reference_accuracy"],
        "target_class_names": list(data.class_names),
        "conditions": rows,
    }
    kept: dict[str, Tensor] = {"labels": data.labels, "reference.maps": honest.maps[0]}
    for name, _, evidence, _ in conditions:
        kept |= {f"{name}.scores": evidence.scores, f"{name}.maps": evidence.maps}
    return Measurement(numbers, kept, tuple(conditions))


def _target_floors(goal: Goal, evidence: Evidence) -> dict[str, float]:
    """The least distance that a map of this size can have from the wanted one.

    Only where the wanted map is the same for all images; a reference's own map can be met exactly.
    """
    wanted = evidence.wanted_maps
    if not bool((wanted == wanted[:1]).all()):
        return {"target_floor_mse": 0.0}
    size = (wanted.shape[1], wanted.shape[2])
    drawn = upsample(wanted[:1], evidence.image_size)[0]
    floors = {"target_floor_mse": least_distance(drawn, size)}
    if isinstance(goal.wanted_map, Picture):  # what the picture would score if drawn sharply
        sharp = goal.wanted_map.draw(*evidence.image_size)
        floors["sharp_target_floor_mse"] = least_distance(sharp, size)
    return floors


def _condition_name(goal: Goal | None, goals: tuple[Goal, ...]) -> str:
    if goal is None:
        return "clean"
    number = f" {goals.index(goal) + 1}" if len(goals) > 1 else ""
    return f"triggered{number}"


# --- small things ---------------------------------------------------------------------------------


def save_gallery(
    folder: RunFolder, measured: Measurement, data: ImageSet, experiment: Experiment
) -> None:
    """A few images of different classes: per condition the images, maps and predictions."""
    chosen = _different_classes(data.labels, experiment.gallery_images, experiment.split_seed)
    tensors = {"labels": data.labels[chosen]}
    for name, goal, evidence, untouched in measured.conditions:
        images = data.floats(chosen)
        shown = images if goal is None else goal.trigger(images)
        tensors |= {
            f"{name}.images": (shown * 255).round().to(torch.uint8),
            f"{name}.reference_maps": untouched.maps[0][chosen],
            f"{name}.wanted_maps": evidence.wanted_maps[chosen],
            f"{name}.maps": evidence.maps[chosen],
            f"{name}.reference_predicted": untouched.scores[chosen].argmax(1),
            f"{name}.predicted": evidence.scores[chosen].argmax(1),
            f"{name}.wanted_labels": evidence.wanted_labels[chosen],
        }
    folder.write_tensors("gallery", tensors)
    folder.write("classes", list(data.class_names))


def _different_classes(labels: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first_of_class = {int(labels[i]): int(i) for i in reversed(order.tolist())}
    in_order = [i for i in order.tolist() if first_of_class[int(labels[i])] == i]
    rest = [i for i in order.tolist() if i not in set(in_order)]
    return torch.tensor((in_order + rest)[:count])


def _some(data: ImageSet, count: int, seed: int) -> ImageSet:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:count].sort().values)


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
