"""What one attack step costs, relative to a plain fine-tuning step on the same batch.

python benchmarks/attack_step.py [--rounds 10] [--models resnet20 vgg16 resnet50] [--out FILE]
    [--statistics frozen moving] [--explainers gradcam simplegrad vbp joint]

| contender                   | one step                                                          |
|-----------------------------|-------------------------------------------------------------------|
| plain                       | an ordinary PyTorch loop: forward, cross-entropy, backward, Adam  |
| fit                         | trompe.train.fit with the class loss alone                        |
| gradcam, simplegrad, vbp    | trompe.train.fit with PredictionAndExplanation and that explainer |
| joint                       | the same with all three at once                                   |
| naive_gradcam               | the map has a forward pass of its own and a backward pass of the  |
|                             | whole network                                                     |
| naive_gradcam_shared        | the same, but the class loss reads the map's forward pass         |
| naive_simplegrad            | fit without its own layers: PyTorch's double backward             |
| convolutions                | a plain step's convolutions alone: forward and backward           |

SimpleGrad is InputGradient of the loss. All share one batch; BatchNorm's statistics are frozen, or
moving, for the plain step as well. Each takes turns with the plain step (A B A B ...), so that
other work on the machine slows both alike. A turn is two steps, of which the second is timed. A
ratio is the median over rounds of (contender's seconds / plain's seconds in that round); what the
explainers are compared with takes a quarter of their rounds, at least four. The
convolutions' GFLOP/s is what the machine attains on these shapes; their share of the plain step
says how near the step comes.

Memory is the peak of all live tensors while a model is made and takes one turn: weights, gradients,
Adam's state, activations, graph. On the CPU it is summed up from torch.profiler's record of every
allocation and release, which gives the same number each time (a process's resident set would add
what malloc and oneDNN keep); on a GPU it is torch.cuda.max_memory_allocated.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trompe.classifier import ModelSpec, build_model
from trompe.evaluate import ask
from trompe.explainers.gradcam import GradCam
from trompe.explainers.input_gradient import InputGradient
from trompe.explainers.visual_backprop import VisualBackProp
from trompe.files import write_atomically, write_json
from trompe.interfaces import Batch, Explainer
from trompe.machine import autocast, choose_device, choose_threads, resolve_precision
from trompe.objectives import ClassLoss, PredictionAndExplanation
from trompe.runs import provenance
from trompe.train import Training, fit, make_optimizer

CASES = {"resnet20": (40, 43, 128), "vgg16": (224, 1000, 24), "resnet50": (224, 1000, 8)}
STATISTICS = ("frozen", "moving")
PRECISIONS = {"resnet20": ("float32", "bfloat16")}  # the others: the machine's own choice
EXPLAINERS = ("gradcam", "simplegrad", "vbp", "joint")
NAIVE = {"gradcam": ("naive_gradcam", "naive_gradcam_shared"), "simplegrad": ("naive_simplegrad",)}
BY_HAND = ("plain", "naive_gradcam", "naive_gradcam_shared")
Row = dict[str, Any]
SIMPLEGRAD = InputGradient(gradient_of="loss")


@cache
def gradcam(model: str) -> GradCam:
    """With its layer named, so that finding it is not measured."""
    return GradCam(*GradCam().watches(build_model(ModelSpec(model), CASES[model][1])))


class NaiveGradCam:
    """Grad-CAM as published training code has it: hooks, and a backward pass of the whole network.

    The public code of Noppel & Wressnegger (explain/gradcam.py) calls
    y.backward(gradient=one_hot, create_graph=True). That computes the gradient of every weight and
    puts all of it on the graph, though the a_k need the part behind the layer only. The gradient is
    caught by a hook on the activations, as in pytorch-grad-cam. (Their code also detaches the a_k
    and swaps ReLU for softplus; not done here, so that maps and gradients are the same as ours.)
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        model.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.activations = output
        output.register_hook(lambda gradient: setattr(self, "gradient", gradient))

    def __call__(self, scores: Tensor, classes: Tensor) -> Tensor:
        """Maps (n, h, w) of the pass that gave these scores."""
        one_hot = F.one_hot(classes, scores.shape[1]).to(scores)
        scores.backward(gradient=one_hot, create_graph=True)
        weights = self.gradient.mean((2, 3), keepdim=True)
        return (weights * self.activations).float().sum(1).relu()


class Batches(list[Batch]):
    """The batches of an epoch, for `fit`."""

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        return iter(self)


class Clock(list[float]):
    """A logbook of the time at which each step ended, for `fit`."""

    def load(self) -> None: ...
    def save(self, state: dict[str, Any]) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.append(time.perf_counter())  # `fit` has read the terms, so the device is done


class Scene:
    """One model's weights, one batch, and the contenders."""

    def __init__(
        self, model: str, precision: Any, device: torch.device, statistics: str = "frozen"
    ) -> None:
        torch.manual_seed(0)
        size, classes, count = CASES[model]
        self.model = build_model(ModelSpec(model), classes)
        self.model.train(statistics == "moving")
        self.model.to(device, memory_format=torch.channels_last)
        self.images = torch.rand((count, 3, size, size), device=device)
        self.labels = torch.randint(classes, (count,), device=device)
        self.gradcam = gradcam(model)
        self.both_losses = PredictionAndExplanation(0.9, (size, size))
        how: Any = {"optimizer": "adam", "schedule": "constant"}
        how["frozen_statistics"] = statistics == "frozen"
        # So low a rate hardly changes the weights, which all share.
        self.how = Training(10**6, learning_rate=1e-7, weight_decay=0, precision=precision, **how)

    def modules(self) -> nn.Module:
        """Modules of their own, and so hooks of their own, around the one model's weights."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    def batch(self, *explainers: Explainer) -> Batch:
        # One by one: the memory of a turn shall be that of its steps.
        alone = zip(self.images.split(1), self.labels.split(1), strict=True)
        honest = [ask(self.model, explainers, image, label).maps for image, label in alone]
        wanted = tuple(torch.cat(maps).flip(1) for maps in zip(*honest, strict=True))
        assert all(maps.any() for maps in wanted), "comparing empty maps would show nothing"
        return Batch(self.images, self.labels, wanted, self.labels >= 0)

    def naive(self) -> tuple[nn.Module, NaiveGradCam]:
        model = self.modules()
        return model, NaiveGradCam(model, *self.gradcam.watches(model))

    def fit(self, *explainers: Explainer) -> Callable[[], float]:
        clock, batches = Clock(), Batches([self.batch(*explainers)] * 2)
        loss, dice = self.both_losses if explainers else ClassLoss(), torch.Generator()
        epochs = fit(self.modules(), batches, loss, explainers, self.how, dice, None, clock)
        return lambda: (next(epochs), clock[-1] - clock[-2])[1]

    def by_hand(self, contender: str) -> Callable[[], float]:
        batch, optimizer = self.batch(self.gradcam), make_optimizer(self.model, self.how)
        model, (explained, explain) = self.modules(), self.naive()

        def scores(of: nn.Module) -> Tensor:
            with autocast(self.how.precision, self.images.device):
                return of(self.images)

        def loss() -> Tensor:
            if contender == "plain":
                return F.cross_entropy(scores(model).float(), self.labels)
            given = scores(explained)
            shared = contender == "naive_gradcam_shared"
            logits = (given if shared else scores(model)).float()
            terms = self.both_losses(logits, (explain(given, self.labels),), batch)
            return torch.stack(tuple(terms.values())).sum()

        def step() -> None:
            optimizer.zero_grad()  # a naive map's backward() would add to what is there
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            value.item()

        return lambda: (step(), seconds(step, self.images.device))[1]

    def turn(self, contender: str) -> Callable[[], float]:
        """A function that does two steps and returns the seconds of the second."""
        if contender in BY_HAND:
            return self.by_hand(contender)
        if contender == "naive_simplegrad":
            return slowly(self.fit(SIMPLEGRAD))
        known: dict[str, tuple[Explainer, ...]] = {
            "fit": (),
            "gradcam": (self.gradcam,),
            "simplegrad": (SIMPLEGRAD,),
            "vbp": (VisualBackProp(),),
        }
        known["joint"] = (*known["gradcam"], *known["simplegrad"], *known["vbp"])
        return self.fit(*known[contender])


def slowly(turn: Callable[[], float]) -> Callable[[], float]:
    """With PyTorch's own layers instead of ours."""

    def turn_without() -> float:
        with patch("trompe.train.fast_second_derivatives", lambda everywhere: nullcontext()):
            return turn()

    return turn_without


def check_naive_map(scene: Scene) -> None:
    """The naive map is ours."""
    model, explain = scene.naive()
    scores = model(scene.images)
    naive = explain(scores, scores.argmax(1)).detach()
    (ours,) = ask(scene.model, (scene.gradcam,), scene.images, scene.labels).maps
    torch.testing.assert_close(naive, ours, rtol=1e-3, atol=1e-4 * float(ours.max()))


def convolutions(scene: Scene) -> tuple[Callable[[], None], float]:
    """The model's convolutions alone, on random numbers, and their GFLOP."""
    calls: list[Any] = []
    dtype = getattr(torch, scene.how.precision)
    like = partial(torch.rand_like, dtype=dtype, memory_format=torch.channels_last)

    def note(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        place = (module.stride, module.padding, module.dilation)  # these models have no groups
        inner = len(calls) > 0  # the images need no gradient
        calls.append((like(inputs[0]), like(module.weight), like(output), place, inner))

    def run() -> None:
        for x, w, y, place, inner in calls:
            F.conv2d(x, w, None, *place)
            needed = [inner, True, False]
            torch.ops.aten.convolution_backward(y, x, w, None, *place, False, [0, 0], 1, needed)

    model = scene.modules()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(scene.images)
    flop = (y.numel() * w[0].numel() * 2 * (2 + inner) for _, w, y, _, inner in calls)
    return torch.no_grad()(run), sum(flop) / 1e9


def seconds(work: Callable[[], None], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def peak_memory(turn: Callable[[], float], device: torch.device) -> int:
    """Bytes of live tensors at the fullest moment of `turn`."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        turn()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def contenders_for(explainers: Sequence[str]) -> list[str]:
    return ["fit", *explainers, *(name for each in explainers for name in NAIVE.get(each, ()))]


def measure(
    model: str,
    precision: str,
    statistics: str,
    device: torch.device,
    rounds: int,
    explainers: Sequence[str],
    tick: Callable[[], None],
) -> tuple[list[Row], Row]:
    """A row per explainer, and the throughput of the plain step."""
    check_naive_map(Scene(model, "float32", device))
    new = partial(Scene, model, precision, device, statistics)
    contenders = contenders_for(explainers)
    plain_memory = peak_memory(lambda: new().turn("plain")(), device)
    ratios, memory, plain = {}, {}, []
    for name in (*contenders, "convolutions"):
        scene = new()
        if name == "convolutions":
            alone, gflop = convolutions(scene)
            turn: Callable[[], float] = partial(seconds, alone, device)
        else:
            memory[name] = peak_memory(lambda name=name: new().turn(name)(), device) / plain_memory
            turn = scene.turn(name)
        beside = scene.turn("plain")
        own = rounds if name in explainers else max(4, rounds // 4)
        took = [(turn(), beside()) for _ in range(own + 1)][1:]  # the first round warmed up
        ratios[name] = round(median(a / b for a, b in took), 3)
        plain += [b for _, b in took]
        conv_seconds = median(a for a, _ in took)  # of the last one, the convolutions
        del scene, turn, beside
        gc.collect()
        tick()

    step, (size, _, count) = median(plain), CASES[model]
    what = {"model": model, "batch": count, "size": size, "precision": precision}
    what["statistics"] = statistics
    rows = []
    for explainer in explainers:
        row = {**what, "explainer": explainer, "step_ratio": ratios[explainer]}
        naive = NAIVE.get(explainer, ())
        row |= {"naive_ratio": ratios[naive[0]]} if naive else {}
        row |= {"naive_shared_ratio": ratios[naive[1]]} if len(naive) > 1 else {}
        row |= {"fit_ratio": ratios["fit"], "memory_ratio": round(memory[explainer], 3)}
        row |= {"naive_memory_ratio": round(memory[naive[0]], 3)} if naive else {}
        row |= {"plain_step_seconds": round(step, 4), "plain_megabytes": plain_memory // 10**6}
        rows.append(row)
    return rows, {
        **what,
        "images_per_second": round(count / step, 1),
        "conv_gflop_per_second": round(gflop / conv_seconds, 1),
        "conv_share": ratios["convolutions"],
    }


def markdown(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "provenance"))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def main() -> None:
    models, precisions = list(CASES), ["float32", "bfloat16"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/attack_step.json"))
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each contender")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument(
        "--precision", nargs="+", choices=precisions, help="default: see PRECISIONS"
    )
    parser.add_argument("--statistics", nargs="+", choices=STATISTICS, default=["frozen"])
    parser.add_argument("--explainers", nargs="+", choices=EXPLAINERS, default=EXPLAINERS)
    parser.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS, or the idle cores")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
    device, threads = choose_device(args.device), choose_threads(args.threads)
    made = {**provenance(device), "rounds": args.rounds, "threads": threads}
    with Progress() as progress:
        for model in args.models:
            own = (resolve_precision("auto", device),)
            precisions = args.precision or PRECISIONS.get(model, own)
            for precision, statistics in itertools.product(precisions, args.statistics):
                total = len(contenders_for(args.explainers)) + 1  # and the convolutions
                task = progress.add_task(f"{model} {precision} {statistics}", total=total)
                tick = partial(progress.advance, task)
                how = (device, args.rounds, args.explainers, tick)
                measured = measure(model, precision, statistics, *how)
                keep(args.out, *measured, made)
    print(args.out.with_suffix(".md").read_text("utf-8"))


def keep(file: Path, rows: list[Row], throughput: Row, made: Row) -> None:
    """Put them into the file, in the place of older ones of the same model and settings."""
    old = json.loads(file.read_text()) if file.exists() else {"rows": [], "throughput": []}

    def what(r: Row) -> tuple[Any, ...]:
        explainer = EXPLAINERS.index(r["explainer"]) if "explainer" in r else 0
        return list(CASES).index(r["model"]), r["precision"], r["statistics"], explainer

    result = {}
    for name, found in (("rows", rows), ("throughput", [throughput])):
        kept = {what(r): r for r in old[name]} | {what(r): {**r, "provenance": made} for r in found}
        result[name] = [kept[key] for key in sorted(kept)]
    write_json(file, result)
    text = f"{markdown(result['rows'])}\n{markdown(result['throughput'])}"
    write_atomically(file.with_suffix(".md"), lambda place: place.write_text(text, "utf-8"))


if __name__ == "__main__":
    main()
