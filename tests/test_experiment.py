"""What a run says before it begins, and of how it ended."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import trompe
from trompe.experiment import set_up
from trompe.interfaces import InputError
from trompe.screen import Silent

TABLE: dict[str, Any] = {
    "name": "tried",
    "data": {"kind": "signs", "size": 24, "train_images": 60, "test_images": 40},
    "model": {"name": "test_experiment:net"},
    "honest": {"training": {"epochs": 1}, "augmentation": None},
    "attack": {
        "kind": "saliency_backdoors",
        "systems": [
            {
                "explainer": {"kind": "input_gradient", "normalise": "max"},
                "lie": {"kind": "border", "k": 1},
            }
        ],
    },
}


def net(num_classes: int) -> nn.Module:
    layers = [nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, num_classes))


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_table_with_an_unknown_key_is_named_by_the_key_not_printed() -> None:
    with pytest.raises(InputError, match=r"^experiment\.attack\.alhpa: unknown key.*'alpha'"):
        trompe.read_experiment({**TABLE, "attack": {**TABLE["attack"], "alhpa": 1}})


def test_layers_with_slow_second_derivatives_are_said(tmp_path: Path) -> None:
    heard = Notes()
    set_up(trompe.read_experiment(TABLE), tmp_path, "cpu", heard)
    (said,) = [note for note in heard.notes if "second derivatives" in note]
    assert said == (
        "InputGradient is trained through PyTorch's own second derivatives of ConvTranspose2d, "
        "which are slow"
    )
    table = {**TABLE, "model": {"name": "resnet20"}}
    set_up(trompe.read_experiment(table), tmp_path, "cpu", heard := Notes())
    assert heard.notes
    assert not any("second derivatives" in note for note in heard.notes)


@pytest.mark.parametrize("patience", [1, 9])
def test_a_training_that_is_stopped_early_is_said(tmp_path: Path, patience: int) -> None:
    training = {"epochs": 9, "learning_rate": 0.5}  # nothing gets better with it
    attack = {**TABLE["attack"], "training": training, "patience": patience}
    heard = Notes()
    run = trompe.run(trompe.read_experiment({**TABLE, "attack": attack}), tmp_path, screen=heard)
    epochs = len(run.read_history())
    said = [note for note in heard.notes if "stopped" in note]
    if patience == 9:
        assert epochs == 9
        assert said == []
    else:
        assert epochs < 9
        assert said == [
            f"the attack was stopped after {epochs} of 9 epochs: no better score in the last 1 "
            "(attack.patience)"
        ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gallery_images": 0}, "gallery_images = 0: must be at least 1"),
        ({"selection_images": -5}, "selection_images = -5: must be at least 1"),
        ({"name": "a/b"}, r"name = 'a/b': is a folder's below the runs; leave out /"),
        ({"name": "../up"}, "name = '../up': is a folder's"),
    ],
)
def test_settings_that_would_fail_after_all_training_are_refused(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        trompe.read_experiment({**TABLE, **changes})
