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
    card = read_json(folder / "poison.json")
    file = folder / "poison.safetensors"
    try:
        tensors = safetensors.torch.load_file(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"poison set {file}: cannot be read ({error}); {CRAFT_AGAIN}") from error
    if not isinstance(card, dict) or card.get("sha256") != digest:
        raise InputError(
            f"poison set {file}: its bytes are not those that poison.json was written for (sha256 "
            f"differs); fetch both again, or {CRAFT_AGAIN}"
        )
    try:
        target = Target(tensors["target"], int(card["label"]), tensors["wanted_map"])
        poison = PoisonSet(
            tensors["samples"],
            tensors["labels"],
            tensors["bases"],
            tensors["base_index"],
            target,
        )
        classes = len(card["class_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"poison set {folder}: lacks {error}; {CRAFT_AGAIN}") from error
    shapes = (poison.samples.shape, poison.bases.shape, (len(poison), *target.sample.shape[1:]))
    if len(set(map(tuple, shapes))) > 1 or len(poison.base_index) != len(poison):
        raise InputError(
            f"poison set {file}: its samples {tuple(shapes[0])}, bases {tuple(shapes[1])}, "
            f"{len(poison)} labels and target {tuple(target.sample.shape)} do not belong together; "
            f"{CRAFT_AGAIN}"
        )
    if not 0 <= target.label < classes:
        raise InputError(
            f"poison set {folder}: label {target.label} is none of its {classes} classes; "
            f"{CRAFT_AGAIN}"
        )
    return poison


def target_position(folder: Path) -> int:
    """The target's, in the test set, as a set's card says it. InputError if it says none."""
    card = read_json(folder / "poison.json")
    position = card.get("target_position") if isinstance(card, dict) else None
    if not isinstance(position, int) or position < 0:
        raise InputError(
            f"poison set {folder}: poison.json does not say where the target is; {CRAFT_AGAIN}"
        )
    return position


def _write_png(image: Tensor, file: Path) -> None:
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    write_atomically(file, lambda temporary: Image.fromarray(pixels).save(temporary, format="png"))
