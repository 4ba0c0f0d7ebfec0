"""Clean models are trained once, kept, and loaded for the data that they were made for."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trompe.classifier import ModelSpec, build_model, check_fits
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


class Odd(nn.Module):
    """Does not fit in one of several ways."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.conv = what, nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 5 if what == "classes" else 4)

    def forward(self, images: Tensor) -> Any:
        maps = self.conv(images)
        if self.what == "view":
            maps.view(len(maps), -1)
        scores = self.head(self.norm(maps.mean((2, 3))))
        return {"logits": scores} if self.what == "dict" else scores


@pytest.mark.parametrize(
    ("what", "batch_size", "told"),
    [
        ("view", 16, r"cannot take 2 images of .* \(RuntimeError: view size.*write \.reshape\(\)"),
        ("dict", 16, r"gives dict for 2 images, but scores \(2, 4\) of 4 classes"),
        ("classes", 16, r"gives \(2, 5\) for 2 images, but scores \(2, 4\)"),
        ("", 1, "cannot take 1 images of .*its BatchNorm needs more images a batch"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_training_and_leaves_nothing(
    what: str,
    batch_size: int,
    told: str,
    shapes: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = SimpleNamespace(make=lambda num_classes: Odd(what))
    monkeypatch.setitem(sys.modules, "mine", mine)  # type: ignore[arg-type]
    honest = HonestTraining(Training(epochs=1, batch_size=batch_size), None)
    with pytest.raises(InputError, match=told):
        train_clean_model(
            shapes, shapes, Signs(), ModelSpec("mine:make"), honest, 0, tmp_path, out=tmp_path / "m"
        )
    assert not (tmp_path / "m").exists()


def test_trying_a_model_changes_nothing_of_it(shapes: ImageSet) -> None:
    model = build_model(ModelSpec(), len(shapes.class_names))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_fits(model, "resnet20", shapes, 16)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
