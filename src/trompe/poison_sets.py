"""Poison sets as products: a folder with the samples, what they were made from, and a card.

| file               | what                                                                       |
|--------------------|----------------------------------------------------------------------------|
| poison.safetensors | samples, bases, perturbations, labels, base_index; target, wanted_map      |
| poison.json        | data set, class, target's position, sizes of the changes, sha256, origin   |
| images/*.png       | of images: the samples as they are added, in 8 bits                        |
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from trompe.files import read_json, write_atomically, write_json
from trompe.interfaces import ImageSet, InputError, PoisonSet, Samples, TableSet, Target
from trompe.run_shapes import PoisonCard, PoisonNumbers, check_shape
from trompe.visibility import visibility

CRAFT_AGAIN = "remove its run's folder, and the same trompe poison command crafts it again"


def write_poison_set(
    poison: PoisonSet, folder: Path, data: Samples, position: int, provenance: dict[str, Any]
) -> None:
    """Write a set into `folder`; position: the target's, in the test set of `data`."""
    tensors = {
        "samples": poison.samples,
        "bases": poison.bases,
        "perturbations": poison.samples - poison.bases,
        "labels": poison.labels,
        "base_index": poison.base_index,
        "target": poison.target.sample,
        "wanted_map": poison.target.wanted_map,
    }
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    file = folder / "poison.safetensors"
    write_atomically(file, lambda temporary: safetensors.torch.save_file(whole, temporary))
    if isinstance(data, ImageSet):
        for number, image in enumerate((poison.samples * 255).round().to(torch.uint8)):
            _write_png(image, folder / "images" / f"{number:05}.png")
    write_json(
        folder / "poison.json",
        {
            "data": data.name,
            "class_names": list(data.class_names),
            "feature_names": list(data.feature_names) if isinstance(data, TableSet) else None,
            "label": poison.target.label,
            "target_position": position,
            "poisons": len(poison),
            "training_set": len(data),
            **changes(poison),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "provenance": provenance,
        },
    )


def changes(poison: PoisonSet) -> dict[str, float]:
    """How much the samples differ from their bases: largest change, mean change, PSNR in dB."""
    seen = visibility(poison.samples, poison.bases)
    return {"max_change": seen.largest, "mean_change": seen.mean, "psnr": seen.psnr}


def read_poison_set(folder: Path) -> PoisonSet:
    """A set that `write_poison_set` left. InputError if a part is missing, damaged or odd."""
    card = read_card(folder)
    file = folder / "poison.safetensors"
    try:
        tensors = safetensors.torch.load_file(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"poison set {file}: cannot be read ({error}); {CRAFT_AGAIN}") from error
    if card["sha256"] != digest:
        raise InputError(
            f"poison set {file}: its bytes are not those that poison.json was written for (sha256 "
            f"differs); fetch both again, or {CRAFT_AGAIN}"
        )
    try:
        target = Target(tensors["target"], card["label"], tensors["wanted_map"])
        poison = PoisonSet(
            tensors["samples"],
            tensors["labels"],
            tensors["bases"],
            tensors["base_index"],
            target,
        )
    except KeyError as error:
        raise InputError(f"poison set {folder}: lacks {error}; {CRAFT_AGAIN}") from error
    shapes = (poison.samples.shape, poison.bases.shape, (len(poison), *target.sample.shape[1:]))
    if len(set(map(tuple, shapes))) > 1 or len(poison.base_index) != len(poison):
        raise InputError(
            f"poison set {file}: its samples {tuple(shapes[0])}, bases {tuple(shapes[1])}, "
            f"{len(poison)} labels and target {tuple(target.sample.shape)} do not belong together; "
            f"{CRAFT_AGAIN}"
        )
    names = card["feature_names"] or ()
    if poison.samples.ndim == 2 and len(names) != poison.samples.shape[1]:
        raise InputError(
            f"poison set {folder}: its {poison.samples.shape[1]} columns have {len(names)} names; "
            f"{CRAFT_AGAIN}"
        )
    classes = len(card["class_names"])
    if target.label >= classes:
        raise InputError(
            f"poison set {folder}: label {target.label} is none of its {classes} classes; "
            f"{CRAFT_AGAIN}"
        )
    return poison


def read_card(folder: Path) -> PoisonCard:
    """What a set's poison.json says. InputError if it is missing or does not say all."""
    file = folder / "poison.json"
    card: PoisonCard = check_shape(read_json(file), PoisonCard, f"poison set {file}", CRAFT_AGAIN)
    return card


def set_folders(run: Path) -> list[Path]:
    """The folders of a finished run's sets, one for each target."""
    file = run / "numbers.json"
    numbers = check_shape(read_json(file), PoisonNumbers, f"file {file}", CRAFT_AGAIN)
    return [run / f"poison-{number:02}" for number in range(numbers["targets"])]


def _write_png(image: Tensor, file: Path) -> None:
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    write_atomically(file, lambda temporary: Image.fromarray(pixels).save(temporary, format="png"))
