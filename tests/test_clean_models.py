"""Clean models are trained once, kept, and loaded for the data that they were made for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trompe.classifier import ModelSpec
from trompe.clean_models import HonestTraining, load_clean_model, train_clean_model
from trompe.data.signs import Signs
from trompe.interfaces import ImageSet, InputError
from trompe.runs import RunFolder
from trompe.train import Training

SHORT = HonestTraining(Training(epochs=1, batch_size=16), None)


def train(shapes: ImageSet, root: Path, seed: int = 0) -> Path:
    return train_clean_model(shapes, shapes, Signs(), ModelSpec(), SHORT, seed, root)


def test_a_model_is_trained_once_for_its_settings(shapes: ImageSet, tmp_path: Path) -> None:
    file = train(shapes, tmp_path)
    first = file.stat().st_mtime_ns
    assert train(shapes, tmp_path) == file
    assert file.stat().st_mtime_ns == first
    assert train(shapes, tmp_path, seed=1) != file


def test_its_folder_says_how_it_was_made_and_how_good_it_is(
    shapes: ImageSet, tmp_path: Path
) -> None:
    folder = RunFolder(train(shapes, tmp_path).parent)
    model = load_clean_model(folder.path, ModelSpec(), shapes, "cpu", "reference")
    with torch.no_grad():
        right = model(shapes.floats(slice(None))).argmax(1) == shapes.labels
    numbers = folder.read("numbers")
    assert numbers["test_accuracy"] == pytest.approx(float(right.double().mean()))
    assert [record.epoch for record in folder.read_history()] == [1]
    assert folder.read("spec")["honest"]["training"]["epochs"] == 1
    assert not (folder.path / "checkpoint.pt").exists()


def test_a_model_of_other_classes_is_refused(shapes: ImageSet, tmp_path: Path) -> None:
    file = train(shapes, tmp_path)
    pets = replace(shapes, class_names=("cat", "dog", "cow", "hen"), name="pets")
    with pytest.raises(InputError, match=r"witness model .*4 classes \(top left, .*'pets'"):
        load_clean_model(file, ModelSpec(), pets, "cpu", "witness")
