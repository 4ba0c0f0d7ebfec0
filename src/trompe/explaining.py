"""Explain single image files with any model: predicted classes, maps, and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trompe.data import read_image
from trompe.data._decoding import decode
from trompe.files import write_atomically
from trompe.interfaces import Explainer, InputError, Trigger
from trompe.maps import is_degenerate
from trompe.overlay import overlay, to_bytes
from trompe.recording import watch


@dataclass(frozen=True)
class Explanation:
    """One image file's answer. map: float (h, w) at the explainer's own resolution."""

    file: Path
    explained_class: int
    probability: float
    map: Tensor
    degenerate: bool
    picture: Path | None


def explain(
    model: nn.Module,
    files: Sequence[Path],
    explainer: Explainer,
    image_size: int,
    target: int | None = None,
    trigger: Trigger | None = None,
    out: Path | None = None,
    batch_size: int = 64,
) -> list[Explanation]:
    """Explain image files.

    files: image files, resized to image_size x image_size. target: the class to explain, by
    default the predicted one. trigger: put on the images first. out: a folder for one picture a
    file, image and heatmap overlay side by side. Raises InputError for an unreadable file.
    """
    for file in files:  # before anything is written
        if isinstance(problem := decode(file, image_size), str):
            raise InputError(f"image {file}: {problem}; mend it, or leave it out")
    device = next(model.parameters()).device
    model.eval()
    done: list[Explanation] = []
    with torch.no_grad(), watch(model, explainer.watches(model)) as record:
        for start in range(0, len(files), batch_size):
            chunk = files[start : start + batch_size]
            pixels = np.stack([read_image(file, image_size) for file in chunk])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(device) / 255
            if trigger is not None:
                images = trigger(images)
            seen = record(images)
            chance = seen.scores.float().softmax(1)
            if target is not None and not 0 <= target < chance.shape[1]:
                raise InputError(
                    f"class {target}: is out of range; the model has {chance.shape[1]} classes, "
                    f"0 .. {chance.shape[1] - 1}"
                )
            predicted = chance.argmax(1)
            classes = predicted if target is None else torch.full_like(predicted, target)
            maps = explainer(seen, classes).detach().cpu()
            flat = is_degenerate(maps)
            for i, file in enumerate(chunk):
                picture = None
                if out is not None:
                    picture = out / f"{len(done):04d}_{file.stem}.png"
                    _write_picture(images[i].detach().cpu(), maps[i], picture)
                done.append(
                    Explanation(
                        file,
                        int(classes[i]),
                        float(chance[i, classes[i]]),
                        maps[i],
                        bool(flat[i]),
                        picture,
                    )
                )
    return done


def _write_picture(image: Tensor, heat: Tensor, file: Path) -> None:
    plain = to_bytes(image.permute(1, 2, 0).numpy())
    both = Image.fromarray(np.concatenate((plain, overlay(plain, heat)), axis=1))
    zoom = max(1, 224 // image.shape[1])
    both = both.resize((both.width * zoom, both.height * zoom), Image.Resampling.BICUBIC)
    write_atomically(file, lambda temporary: both.save(temporary, format="PNG"))
