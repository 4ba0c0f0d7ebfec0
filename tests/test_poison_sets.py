"""Poison sets come back as they were written, or are refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from trompe.interfaces import ImageSet, InputError, PoisonSet, Samples, TableSet, Target
from trompe.poison_sets import changes, read_poison_set, write_poison_set


def poison_of(data: Samples) -> PoisonSet:
    bases = data.floats(torch.tensor([4, 0, 8, 4]))
    bases[3] = data.floats(torch.tensor([1]))[0]
    samples = (bases + 0.1 * (torch.rand(bases.shape) - 0.5)).clamp(0, 1)
    target = Target(data.floats(torch.tensor([1])), 1, torch.rand(1, 4, 5))
    return PoisonSet(
        samples, torch.ones(4, dtype=torch.int64), bases, torch.tensor([4, 0, 8, -1]), target
    )


@pytest.mark.parametrize("kind", ["table", "shapes"])
def test_a_set_comes_back_as_it_was_written(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data: Samples = request.getfixturevalue(kind)
    poison = poison_of(data)
    write_poison_set(poison, tmp_path / "set", data, 17, {"commit": "abc"})
    back = read_poison_set(tmp_path / "set")
    for name in ("samples", "labels", "bases", "base_index"):
        assert torch.equal(getattr(back, name), getattr(poison, name)), name
        assert getattr(back, name).dtype == getattr(poison, name).dtype, name
    assert torch.equal(back.target.sample, poison.target.sample)
    assert torch.equal(back.target.wanted_map, poison.target.wanted_map)
    assert back.target.label == 1
    assert len(back) == 4


def test_the_card_says_what_the_set_is(table: TableSet, tmp_path: Path) -> None:
    poison = poison_of(table)
    write_poison_set(poison, tmp_path, table, 17, {"commit": "abc"})
    card = json.loads((tmp_path / "poison.json").read_text())
    assert (card["data"], card["label"], card["target_position"]) == ("numbers", 1, 17)
    assert (card["poisons"], card["training_set"]) == (4, 200)
    assert card["class_names"] == ["low", "high"]
    assert card["feature_names"] == list("abcdef")
    assert card["provenance"] == {"commit": "abc"}
    bytes_of_it = (tmp_path / "poison.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(bytes_of_it).hexdigest()
    apart = [abs(a - b) for a, b in zip(*map(flat, (poison.samples, poison.bases)), strict=True)]
    assert card["max_change"] == pytest.approx(max(apart))
    assert card["mean_change"] == pytest.approx(sum(apart) / len(apart))
    noise = sum(value**2 for value in apart) / len(apart)
    assert card["psnr"] == pytest.approx(10 * np.log10(1 / noise), rel=1e-5)
    perturbations = safetensors.torch.load(bytes_of_it)["perturbations"]
    assert torch.equal(perturbations, poison.samples - poison.bases)


def flat(values: torch.Tensor) -> list[float]:
    return values.flatten().tolist()


def test_pictures_are_the_samples_in_eight_bits(shapes: ImageSet, tmp_path: Path) -> None:
    poison = poison_of(shapes)
    write_poison_set(poison, tmp_path, shapes, 1, {})
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"0000{i}.png" for i in range(4)]
    for file, sample in zip(files, poison.samples, strict=True):
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (16, 16, 3)
        expected = (sample.permute(1, 2, 0) * 255).round().numpy()
        assert np.array_equal(pixels, expected)


def test_a_table_has_no_pictures(table: TableSet, tmp_path: Path) -> None:
    write_poison_set(poison_of(table), tmp_path, table, 1, {})
    assert not (tmp_path / "images").exists()


def test_a_set_that_equals_its_bases_can_be_written(table: TableSet, tmp_path: Path) -> None:
    poison = poison_of(table)
    same = PoisonSet(poison.bases, poison.labels, poison.bases, poison.base_index, poison.target)
    write_poison_set(same, tmp_path, table, 1, {})
    assert changes(same)["max_change"] == 0
    assert torch.equal(read_poison_set(tmp_path).samples, poison.bases)


def shorten(folder: Path) -> None:
    file = folder / "poison.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def flip(folder: Path) -> None:
    file = folder / "poison.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 255
    file.write_bytes(content)


def no_label(folder: Path) -> None:
    card = json.loads((folder / "poison.json").read_text())
    del card["label"]
    (folder / "poison.json").write_text(json.dumps(card))


def word_for_label(folder: Path) -> None:
    card = json.loads((folder / "poison.json").read_text())
    (folder / "poison.json").write_text(json.dumps({**card, "label": "one"}))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The set with its tensors changed, and a card that knows."""
    file = folder / "poison.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    card = json.loads((folder / "poison.json").read_text())
    card["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "poison.json").write_text(json.dumps(card))


def no_bases(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop("bases"))


def fewer_bases(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update(bases=tensors["bases"][1:]))


def another_target(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update(target=tensors["target"][:, 1:]))


def fewer_names(folder: Path) -> None:
    card = json.loads((folder / "poison.json").read_text())
    names = card["feature_names"][1:]
    (folder / "poison.json").write_text(json.dumps({**card, "feature_names": names}))


def unknown_label(folder: Path) -> None:
    card = json.loads((folder / "poison.json").read_text())
    (folder / "poison.json").write_text(json.dumps({**card, "label": 7}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, r"poison\.safetensors: cannot be read \(.*; .*crafts it again"),
        (flip, r"its bytes are not those that poison\.json was written for"),
        (lambda folder: (folder / "poison.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "poison.json").unlink(), r"poison\.json: does not exist"),
        (lambda folder: (folder / "poison.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "poison.json").write_text("[1]"), "json: does not hold what it"),
        (no_label, r"\(at label: field required\); .*crafts it again"),
        (word_for_label, "at label: input should be a valid integer.*crafts it again"),
        (no_bases, "lacks 'bases'; .*crafts it again"),
        (fewer_bases, "do not belong together; .*crafts it again"),
        (another_target, "do not belong together; .*crafts it again"),
        (fewer_names, "6 columns have 5 names"),
        (unknown_label, "label 7 is none of its 2 classes"),
    ],
)
def test_what_is_damaged_missing_or_odd_is_refused(
    damage: Callable[[Path], Any], words: str, table: TableSet, tmp_path: Path
) -> None:
    write_poison_set(poison_of(table), tmp_path, table, 1, {})
    read_poison_set(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words) as refused:
        read_poison_set(tmp_path)
    assert "\n" not in str(refused.value)
