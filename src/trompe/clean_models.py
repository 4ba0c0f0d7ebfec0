"""Clean models: an attack starts from one, and another one shows what is usual between them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trompe import catalog
from trompe.augmentation import Augmentation
from trompe.classifier import (
    Classifier,
    ModelSpec,
    build_model,
    card_of,
    check_fits,
    load_model,
    save_model,
)
from trompe.evaluate import answers, share_right
from trompe.interfaces import Data, ImageSet, InputError
from trompe.objectives import ClassLoss
from trompe.poison import ShuffledBatches, compose
from trompe.ranks import on_first
from trompe.runs import FileLogbook, RunFolder, alone_together, fingerprint, provenance
from trompe.screen import Screen, Silent
from trompe.train import Training, fit


@dataclass(frozen=True)
class HonestTraining:
    """How the clean models are made: the reference and, with another seed, the witness."""

    training: Training = Training(epochs=15, batch_size=128, learning_rate=0.1)
    augmentation: Augmentation | None = Augmentation()


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

    Kept in `out`, or below `root` under a name made from the settings and what lies in the files
    that they name. One process trains it, others wait; processes that share the run (ranks.py) all
    call this, and the first one writes.
    """
    screen = screen or Silent()
    settings = {"data": data, "model": model, "honest": honest, "seed": seed}
    spec, inputs = catalog.describe(settings), catalog.contents(settings)
    name = f"{train.name}-{_plain_name(model.name)}-s{seed}-{fingerprint(spec, inputs)}"
    folder = RunFolder(out or root / name)
    if not on_first(lambda: folder.finished):
        with alone_together(folder, screen):
            if not on_first(lambda: folder.finished):
                on_first(lambda: folder.open(spec, inputs))
                _train(folder, train, test, model, honest, seed, spec, device, screen)
    on_first(lambda: folder.open(spec, inputs))  # says so if `out` holds another model
    return folder.path / "model.safetensors"


def _train(
    folder: RunFolder,
    train: ImageSet,
    test: ImageSet,
    model: ModelSpec,
    honest: HonestTraining,
    seed: int,
    spec: dict[str, Any],
    device: torch.device | str,
    screen: Screen,
) -> None:
    made = provenance(torch.device(device))
    screen.stage(f"training a clean model (seed {seed})")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            classifier = build_model(model, len(train.class_names))
        check_fits(classifier, model.name, train, honest.training.batch_size)
    except InputError:  # the same folder may then hold what the corrected command trains
        on_first(folder.discard_if_empty)
        raise
    classifier = classifier.to(device)
    generator = torch.Generator().manual_seed(seed)
    triples = compose(train, (), 0.0, generator, device, honest.augmentation)
    batches = ShuffledBatches(triples, honest.training.batch_size)
    objective = ClassLoss(honest.training.label_smoothing)
    logbook = FileLogbook(folder.path / "checkpoint.pt", screen)
    history = list(
        fit(classifier, batches, objective, (), honest.training, generator, None, logbook)
    )
    screen.stage("measuring the clean model")

    def keep() -> None:
        numbers = {
            "test_accuracy": share_right(answers(classifier, (), test).scores, test.labels),
            "test_images": len(test),
            "epochs": len(history),
            "seconds": round(sum(r.seconds for r in history), 1),
            "skipped_images": list(train.skipped + test.skipped),
        }
        card = card_of(classifier, model.name, train, seed, spec, made, numbers)
        save_model(classifier, card, folder.path / "model.safetensors")
        folder.write_history(history)
        folder.write("provenance", made)
        folder.write("numbers", numbers)
        logbook.close()
        screen.note(f"clean model (seed {seed}): test accuracy {numbers['test_accuracy']:.4f}")

    on_first(keep)


def load_clean_model(
    file: Path | str, model: ModelSpec, data: ImageSet, device: torch.device | str, role: str
) -> Classifier:
    """A saved model that is to classify `data`, in eval mode on `device`.

    role: what it is for ("reference" or "witness"). Raises InputError if it cannot be read, or was
    made for other classes.
    """
    classifier, card = load_model(file, model.trusted)
    if card.class_names != data.class_names:
        raise InputError(
            f"{role} model {file}: was made for {len(card.class_names)} classes "
            f"({', '.join(card.class_names[:3])}, ...), but data {data.name!r} has "
            f"{len(data.class_names)} ({', '.join(data.class_names[:3])}, ...); "
            "use a model and data that belong together"
        )
    return classifier.to(device).to(memory_format=torch.channels_last)  # a third faster


def _plain_name(name: str) -> str:
    return name.replace(":", ".").replace("/", ".")
