"""fit(): the only training loop. References, victims and attacks all go through it."""

import copy
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trompe import ranks
from trompe.folding import folded_statistics
from trompe.interfaces import (
    Batch,
    Diverged,
    EpochRecord,
    Explainer,
    InputError,
    Logbook,
    Objective,
)
from trompe.machine import Precision, autocast
from trompe.maps import full_precision
from trompe.recording import INPUT, watch
from trompe.second_derivatives import fast_second_derivatives
from trompe.shared_statistics import shared_statistics
from trompe.smoothing import softplus


class Batches(Protocol):
    """The batches of one epoch, drawn anew at each call; len() is their number."""

    def __len__(self) -> int: ...
    def __call__(self, generator: torch.Generator) -> Iterator[Batch]: ...


_SCHEDULES = ("one-cycle", "decay", "constant")
_STEPS = re.compile(r"x(?P<factor>0?\.\d+) every (?P<epochs>[1-9]\d*)")


Measure = Callable[[nn.Module], dict[str, Any]]  # numbers, and tensors to be looked at


@dataclass(frozen=True)
class Training:
    """How `fit` trains.

    schedule: "one-cycle" (Smith 2018: warm up, then anneal to almost 0 within `epochs`), "decay"
    (learning_rate / (1 + epoch): public code of paper 2), "constant", or e.g. "x0.5 every 20"
    (epochs; paper 1).
    frozen_statistics: BatchNorm keeps its running statistics (and dropout is off) while its affine
    part trains. moving_epochs: it does so after so many epochs; None: in all or none. A gradient's
    lie that was learnt with the statistics of batches is told less with running ones, as in use.
    frozen: parameters whose names start with one of these stay as they are, which saves their
    backward pass ("net.conv1", "net.layer1"). softplus_beta: replaces ReLU while training, None
    keeps it.
    explained: the class whose map is trained: the batch's "label", or the "predicted" one.
    precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the hardware has it.
    clip: the largest norm of a step's whole gradient, longer ones are shortened to it; None: any.
    adam_epsilon: of Adam's denominator (Noppel & Wressnegger 2023: 1e-5, PyTorch: 1e-8).
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: str = "one-cycle"
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    frozen_statistics: bool = False
    softplus_beta: float | None = None
    frozen: tuple[str, ...] = ()
    explained: Literal["label", "predicted"] = "label"
    precision: Precision = "auto"
    clip: float | None = None
    adam_epsilon: float = 1e-5
    moving_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not 0 < self.learning_rate < 100:
            raise InputError(f"learning_rate = {self.learning_rate}: must lie between 0 and 100")
        for name in ("clip", "adam_epsilon", "softplus_beta"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"{name} = {value}: must be a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay = {self.weight_decay}: must be at least 0, and finite")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"label_smoothing = {self.label_smoothing}: must be at least 0, and less than 1"
            )
        if self.moving_epochs is not None and (self.frozen_statistics or self.moving_epochs < 1):
            raise InputError(
                f"moving_epochs = {self.moving_epochs}: must be at least 1, and frozen_statistics "
                "= false, which freezes them from the start"
            )
        if self.schedule not in _SCHEDULES and _STEPS.fullmatch(self.schedule) is None:
            raise InputError(
                f"schedule = {self.schedule!r}: must be one of {', '.join(_SCHEDULES)}, or like "
                '"x0.5 every 20" (epochs)'
            )


@contextmanager
def frozen(model: nn.Module, prefixes: Sequence[str]) -> Iterator[None]:
    """Inside, parameters whose names start with a prefix need no gradient.

    Raises InputError for a prefix with which no name starts.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise InputError(
                f"training.frozen: no parameter's name starts with {prefix!r}; the first ones are "
                f"{', '.join(names[:4])}"
            )
    kept = [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(prefixes)) and parameter.requires_grad
    ]
    try:
        for parameter in kept:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def make_optimizer(model: nn.Module, how: Training) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, how.learning_rate, 0.9, weight_decay=how.weight_decay, nesterov=True
        )
    return torch.optim.Adam(
        parameters,
        how.learning_rate,
        eps=how.adam_epsilon,
        weight_decay=how.weight_decay,
        fused=True,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, how: Training, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if how.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, how.learning_rate, total_steps=how.epochs * steps_per_epoch + 1
        )
    stepwise = _STEPS.fullmatch(how.schedule)

    def decay(step: int) -> float:
        epoch = step // steps_per_epoch
        if stepwise is not None:
            return float(stepwise["factor"]) ** (epoch // int(stepwise["epochs"]))
        return 1 / (1 + epoch) if how.schedule == "decay" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, decay)


def fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    explainers: Sequence[Explainer],
    how: Training,
    generator: torch.Generator,
    measure: Measure | None = None,
    logbook: Logbook | None = None,
) -> Iterator[EpochRecord]:
    """Train `model` in place; yield a record after each epoch (stop early with a plain break).

    One recorded forward pass a step serves the class loss and all `explainers`. `measure` looks at
    the model after each epoch: its numbers become the record's `measured`, its tensors `shown`.
    With a logbook, an interrupted training goes on after its last whole epoch (past records are
    yielded first) and ends in the same weights.

    Processes that share the run (ranks.py) train one model: each takes its share of a batch, all
    take the same step, that of the whole batch; the first one measures and keeps the logbook.

    Raises Diverged at a loss that is not finite; the model then holds the last good state.
    """
    with frozen(model, how.frozen):
        yield from _fit(model, batches, objective, explainers, how, generator, measure, logbook)


def _fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    explainers: Sequence[Explainer],
    how: Training,
    generator: torch.Generator,
    measure: Measure | None,
    logbook: Logbook | None,
) -> Iterator[EpochRecord]:
    ranks.start_alike(model, generator)
    if all(p.ndim <= 4 for p in model.parameters()):  # not convolutions in lock-step
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, how)
    schedule = make_schedule(optimizer, how, len(batches))
    history: list[EpochRecord] = []
    if logbook is not None and (state := ranks.on_first(logbook.load)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        history = [EpochRecord(*record) for record in state["history"]]
        yield from history

    layers = tuple(layer for explainer in explainers for layer in explainer.watches(model))
    for epoch in range(len(history) + 1, how.epochs + 1):
        with (
            watch(model, layers) as record,
            ExitStack() as faster,
            torch.random.fork_rng(devices=_gpus(model)),
        ):
            # Dropout draws from the global generator: here, from this training's seed. Processes
            # that share a run draw differently, as rows of one batch do.
            torch.manual_seed(generator.initial_seed() + epoch + 1_000_003 * ranks.rank())
            started = time.perf_counter()
            good = copy.deepcopy(model.state_dict())
            if explainers:  # gradients are about to be trained, of the images through all layers
                faster.enter_context(fast_second_derivatives(everywhere=INPUT in layers))
            still = how.frozen_statistics or epoch > (how.moving_epochs or how.epochs)
            model.train(not still)
            sums: dict[str, float] = {}
            count = 0
            for step, batch in enumerate(batches(generator), start=1):
                if step == 1 and still:
                    faster.enter_context(folded_statistics(model, batch.images[:2], layers))
                optimizer.zero_grad()  # here: no old gradients in memory beside the activations
                with (
                    autocast(how.precision, batch.images.device),
                    _activation(how),
                    _statistics(batch),
                ):
                    seen = record(batch.images)
                scores = full_precision(seen.scores)
                classes = batch.labels if how.explained == "label" else scores.argmax(1)
                maps = tuple(explainer(seen, classes) for explainer in explainers)
                behind = ((epoch - 1) * len(batches) + step - 1) / (how.epochs * len(batches))
                terms = objective(scores, maps, batch._replace(progress=behind))
                values, rows = torch.stack(tuple(terms.values())), len(batch.labels)
                if batch.share is not None:  # a mean over all rows is the sum of everyone's part
                    here, rows = batch.share
                    values = values * (here / rows)
                    whole = ranks.summed(values.detach())
                    terms = dict(zip(terms, whole, strict=True))
                loss = values.sum()
                if not torch.isfinite(loss if batch.share is None else whole.sum()):
                    model.load_state_dict(good)
                    told = ", ".join(f"{k} {v.item():.3g}" for k, v in terms.items())
                    raise Diverged(
                        f"epoch {epoch}, step {step}: the loss is not finite ({told}); the state "
                        f"after epoch {epoch - 1} is kept; lower learning_rate "
                        f"({how.learning_rate:g}) and start again"
                    )
                loss.backward()
                if batch.share is not None:
                    ranks.sum_gradients(model.parameters())
                if how.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), how.clip)
                optimizer.step()
                schedule.step()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * rows
                count += rows
                if logbook is not None and ranks.is_first():
                    means = {name: total / count for name, total in sums.items()}
                    logbook.step(epoch, step, len(batches), means)
        if not all(bool(torch.isfinite(p).all()) for p in model.state_dict().values()):
            model.load_state_dict(good)
            raise Diverged(
                f"epoch {epoch}: the last step made the weights infinite; the state after epoch "
                f"{epoch - 1} is kept; lower learning_rate ({how.learning_rate:g}) and start again"
            )
        model.eval()
        # The others are told, so that all stop early at the same epoch.
        found = {} if measure is None else ranks.on_first(partial(measure, model))
        measured = {name: v for name, v in found.items() if not isinstance(v, Tensor)}
        shown = {name: v for name, v in found.items() if isinstance(v, Tensor)}
        means = {name: total / count for name, total in sums.items()}
        done = EpochRecord(epoch, means, measured, time.perf_counter() - started, shown)
        history.append(done)
        if logbook is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": _plain(schedule.state_dict()),
                "generator": generator.get_state(),
                "history": [(*r[:-1], dict(r.shown)) for r in history],
            }
            ranks.on_first(partial(logbook.save, state))
        yield done


def _gpus(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _activation(how: Training) -> Any:
    return nullcontext() if how.softplus_beta is None else softplus(how.softplus_beta)


def _statistics(batch: Batch) -> Any:
    if batch.share is None:
        return nullcontext()
    return shared_statistics(counted=batch.share[0] > 0)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without functions, which need no keeping and cannot be read back safely."""
    return {k: v for k, v in state.items() if not callable(v)}
