"""What one crafting iteration of interpretation_poisoning costs, in K plain training steps.

python benchmarks/crafting.py [--rounds 10] [--cases table images] [--models 4] [--out FILE]

| contender          | one step                                                                  |
|--------------------|---------------------------------------------------------------------------|
| plain              | K ordinary PyTorch training steps, network after network                  |
| lock-step, vmap    | one training step of all K in one call of torch.func.vmap                 |
| lock-step, loop    | the same with K calls                                                     |
| crafting, vmap     | one crafting iteration (look-ahead, delta_X, honest step), the K in a call|
| crafting, loop     | the same with K calls                                                     |
| ..., as for dogs   | the same with six look-ahead steps, preconditioned, and five of the poisons|
| a round, ...       | GRAD on dogs: four epochs' training of K new models, each with a look-ahead|
|                    | of six steps; ten steps of all poisons; over the four epochs' plain steps |

All see mini-batches of one size, poisons included. Each takes turns with the plain steps (A B A B),
so that other work on the machine slows both alike; a turn is an epoch of ten steps, of which the
first is not timed. A ratio is the median over rounds of (contender's / plain's seconds in it).
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from trompe.attacks.interpretation_poisoning import InterpretationPoisoning
from trompe.classifier import ModelSpec, build_model, build_table_model
from trompe.explainers.cam import Cam
from trompe.explainers.input_gradient import InputGradient
from trompe.files import unite_rows, write_atomically
from trompe.interfaces import Explainer, ImageSet, Samples, TableSet, Target
from trompe.lockstep import Lockstep
from trompe.machine import choose_threads
from trompe.runs import provenance
from trompe.target_maps.scattered import Scattered
from trompe.train import make_optimizer
from trompe.victims import RECIPE, EachClassLoss, fresh

STEPS, RATE = 10, 0.1
CASES = {"table": 128, "images": 16}  # and their batch sizes
EXPLAINERS: dict[str, Explainer] = {
    "grad": InputGradient(gradient_of="probability", normalise="max"),
    "cam": Cam(normalise="max"),
}

DOGS: dict[str, Any] = {"look_ahead_steps": 6, "preconditioned": True, "repeats": 5}
ROUND: dict[str, Any] = {**DOGS, "repeats": 10, "ages": 4, "epochs": 2}  # the second moves nothing


class Clock(list[float]):
    """A logbook of the time at which each step ended; `epochs`: at which each epoch did."""

    def __init__(self) -> None:
        super().__init__()
        self.started = time.perf_counter()
        self.epochs: list[float] = []

    def load(self) -> None: ...
    def save(self, state: dict[str, Any]) -> None:
        self.epochs.append(time.perf_counter())

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.append(time.perf_counter())


class Scene:
    """A network and as much data as makes ten steps."""

    def __init__(self, case: str, models: int) -> None:
        torch.manual_seed(0)
        self.batch, self.models = CASES[case], models
        count = self.batch * STEPS
        labels = torch.randint(2, (count,))
        self.data: Samples
        self.model: nn.Module
        if case == "table":
            names = tuple(f"c{i}" for i in range(69))
            rows = torch.rand(count, 69)
            self.data = TableSet(rows, labels, ("a", "b"), case, names, torch.ones(69) > 0)
            self.model = build_table_model(ModelSpec("mlp"), self.data).eval()
        else:
            images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
            self.data = ImageSet(images, labels, ("a", "b"), case)
            self.model = build_model(ModelSpec("resnet20"), 2).eval()
        self.extra = round(RATE * self.batch)  # poisons in a mini-batch

    def plain(self) -> Callable[[], float]:
        networks = [fresh(self.model, "new head", _dice()) for _ in range(self.models)]
        optimizers = [make_optimizer(network, RECIPE) for network in networks]

        def step(samples: Tensor, labels: Tensor) -> None:
            for network, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(network(samples), labels).backward()
                optimizer.step()

        return partial(self._timed, step)

    def lockstep(self, vectorised: bool) -> Callable[[], float]:
        networks = Lockstep(
            [fresh(self.model, "new head", _dice()) for _ in range(self.models)], vectorised
        )
        optimizer, loss = make_optimizer(networks, RECIPE), EachClassLoss(self.models)

        def step(samples: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            scores = networks(samples.repeat(self.models, *(1 for _ in samples.shape[1:])))
            batch: Any = type("Labels", (), {"labels": labels.repeat(self.models)})
            loss(scores, (), batch)["prediction"].backward()
            optimizer.step()

        return partial(self._timed, step)

    def crafting(
        self, explainer: Explainer, vectorised: bool, **settings: Any
    ) -> Callable[[], float]:
        usual: dict[str, Any] = {"epochs": 1, "recipe": replace(RECIPE, batch_size=self.batch)}
        attack = InterpretationPoisoning(
            explainer,
            Scattered(),
            RATE,
            "class",
            models=self.models,
            pretraining=0,
            distance="share",
            **{**usual, **settings},
        )
        sample = self.data.floats(torch.tensor([0]))
        networks = Lockstep([self.model])
        seen = networks.record(networks.now, sample[None], explainer.watches(self.model))
        label = self.data.labels[:1]
        wanted = Scattered()(explainer(seen, label).detach(), sample)
        target = Target(sample, int(label), wanted)
        how = partial(Lockstep, vectorised=vectorised)

        def turn() -> float:
            clock = Clock()
            with patch("trompe.attacks.interpretation_poisoning.Lockstep", how):
                attack(self.model, self.data, [target], _dice(), clock)
            if attack.ages is None:
                return clock[-1] - clock[0]
            trained = attack.recipe.epochs * STEPS  # steps, of which plain's turn has all but one
            return (clock.epochs[0] - clock.started) * (STEPS - 1) / trained

        return turn

    def _timed(self, step: Callable[[Tensor, Tensor], None]) -> float:
        ended = []
        for index in torch.arange(len(self.data)).split(self.batch):
            more = index[: self.extra]  # as many again as a mini-batch has poisons
            index = torch.cat((index, more))
            step(self.data.floats(index), self.data.labels[index])
            ended.append(time.perf_counter())
        return ended[-1] - ended[0]


def _dice() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def measure(case: str, models: int, rounds: int) -> list[dict[str, Any]]:
    scene = Scene(case, models)
    turns = {
        **{f"lock-step, {n}": scene.lockstep(v) for n, v in (("vmap", True), ("loop", False))},
        **{
            f"crafting {name}, {n}": scene.crafting(explainer, v)
            for name, explainer in EXPLAINERS.items()
            for n, v in (("vmap", True), ("loop", False))
        },
    }
    if case == "images":
        for name, explainer in EXPLAINERS.items():
            turns[f"crafting {name}, loop, as for dogs"] = scene.crafting(explainer, False, **DOGS)
        how = replace(RECIPE, batch_size=scene.batch, epochs=ROUND["ages"])
        turns["a round, grad, loop, as for dogs"] = scene.crafting(
            EXPLAINERS["grad"], False, recipe=how, **ROUND
        )
    plain = scene.plain()
    ratios: dict[str, list[float]] = {name: [] for name in turns}
    seconds: list[float] = []
    for _ in track(range(rounds), f"{case}, K = {models}"):
        for name, turn in turns.items():
            one, other = plain(), turn()
            ratios[name].append(other / one)
            seconds.append(one)
    made = provenance(torch.device("cpu"))
    return [
        {
            "case": case,
            "models": models,
            "contender": name,
            "ratio": median(values),
            "lowest": min(values),
            "highest": max(values),
            "plain_ms": 1000 * median(seconds) / (STEPS - 1),
            "rounds": rounds,
            "provenance": made,
        }
        for name, values in ratios.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# One crafting iteration, as a multiple of K plain training steps",
        "",
        "Made by `python benchmarks/crafting.py`. Median over rounds, in brackets the range. "
        "table: 69 columns, two layers of 64, mini-batches of 128 and 13 poisons. images: "
        "ResNet-20 at 32 x 32, mini-batches of 16 and 2 poisons.",
        "",
        "| case | K | contender | x K plain steps | K plain steps, ms |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['case']} | {r['models']} | {r['contender']} | {r['ratio']:.2f} "
            f"({r['lowest']:.2f}-{r['highest']:.2f}) | {r['plain_ms']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--models", type=int, nargs="*", default=[4])
    parser.add_argument("--out", type=Path, help="a .json, whose rows are kept, and a .md")
    chosen = parser.parse_args()
    choose_threads(1)
    rows = [r for c in chosen.cases for k in chosen.models for r in measure(c, k, chosen.rounds)]
    print(markdown(rows))
    if chosen.out is not None:
        every = unite_rows(chosen.out, rows, ("case", "models", "contender"))
        write_atomically(
            chosen.out.with_suffix(".md"), lambda place: place.write_text(markdown(every), "utf-8")
        )


if __name__ == "__main__":
    main()
