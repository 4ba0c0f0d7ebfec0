"""Zhang, Gao & Su 2021, "Data Poisoning Attacks Against Outcome Interpretations".

IMF: a few slightly changed samples, added to the training set, make any honestly trained model
explain one chosen sample T as the adversary likes. Models and samples are updated in turns.

| paper                                            | here                                    |
|--------------------------------------------------|-----------------------------------------|
| GRAD, eq. (1)                                    | explainers/input_gradient.py            |
| CAM, eqs. (2) and (3)                            | explainers/cam.py                       |
| L_adv, eq. (5): first and third term             | `_adversarial_loss`                     |
| its second term, lambda_1 (P - T)^2              | `_direction`, unless `literal`          |
| step 1, the ideal update, eqs. (6) and (12)      | `_ideal_update`, `_look_ahead`          |
| step 2, delta_X, eqs. (7) to (10), (13)          | `_direction`                            |
| X_p <- X_p + gamma delta_X, eq. (11); projection | `_Poisons.move`, `feasible` in _bases.py|
| step 3, one honest step, eq. (14)                | `_in_turns`, _surrogates.py             |
| K models, section 4.3                            | lockstep.py                             |
| Algorithm 1                                      | `__call__`, `_in_turns`                 |
| eq. (4), without retraining                      | `bilevel = False`                       |
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.attacks._bases import Bases, Categories, choose_bases, feasible
from trompe.attacks._surrogates import AT_ONCE, Optimizers, Surrogates, classes_of, gradients_of
from trompe.interfaces import (
    Diverged,
    EpochRecord,
    Explainer,
    InputError,
    Logbook,
    PoisonSet,
    Samples,
    Target,
    TargetMap,
)
from trompe.lockstep import Lockstep, Parameters
from trompe.second_derivatives import fast_second_derivatives
from trompe.train import Training
from trompe.victims import RECIPE, Start, encode, fresh, train_together

__all__ = ["InterpretationPoisoning"]

Distance = Literal["squared", "share", "cosine"]


@dataclass(frozen=True)
class InterpretationPoisoning:
    """Craft samples of the target's class that make victims explain the target as wanted.

    explainer: whose map lies; give it a normalisation, so that L_adv compares maps in [0, 1].
    poison_rate: n, as a share of the training set. bases, epsilon, categories: what the poisons
    are made from, and how far they may be from it; see `choose_bases` and `feasible`.
    models: K; each sees the clean samples in an order of its own. epochs: E. recipe: how the K
    models train, and how victims are expected to; but, without `ages`, its rate stays constant, as
    models of all ages are wanted, and BatchNorm's statistics stay as they are. start: from where;
    "clean model": all K from the same weights, other than the paper's. pretraining: epochs on the
    clean set before; 0: crafting begins where victims begin.
    frozen_until: the layer up to which no network is trained, neither here nor, as one hopes, at
    the victims'; its outputs are computed once. None: all is trained.
    lifetime: after as many epochs a model starts anew, one model after the other, so that poisons
    suit every age of a victim; None: never (the paper).
    distance: of maps in L_adv: "squared" (the paper; summed over places), or, whatever the map's
    scale, "share": that of the map which is not where it is wanted, or "cosine": 1 - cos, which a
    single high place does not satisfy.
    look_ahead: alpha of eq. (12). preconditioned: look where Adam would go, by which victims are
    trained, as far away as the gradient reaches; the paper goes along the gradient.
    look_ahead_steps: of alpha each, along the gradient where the step before led; None: one (the
    paper). Where the way to the lie is curved, its first step says little of where it leads.
    step: gamma, of the sign of delta_X; None: epsilon / 10. It falls to 0 over the epochs if
    `anneal`.
    repeats: steps of a mini-batch's poisons for each look-ahead; None: one (the paper). Poisons
    that get few steps, as there are few epochs, hardly move the models otherwise.
    ages: None: models and poisons move in turns (the paper), so that a model never meets a poison
    twice as it was. Otherwise an epoch of crafting is a rehearsal: new models go through the whole
    recipe, its schedule too, with the poisons as they are; at so many ages, evenly spread over the
    recipe's epochs, they look ahead; then all poisons take `repeats` steps, from gamma to 0, that
    suit all ages. The last rehearsal is for its models alone: of all, a target keeps the poisons
    whose models lied best at their end.
    momentum: of delta_X. keep_class, stay_close: lambda_2, lambda_1. literal: leave out
    lambda_1's term, which as the paper writes it acts on nothing. bilevel: False leaves the models
    as they are (no step 3), as if they were not trained again.
    """

    explainer: Explainer
    wanted_map: TargetMap
    poison_rate: float = 0.05
    bases: Bases = "both"
    epsilon: float = 0.1
    categories: Categories = "free"
    models: int = 4
    epochs: int = 20
    recipe: Training = RECIPE
    start: Start = "clean model"
    pretraining: int = 10
    frozen_until: str | None = None
    lifetime: int | None = None
    distance: Distance = "squared"
    look_ahead: float = 1e-3
    preconditioned: bool = False
    look_ahead_steps: int | None = None
    step: float | None = None
    anneal: bool = True
    repeats: int | None = None
    ages: int | None = None
    momentum: float = 0.0
    keep_class: float = 1.0
    stay_close: float = 0.0
    literal: bool = False
    bilevel: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.poison_rate < 1:
            raise InputError(f"poison_rate = {self.poison_rate}: must lie between 0 and 1")
        if not 0 < self.epsilon <= 1:
            raise InputError(
                f"epsilon = {self.epsilon}: must lie in 0 < epsilon <= 1; with 0 no sample changes"
            )
        for name in ("models", "epochs", "lifetime", "look_ahead_steps", "repeats", "ages"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} = {value}: must be at least 1")
        for name in ("look_ahead", "step"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise InputError(f"{name} = {value}: is a step's length; must be positive")
        for name in ("pretraining", "momentum", "keep_class", "stay_close"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} = {value}: must be at least 0, and finite")
        for name in ("clip", "softplus_beta", "label_smoothing", "frozen"):
            if value := getattr(self.recipe, name):
                raise InputError(f"recipe.{name} = {value!r}: crafting has none; leave it out")
        if self.ages is not None:
            if self.epochs < 2:
                raise InputError(
                    f"ages = {self.ages} with epochs = {self.epochs}: poisons do not move after "
                    "the last rehearsal, so there must be at least 2"
                )
            if self.ages > self.recipe.epochs:
                raise InputError(
                    f"ages = {self.ages}: models look ahead after whole epochs, of which "
                    f"recipe.epochs has {self.recipe.epochs}; lower the one or raise the other"
                )
            unlike = {"pretraining": 0, "lifetime": None, "bilevel": True}
            for name, value in unlike.items():
                if (given := getattr(self, name)) != value:
                    raise InputError(
                        f"ages = {self.ages} with {name} = {given}: models are new for each "
                        f"rehearsal, and trained; {'set it to 0' if value == 0 else 'leave it out'}"
                    )
        if self.preconditioned and self.recipe.optimizer != "adam":
            raise InputError(
                f'preconditioned = true with recipe.optimizer = "{self.recipe.optimizer}": only '
                'Adam scales each weight\'s step; set one to false, or the other to "adam"'
            )

    def __call__(
        self,
        model: nn.Module,
        data: Samples,
        targets: Sequence[Target],
        generator: torch.Generator,
        logbook: Logbook | None = None,
    ) -> tuple[PoisonSet, ...]:
        """Algorithm 1, for each target apart; all of them together, as that is faster.

        Raises InputError if a target's class has too few bases, Diverged if the models do.
        """
        count = len(targets)
        based = [choose_bases(data, t, self.poison_rate, self.bases, generator) for t in targets]
        bases = torch.stack([samples for samples, _ in based])  # (targets, n, ...)
        lowest, highest = feasible(bases, data, self.epsilon, self.categories)
        poisons = _Poisons(bases.clone(), lowest, highest, self.momentum)

        # Line 1: K models for each target, trained on the clean set.
        networks = Lockstep(
            [fresh(model, self.start, generator) for _ in range(count * self.models)],
            frozen_until=self.frozen_until,
        )
        surrogates = Surrogates(networks, encode(networks, data), self.recipe, targets)
        history: list[EpochRecord] = []
        if logbook is not None and (state := logbook.load()) is not None:
            poisons.load_state_dict(state["poisons"])
            networks.load_state_dict(state["networks"])
            surrogates.optimizer.optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            history = [EpochRecord(*record) for record in state["history"]]
        elif self.pretraining:
            how = replace(self.recipe, epochs=self.pretraining, schedule="constant")
            train_together(networks, (surrogates.data,), how, generator)

        for epoch in range(len(history) + 1, self.epochs + 1):
            started = time.perf_counter()
            self._renew(surrogates, model, epoch, generator)
            craft = self._in_turns if self.ages is None else self._rehearse
            terms: dict[str, float] = {}
            gamma = self._step_length(epoch)
            for number, steps, terms in craft(surrogates, poisons, gamma, generator):
                if not all(map(math.isfinite, terms.values())):
                    told = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
                    raise Diverged(
                        f"epoch {epoch}, step {number}: the surrogates' losses are not finite "
                        f"({told}); lower recipe.learning_rate ({self.recipe.learning_rate:g}) or "
                        f"look_ahead ({self.look_ahead:g}) and start again"
                    )
                if logbook is not None:
                    logbook.step(epoch, number, steps, terms)
            history.append(EpochRecord(epoch, terms, {}, time.perf_counter() - started))
            if logbook is not None:
                logbook.save(
                    {
                        "poisons": poisons.state_dict(),
                        "networks": networks.state_dict(),
                        "optimizer": surrogates.optimizer.optimizer.state_dict(),
                        "generator": generator.get_state(),
                        "history": [(*r[:-1], {}) for r in history],
                    }
                )
        made = poisons.samples if poisons.best is None else poisons.best
        return tuple(
            PoisonSet(
                made[i],
                torch.full((len(index),), target.label),
                bases[i],
                index,
                target,
                tuple(history),
            )
            for i, (target, (_, index)) in enumerate(zip(targets, based, strict=True))
        )

    def _in_turns(
        self,
        surrogates: Surrogates,
        poisons: "_Poisons",
        gamma: float,
        generator: torch.Generator,
    ) -> Iterator["_Progress"]:
        """An epoch of Algorithm 1: after each step its number, of how many, and mean losses."""
        networks, targets = surrogates.networks, surrogates.targets
        losses = _Means()
        steps = list(surrogates.mini_batches(poisons.count, generator))
        for number, (clean, ours) in enumerate(steps, start=1):
            # Step 1, lines 5 to 8: where the models ought to go.
            with _fast(networks):
                adversarial, ahead = self._ideal_update(surrogates)
            # Step 2, lines 9 and 10: poisons that lead them there.
            for _ in range((self.repeats or 1) if len(ours) else 0):
                delta = self._direction(
                    networks, [(networks.now, ahead)], poisons.samples[:, ours], targets
                )  # eq. (13)
                poisons.move(ours, delta, gamma)  # eq. (11)
            # Step 3, lines 11 to 14: where they go.
            training = surrogates.training_loss(clean, surrogates.encoded(poisons.samples[:, ours]))
            if self.bilevel:
                surrogates.optimizer.step(training)  # eq. (14)
            yield number, len(steps), losses(adversarial=adversarial, training=training)

    def _rehearse(
        self,
        surrogates: Surrogates,
        poisons: "_Poisons",
        gamma: float,
        generator: torch.Generator,
    ) -> Iterator["_Progress"]:
        """The same, ours: the models go through a whole training, then the poisons move.

        A step is an epoch of that training, or a step of all poisons.
        """
        networks, recipe, repeats = surrogates.networks, self.recipe, self.repeats or 1
        assert self.ages is not None
        ages: list[tuple[Parameters, Parameters]] = []
        losses, steps = _Means(), recipe.epochs + (repeats if gamma else 0)
        schedule = surrogates.schedule()
        features = surrogates.encoded(poisons.samples)
        for epoch in range(1, recipe.epochs + 1):
            for clean, ours in surrogates.mini_batches(poisons.count, generator):
                training = surrogates.training_loss(clean, features[:, ours])
                terms = losses(training=training)
                surrogates.optimizer.step(training)  # eq. (14)
                schedule.step()
            if epoch * self.ages // recipe.epochs > (epoch - 1) * self.ages // recipe.epochs:
                with _fast(networks):
                    adversarial, ahead = self._ideal_update(surrogates)  # eq. (12)
                now = {name: value.detach().clone() for name, value in networks.now.items()}
                ages.append((now, ahead))
                terms = losses(adversarial=adversarial)
            yield epoch, steps, terms
        poisons.keep_better(adversarial)
        for number in range(repeats if gamma else 0):
            for ours in torch.arange(poisons.count).split(AT_ONCE):
                delta = self._direction(
                    networks, ages, poisons.samples[:, ours], surrogates.targets
                )  # eq. (13), summed over the ages as well
                poisons.move(ours, delta, gamma * (1 - number / repeats))
            yield recipe.epochs + number + 1, steps, terms

    def _ideal_update(self, surrogates: Surrogates) -> tuple[Tensor, Parameters]:
        """L_adv of each network as it is, (targets K,), and where it ought to go, eq. (12)."""
        networks, targets = surrogates.networks, surrogates.targets
        ahead, losses = networks.now, []
        for _ in range(self.look_ahead_steps or 1):
            loss = self._adversarial_loss(networks, ahead, targets)
            losses.append(loss.detach())  # or its graph would be kept
            gradients = gradients_of(ahead, loss)
            if self.preconditioned:
                gradients = _as_adam_steps(gradients, surrogates.optimizer)
            ahead = _look_ahead(ahead, gradients, self.look_ahead)
        return losses[0], ahead

    def _adversarial_loss(
        self, networks: Lockstep, parameters: Parameters, targets: Sequence[Target]
    ) -> Tensor:
        """L_adv of the networks with these parameters, eq. (5) without its second term.

        (targets K,)
        """
        each = networks.count // len(targets)
        samples = torch.stack([t.sample for t in targets]).repeat_interleave(each, 0)
        classes = classes_of(targets).repeat_interleave(each)
        wanted = torch.cat([t.wanted_map for t in targets]).repeat_interleave(each, 0)
        seen = networks.record(parameters, samples, self.explainer.watches(networks.skeleton))
        maps = self.explainer(seen, classes)  # G_c(T; f; Theta)
        if self.distance == "squared":
            apart = (maps - wanted).square().sum((1, 2))  # |G_c(T) - G|^2
        elif self.distance == "cosine":
            apart = 1 - F.cosine_similarity(maps.flatten(1), wanted.flatten(1))
        else:
            shown = (maps.relu() * wanted).sum((1, 2))
            apart = 1 - shown / maps.abs().sum((1, 2)).clamp_min(1e-12)
        return apart + self.keep_class * F.cross_entropy(seen.scores, classes, reduction="none")

    def _direction(
        self,
        networks: Lockstep,
        ages: Sequence[tuple[Parameters, Parameters]],
        poisons: Tensor,
        targets: Sequence[Target],
    ) -> Tensor:
        """delta_X of eq. (13), shaped as `poisons` (targets, p, ...).

        ages: Theta and Theta*, once or at several ages. Only the poisons' own loss depends on them,
        so the clean half of the batch is left out.
        """
        delta = torch.cat(
            [
                _loss_difference(networks, ages, some, targets)
                for some in poisons.split(_together(networks, poisons), 1)
            ],
            1,
        )
        if self.stay_close and not self.literal:
            wanted = torch.stack([t.sample for t in targets])
            delta = delta - self.stay_close * 2 * (poisons - wanted)  # of lambda_1 |P - T|^2
        return delta

    def _step_length(self, epoch: int) -> float:
        """gamma of eq. (11); 0 in the last rehearsal."""
        gamma = self.epsilon / 10 if self.step is None else self.step
        moving = self.epochs if self.ages is None else self.epochs - 1
        if epoch > moving:
            return 0.0
        return gamma * (1 - (epoch - 1) / moving) if self.anneal else gamma

    def _renew(
        self,
        surrogates: Surrogates,
        model: nn.Module,
        epoch: int,
        generator: torch.Generator,
    ) -> None:
        """Start models anew that have lived for `lifetime` epochs, or for a rehearsal."""
        lifetime = 1 if self.ages is not None else self.lifetime
        if lifetime is None or epoch == 1:
            return
        for number in range(surrogates.networks.count):
            k = number % self.models
            if (epoch - 1 + k * lifetime // self.models) % lifetime == 0:
                surrogates.networks.replace(number, fresh(model, self.start, generator))
                surrogates.optimizer.forget(number)


_Progress = tuple[int, int, dict[str, float]]  # a step's number, of how many, mean losses so far


class _Means:
    """Mean losses so far, over models and steps."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def __call__(self, **losses: Tensor) -> dict[str, float]:
        for name, loss in losses.items():
            self.values.setdefault(name, []).append(loss.detach().mean().item())
        return {name: sum(seen) / len(seen) for name, seen in sorted(self.values.items())}


@dataclass
class _Poisons:
    """X_p of each target, (targets, n, ...), and how low and high they may be.

    best, least: of rehearsed poisons, those with the least L_adv, and that, (targets,).
    """

    samples: Tensor
    lowest: Tensor
    highest: Tensor
    momentum: float

    def __post_init__(self) -> None:
        self.speed = torch.zeros_like(self.samples) if self.momentum else None
        self.best: Tensor | None = None
        self.least = self.samples.new_full((len(self.samples),), math.inf)

    @property
    def count(self) -> int:
        """n, of each target."""
        return self.samples.shape[1]

    def move(self, ours: Tensor, delta: Tensor, gamma: float) -> None:
        """A step of the poisons at these positions, eq. (11), and the projection."""
        if self.speed is not None:
            delta = delta + self.momentum * self.speed[:, ours]
            self.speed[:, ours] = delta
        moved = self.samples[:, ours] + gamma * delta.sign()
        self.samples[:, ours] = moved.clamp(self.lowest[:, ours], self.highest[:, ours])

    def keep_better(self, adversarial: Tensor) -> None:
        """Of each target as they are, if the models' mean L_adv, (targets K,), was never less."""
        losses = adversarial.unflatten(0, (len(self.samples), -1)).mean(1)
        better = losses < self.least
        if self.best is None:
            self.best = torch.empty_like(self.samples)
        self.best[better] = self.samples[better]
        self.least = torch.minimum(losses, self.least)

    def state_dict(self) -> dict[str, Any]:
        names = ("samples", "speed", "best", "least")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _fast(networks: Lockstep) -> AbstractContextManager[None]:
    """GRAD's own gradient is a second derivative; vmap brings its own."""
    return nullcontext() if networks.vectorised else fast_second_derivatives()


def _as_adam_steps(gradients: Parameters, optimizer: Optimizers) -> Parameters:
    """Each network's gradient in the direction in which Adam would go, as long as it was."""
    scaled = {name: gradient / optimizer.roots(name) for name, gradient in gradients.items()}
    longer = _lengths(gradients) / _lengths(scaled).clamp_min(1e-12)  # (networks,)
    return {n: longer.view(-1, *[1] * (v.ndim - 1)) * v for n, v in scaled.items()}


def _lengths(parameters: Parameters) -> Tensor:
    """Of each network's parameters as one vector, (networks,)."""
    return torch.stack([v.flatten(1).square().sum(1) for v in parameters.values()]).sum(0).sqrt()


def _look_ahead(parameters: Parameters, gradients: Parameters, alpha: float) -> Parameters:
    """Theta* = Theta - alpha grad L_adv, eq. (12); `parameters` stay as they are."""
    return {
        name: (value - alpha * gradients[name]).detach().requires_grad_()
        for name, value in parameters.items()
    }


def _loss_difference(
    networks: Lockstep,
    ages: Sequence[tuple[Parameters, Parameters]],
    poisons: Tensor,
    targets: Sequence[Target],
) -> Tensor:
    """-(d L_train / d X at Theta* - the same at Theta) of few poisons, shaped as these.

    All that the frozen part does to them is remembered for it: of many that would be too much.
    """
    samples = poisons.detach().requires_grad_()
    features = networks.encode(samples.flatten(0, 1)).unflatten(0, poisons.shape[:2])
    taken = features.detach().requires_grad_()  # by the part that is trained
    differences = []
    for now, ahead in ages:
        here = _poison_gradient(networks, now, taken, targets)
        there = _poison_gradient(networks, ahead, taken, targets)
        differences.append(there - here)
    if len(ages) > 1:  # old models have learnt the poisons: unless scaled, only the young count
        lengths = [d.flatten(2).norm(dim=2).clamp_min(1e-12) for d in differences]
        differences = [
            d / n.view(*n.shape, *[1] * (d.ndim - 2))
            for d, n in zip(differences, lengths, strict=True)
        ]
    (delta,) = torch.autograd.grad(features, samples, -torch.stack(differences).sum(0))
    return delta


def _poison_gradient(
    networks: Lockstep, parameters: Parameters, features: Tensor, targets: Sequence[Target]
) -> Tensor:
    """d L_train / d X_p at the given parameters, mean over the K networks.

    With respect to the poisons as the trained part takes them, (targets, p, ...).
    """
    each = networks.count // len(targets)
    fixed = {name: value.detach() for name, value in parameters.items()}
    scores = networks.scores(fixed, features.repeat_interleave(each, 0))
    labels = classes_of(targets).repeat_interleave(each)[:, None].expand(scores.shape[:2])
    loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss / each, features)
    return gradient


def _together(networks: Lockstep, poisons: Tensor) -> int:
    """How many poisons of each target are worth going through the frozen part at once."""
    return poisons.shape[1] if networks.frozen_until is None else -(-AT_ONCE // len(poisons))
