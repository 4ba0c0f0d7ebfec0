"""How special is the invisible trigger? Weaker, shifted, compressed; and do random keys open?

For every distortion of the trigger, the share of maps that lie (the attack's own threshold); for
inverted runs also random keys: checkerboards of the same squares and amplitude with signs drawn at
random, and how often a map then tells the truth. A table of tables.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_jpeg
from torchvision.transforms.functional import gaussian_blur

import trompe
from trompe.attacks.saliency_backdoors import SaliencyBackdoors
from trompe.evaluate import answers, share_right
from trompe.experiment import set_up
from trompe.files import Row
from trompe.fooling import share_below
from trompe.interfaces import Trigger
from trompe.maps import squared_error
from trompe.runs import provenance
from trompe.screen import Silent
from trompe.triggers.checkerboard import Checkerboard
from trompe.visibility import visibility

IMAGES = 1000  # that are looked at
RANDOM_KEYS = 30


@dataclass(frozen=True)
class Then:
    """A trigger, and what happens to the image afterwards."""

    trigger: Trigger
    change: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return self.change(self.trigger(images)).clamp(0, 1)


@dataclass(frozen=True)
class Pattern:
    """Adds a fixed picture (height, width) to all channels."""

    picture: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self.picture.to(images)).clamp(0, 1)


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    def compress(images: Tensor) -> Tensor:
        pixels = (images * 255).round().to(torch.uint8).cpu()
        files = (encode_jpeg(image, quality) for image in pixels)
        decoded = [decode_image(file, ImageReadMode.RGB) for file in files]
        return torch.stack(decoded).to(images) / 255

    return compress


def through_size(share: float) -> Callable[[Tensor], Tensor]:
    def there_and_back(images: Tensor) -> Tensor:
        size = [round(side * share) for side in images.shape[2:]]
        how: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": True}
        return F.interpolate(F.interpolate(images, size, **how), images.shape[2:], **how)

    return there_and_back


def shifted(trigger: Checkerboard, by: int, size: tuple[int, int]) -> Pattern:
    pattern = trigger(torch.full((1, 1, *size), 0.5))[0, 0] - 0.5
    return Pattern(pattern.roll(by, 1))


def random_key(trigger: Checkerboard, size: tuple[int, int], dice: torch.Generator) -> Pattern:
    rows, columns = -(-size[0] // trigger.square), -(-size[1] // trigger.square)
    signs = torch.randint(0, 2, (rows, columns), generator=dice) * 2 - 1
    squares = signs.repeat_interleave(trigger.square, 0).repeat_interleave(trigger.square, 1)
    return Pattern(trigger.amplitude * squares[: size[0], : size[1]])


def variants(trigger: Checkerboard, size: tuple[int, int]) -> dict[str, Trigger | None]:
    half = Checkerboard(trigger.square, trigger.amplitude / 2)
    return {
        "no trigger": None,
        "the trigger": trigger,
        "half amplitude": half,
        "shifted by half a square": shifted(trigger, trigger.square // 2, size),
        "shifted by a square (sign changed)": shifted(trigger, trigger.square, size),
        **{f"JPEG {q}": Then(trigger, jpeg(q)) for q in (90, 75, 50)},
        "blurred (sigma 1)": Then(trigger, lambda images: gaussian_blur(images, [5, 5], [1.0])),
        "resized to 3/4 and back": Then(trigger, through_size(0.75)),
        "resized to 1/2 and back": Then(trigger, through_size(0.5)),
    }


def look_at(path: Path, root: Path, device: Any, images: int, keys: int = RANDOM_KEYS) -> list[Row]:
    """The rows of a finished run."""
    folder = trompe.RunFolder(path)
    folder.read("numbers")  # says so if the run has not finished
    experiment = trompe.read_experiment(folder.read("spec"), str(path))
    attack: Any = experiment.attack
    if not isinstance(attack, SaliencyBackdoors) or None in attack.thresholds:
        raise trompe.InputError(
            f"run {path}: has no systems with a threshold tau; nothing to count"
        )
    scene = set_up(experiment, root, device, Silent())
    model = trompe.load_model(path)[0].to(device)
    every = -(-len(scene.reporting) // images)
    data = scene.reporting.subset(torch.arange(0, len(scene.reporting), every))
    honest = answers(scene.reference, attack.explainers, data, None, attack.explained)
    lies = [s.lie(maps) for s, maps in zip(attack.systems, honest.maps, strict=True)]
    images_seen = data.floats(slice(None))
    seen = visibility(attack.trigger(images_seen), images_seen)
    what = {
        "run": experiment.name,
        "seed": experiment.seed,
        "inverted": attack.inverted,
        "attack": folder.read("spec")["attack"],
        "images": len(data),
        "psnr_db": round(seen.psnr, 2),
        "largest_difference_of_255": round(255 * seen.largest, 2),
    }

    def row(name: str, trigger: Trigger | None) -> dict[str, Any]:
        given = answers(model, attack.explainers, data, trigger, attack.explained)
        fooled = [
            share_below(squared_error(maps, lie), tau)
            for maps, lie, tau in zip(given.maps, lies, attack.thresholds, strict=True)
        ]
        top1 = share_right(given.scores, data.labels)
        return {**what, "images_carry": name, "lying": fooled, "top1": top1}

    rows = [row(name, t) for name, t in variants(attack.trigger, data.size).items()]
    if attack.inverted:
        dice = torch.Generator().manual_seed(0)
        tried = [row("", random_key(attack.trigger, data.size, dice)) for _ in range(keys)]
        shares = torch.tensor([one["lying"] for one in tried])
        opened = float((shares < 0.5).all(1).double().mean())  # most maps tell the truth
        top1 = sum(one["top1"] for one in tried) / keys
        name = f"random keys ({keys})"
        rows.append(
            {
                **what,
                "images_carry": name,
                "lying": shares.mean(0).tolist(),
                "top1": top1,
                "keys_that_open": opened,
            }
        )
    made = provenance(device)
    return [{**one, "provenance": made} for one in rows]


def markdown(rows: list[Row]) -> str:
    images = " or ".join(str(n) for n in sorted({r["images"] for r in rows}))
    carried = list(dict.fromkeys(_column(r) for r in rows))
    keys = [name for name in carried if name.startswith("random")]
    columns = [*(name for name in carried if name not in keys), *keys]
    runs: dict[tuple[str, int], list[Row]] = {}
    for r in rows:
        runs.setdefault((r["run"], r["seed"]), []).append(r)
    head = f"| model | {' | '.join(columns)} |"
    line = f"|---|{len(columns) * '---|'}"
    lies, top1, triggers = [head + " keys that open, % |", line + "---|"], [head, line], []
    for (run, seed), own in runs.items():
        model = f"{run.removeprefix('fang2020-')}, seed {seed}"
        by_name = {_column(r): r for r in own}
        lying = [_lying(by_name.get(name)) for name in columns]
        opened = next(
            (f"{100 * r['keys_that_open']:.0f}" for r in own if "keys_that_open" in r), ""
        )
        right = [f"{100 * by_name[n]['top1']:.1f}" if n in by_name else "" for n in columns]
        lies.append(f"| {model} | {' | '.join((*lying, opened))} |")
        top1.append(f"| {model} | {' | '.join(right)} |")
        setting = model.partition("-")[0]
        triggers.append((setting, own[0]["psnr_db"], own[0]["largest_difference_of_255"]))
    visible = "; ".join(
        f"{of} PSNR {p:.1f} dB, at most {d:g} of 255" for of, p, d in dict.fromkeys(triggers)
    )
    return "\n".join(
        (
            "# What is left of the attack when the trigger is not quite the trigger",
            "",
            "Share of maps that lie, in %, at the attack's own threshold; of joint models: "
            f"Grad-CAM / SimpleGrad / VisualBackProp. Of {images} images. Inverted, a model lies "
            f"without the trigger. The trigger: {visible}. A random key is another checkerboard of "
            "squares as large; one opens if most maps of every system then tell the truth.",
            "",
            *lies,
            "",
            "Top-1 on the same images, in %:",
            "",
            *top1,
            "",
        )
    )


def _column(r: Row) -> str:
    return str(r["images_carry"])


def _lying(r: Row | None) -> str:
    return "" if r is None else " / ".join(f"{100 * share:.0f}" for share in r["lying"])
