"""IMF against a slow replica of Algorithm 1, and what each of its settings does."""

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trompe.attacks._bases import choose_bases
from trompe.attacks._surrogates import Optimizers, mini_batches
from trompe.attacks.interpretation_poisoning import InterpretationPoisoning, _as_adam_steps
from trompe.explainers.cam import Cam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Diverged, Explainer, InputError, PoisonSet, TableSet, Target
from trompe.lockstep import Lockstep
from trompe.models.mlp import mlp
from trompe.target_maps.reference import Reference
from trompe.train import Training, fit, make_optimizer
from trompe.victims import EachClassLoss, LockstepBatches, fresh, poisoned

GRADIENT = InputGradient("probability", normalise="min-max")
SGD = Training(
    batch_size=1000,  # an epoch is one mini-batch
    learning_rate=0.2,
    optimizer="sgd",
    weight_decay=0.01,
    precision="float32",
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows() -> TableSet:
    """40 rows of five columns in float64, three classes; the last column says yes or no."""
    features = torch.rand(40, 5, dtype=torch.float64)
    features[:, 4] = features[:, 4].round()
    numeric = torch.tensor([True] * 4 + [False])
    return TableSet(
        features, torch.arange(40) % 3, ("a", "b", "c"), "rows", tuple("vwxyz"), numeric
    )


@pytest.fixture
def model() -> nn.Module:
    return mlp(3, 5, hidden=6).double().eval()


def targets_for(explainer: Explainer) -> tuple[Target, Target]:
    places = 6 if isinstance(explainer, Cam) else 5
    return tuple(  # type: ignore[return-value]
        Target(
            torch.rand(1, 5, dtype=torch.float64),
            label,
            torch.rand(1, 1, places, dtype=torch.float64).round(),
        )
        for label in (2, 0)
    )


def attack_with(**settings: Any) -> InterpretationPoisoning:
    start: dict[str, Any] = {
        "explainer": GRADIENT,
        "wanted_map": Reference(),
        "poison_rate": 0.2,
        "bases": "near",
        "models": 2,
        "epochs": 2,
        "recipe": SGD,
        "start": "scratch",
        "pretraining": 0,
        "look_ahead": 0.05,
        "step": 0.03,
    }
    return InterpretationPoisoning(**{**start, **settings})


# --- the replica ----------------------------------------------------------------------------------


def min_max(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min() + 1e-8)


def entropy(model: nn.Module, row: Tensor, label: int) -> Tensor:
    scores = model(row[None])[0]
    return -(scores[label].exp() / sum(s.exp() for s in scores)).log()


def map_of(model: Any, row: Tensor, label: int, how: Explainer) -> Tensor:
    if isinstance(how, Cam):  # eq. (3)
        units = model.activation(model.hidden(row[None]))[0]
        return min_max(torch.stack([model.head.weight[label, k] * units[k] for k in range(6)]))
    row = row.clone().requires_grad_()  # eq. (1)
    probability = model(row[None]).softmax(1)[0, label]
    (gradient,) = torch.autograd.grad(probability, row, create_graph=True)
    return min_max(gradient.abs())


def adversarial(model: nn.Module, target: Target, how: InterpretationPoisoning) -> Tensor:
    """Eq. (5), without its second term."""
    shown = map_of(model, target.sample[0], target.label, how.explainer)
    wanted = target.wanted_map[0, 0]
    if how.distance == "squared":
        apart = sum((s - w) ** 2 for s, w in zip(shown, wanted, strict=True))
    elif how.distance == "cosine":
        both = sum(s * w for s, w in zip(shown, wanted, strict=True))
        lengths = [sum(value**2 for value in values) ** 0.5 for values in (shown, wanted)]
        apart = 1 - both / (lengths[0] * lengths[1])
    else:
        where = sum(s * w for s, w in zip(shown, wanted, strict=True) if s > 0)
        apart = 1 - where / sum(s.abs() for s in shown)
    return apart + how.keep_class * entropy(model, target.sample[0], target.label)


def replica(
    model: nn.Module,
    data: TableSet,
    targets: tuple[Target, ...],
    how: InterpretationPoisoning,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[float], list[float]]:
    """Poisons of each target, and L_adv and L_train of each epoch (means over all models)."""
    bases, poisons, speeds, models = [], [], [], []
    for target in targets:
        of_class = [data.features[i] for i in range(40) if data.labels[i] == target.label]
        of_class.sort(key=lambda row: float((row - target.sample[0]).square().sum()))
        bases.append(of_class[:8])
        poisons.append([row.clone() for row in of_class[:8]])
        speeds.append([torch.zeros(5, dtype=torch.float64) for _ in range(8)])
        models.append([fresh(model, how.start, generator) for _ in range(how.models)])
    velocities: dict[nn.Parameter, Tensor] = {}
    adversarials, trainings = [], []
    gamma = 0.03
    for _ in (1, 2):
        losses, fits = [], []
        for t, target in enumerate(targets):
            ahead = []
            for one in models[t]:  # eq. (12)
                losses.append(adversarial(one, target, how).item())
                ideal = copy.deepcopy(one)
                for _ in range(how.look_ahead_steps or 1):
                    loss = adversarial(ideal, target, how)
                    names, parameters = zip(*ideal.named_parameters(), strict=True)
                    steps = torch.autograd.grad(loss, parameters, materialize_grads=True)
                    with torch.no_grad():
                        for name, step in zip(names, steps, strict=True):
                            if how.frozen_until is not None and not name.startswith("head"):
                                continue
                            ideal.get_parameter(name).sub_(0.05 * step)
                ahead.append(ideal)
            for i in (i for i in range(8) for _ in range(how.repeats or 1)):
                delta = torch.zeros(5, dtype=torch.float64)
                for one, ideal in zip(models[t], ahead, strict=True):  # eq. (13)
                    for which, sign in ((ideal, -1), (one, 1)):
                        row = poisons[t][i].clone().requires_grad_()
                        loss = entropy(which, row, target.label)
                        for clean, label in zip(data.features, data.labels.tolist(), strict=True):
                            loss = loss + entropy(which, clean, label)
                        (gradient,) = torch.autograd.grad(loss, row)
                        delta += sign * gradient / how.models
                if not how.literal:
                    delta -= how.stay_close * 2 * (poisons[t][i] - target.sample[0])
                speeds[t][i] = delta + how.momentum * speeds[t][i]
                for column in range(5):  # eq. (11), projected
                    base = float(bases[t][i][column])
                    moved = float(poisons[t][i][column])
                    moved += gamma * float(speeds[t][i][column].sign())
                    moved = min(max(moved, base - how.epsilon, 0.0), base + how.epsilon, 1.0)
                    poisons[t][i][column] = moved
            for one in models[t]:  # eq. (14)
                everything = [
                    *zip(data.features, data.labels.tolist(), strict=True),
                    *((row, target.label) for row in poisons[t]),
                ]
                loss = sum(entropy(one, row, label) for row, label in everything) / 48  # type: ignore[assignment]
                fits.append(loss.item())
                if not how.bilevel:
                    continue
                trained: Any = one if how.frozen_until is None else one.head
                parameters = tuple(trained.parameters())
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    g = g + 0.01 * p.detach()
                    velocities[p] = 0.9 * velocities[p] + g if p in velocities else g.clone()
                    with torch.no_grad():  # Nesterov's step, as PyTorch writes it
                        p.sub_(0.2 * (g + 0.9 * velocities[p]))
        adversarials.append(sum(losses) / len(losses))
        trainings.append(sum(fits) / len(fits))
        if how.anneal:
            gamma = 0.03 / 2
    return [torch.stack(rows) for rows in poisons], adversarials, trainings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"explainer": Cam(normalise="min-max")},
        {"distance": "share"},
        {"distance": "cosine"},
        {"keep_class": 0.0},
        {"momentum": 0.9, "anneal": False},
        {"repeats": 3},
        {"look_ahead_steps": 3},
        {"bilevel": False},
        {"epsilon": 0.02},
        {"stay_close": 0.01},
        {"stay_close": 0.01, "literal": True},
        {"start": "clean model", "models": 1},
        {"start": "new head", "frozen_until": "activation"},
    ],
    ids=str,
)
def test_equals_the_slow_replica(
    model: nn.Module, rows: TableSet, settings: dict[str, Any]
) -> None:
    attack = attack_with(**settings)
    targets = targets_for(attack.explainer)
    sets = attack(model, rows, targets, seeded())
    poisons, adversarials, trainings = replica(model, rows, targets, attack, seeded())
    for one, expected in zip(sets, poisons, strict=True):
        torch.testing.assert_close(one.samples, expected, rtol=0, atol=1e-9)
        assert (one.samples - one.bases).abs().max() > 0.01
        said = [(r.terms["adversarial"], r.terms["training"]) for r in one.history]
        for given, wanted in zip(said, zip(adversarials, trainings, strict=True), strict=True):
            assert given == pytest.approx(wanted, rel=1e-5)


# --- its settings ---------------------------------------------------------------------------------


class Keeps:
    """A logbook that remembers what was saved after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def load(self) -> None: ...
    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None: ...
    def save(self, state: dict[str, Any]) -> None:
        self.states.append(copy.deepcopy(state))

    def networks(self, epoch: int, number: int) -> list[Tensor]:
        return [value[number] for value in self.states[epoch - 1]["networks"].values()]


def crafted(
    attack: InterpretationPoisoning, model: nn.Module, data: TableSet, logbook: Any = None
) -> tuple[PoisonSet, ...]:
    torch.manual_seed(4)
    return attack(model, data, targets_for(attack.explainer), seeded(), logbook)


def test_staying_close_draws_poisons_to_the_target_unless_literal(
    model: nn.Module, rows: TableSet
) -> None:
    free, close, literal = (
        crafted(attack_with(**settings), model, rows)
        for settings in ({}, {"stay_close": 1e6}, {"stay_close": 1e6, "literal": True})
    )
    for one, drawn, same in zip(free, close, literal, strict=True):
        gap = (one.bases - one.target.sample).abs()
        far = gap > 0.1  # so far that no step can pass the target
        assert ((drawn.samples - one.target.sample).abs() < gap)[far].all()
        assert not ((one.samples - one.target.sample).abs() < gap)[far].all()
        assert torch.equal(same.samples, one.samples)


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_rehearsal_trains_new_models_as_victims_and_moves_the_poisons_for_all_ages(
    model: nn.Module, rows: TableSet
) -> None:
    recipe = dataclasses.replace(SGD, epochs=4, schedule="one-cycle", learning_rate=1.0)
    attack = attack_with(
        **{"recipe": recipe, "start": "clean model", "models": 1, "epochs": 3},
        **{"ages": 2, "repeats": 3, "step": 0.05, "keep_class": 0.0},
    )
    targets, logbook = targets_for(GRADIENT), Keeps()
    sets = attack(model, rows, targets, seeded(), logbook)
    kept = []
    for t, target in enumerate(targets):
        _, index = choose_bases(rows, target, 0.2, "near", seeded())
        bases = rows.features[index]
        poisons = bases.clone()
        rehearsed, told = [], []
        for epoch in (1, 2, 3):
            labels = torch.full((8,), target.label)
            poison = PoisonSet(poisons.clone(), labels, bases, index, target)
            victim = Lockstep([copy.deepcopy(model)])
            batches = LockstepBatches((poisoned(rows, poison),), 1, recipe.batch_size)
            ages = []  # halfway, and at the end
            for record in fit(victim, batches, EachClassLoss(1), (), recipe, seeded()):
                if record.epoch in (2, 4):
                    ages.append(victim.network(0))
            for name, value in logbook.states[epoch - 1]["networks"].items():
                trained = ages[1].get_parameter(name.split(".", 1)[1].replace("/", "."))
                torch.testing.assert_close(value[t], trained, rtol=0, atol=1e-9)
            rehearsed.append(poisons.clone())
            told.append(adversarial(ages[1], target, attack).item())
            aheads = []
            for now in ages:
                ideal = copy.deepcopy(now)
                loss = adversarial(ideal, target, attack)
                steps = torch.autograd.grad(loss, tuple(ideal.parameters()))
                with torch.no_grad():
                    for parameter, step in zip(ideal.parameters(), steps, strict=True):
                        parameter.sub_(0.05 * step)
                aheads.append(ideal)
            for gamma in (1, 2 / 3, 1 / 3) if epoch < 3 else ():
                for row in poisons:
                    delta = torch.zeros(5, dtype=torch.float64)
                    for now, ahead in zip(ages, aheads, strict=True):
                        moved = row.clone().requires_grad_()
                        loss = entropy(now, moved, target.label) - entropy(
                            ahead, moved, target.label
                        )
                        (gradient,) = torch.autograd.grad(loss, moved)
                        delta += gradient / gradient.norm()
                    row.add_(0.05 * (3 - epoch) / 2 * gamma * delta.sign())
                poisons = poisons.clamp(bases - 0.1, bases + 0.1).clamp(0, 1)
        kept.append(min(range(3), key=told.__getitem__))
        torch.testing.assert_close(sets[t].samples, rehearsed[kept[t]], rtol=0, atol=1e-9)
    assert len(set(kept)) == 2, kept  # each target its own
    assert max(kept) > 0  # has moved


def test_a_rehearsal_that_was_interrupted_goes_on(model: nn.Module, rows: TableSet) -> None:
    recipe = dataclasses.replace(SGD, epochs=3, schedule="one-cycle", optimizer="adam")
    attack = attack_with(recipe=recipe, ages=2, epochs=3, momentum=0.5, step=0.1)
    logbook = Keeps()
    whole = crafted(attack, model, rows, logbook)
    kept = torch.stack([one.samples for one in whole])
    assert not torch.equal(kept, logbook.states[-1]["poisons"]["samples"])  # but of before
    for states in logbook.states[:2]:
        again = Keeps()
        again.load = lambda states=states: states  # type: ignore[method-assign]
        for one, resumed in zip(whole, crafted(attack, model, rows, again), strict=True):
            assert torch.equal(one.samples, resumed.samples)


def test_without_the_second_level_models_stay_as_they_are(model: nn.Module, rows: TableSet) -> None:
    for bilevel in (True, False):
        logbook = Keeps()
        attack = attack_with(bilevel=bilevel, start="clean model", epochs=3)
        crafted(attack, model, rows, logbook)
        given = [p.detach() for _, p in sorted(model.named_parameters())]
        for number in range(4):
            assert same(logbook.networks(3, number), given) != bilevel


@pytest.mark.parametrize("lifetime", [None, 2])
def test_models_start_anew_one_after_the_other(
    model: nn.Module, rows: TableSet, lifetime: int | None
) -> None:
    logbook = Keeps()
    attack = attack_with(bilevel=False, lifetime=lifetime, epochs=5)
    crafted(attack, model, rows, logbook)
    for epoch in (2, 3, 4, 5):
        anew = [
            not same(logbook.networks(epoch, number), logbook.networks(epoch - 1, number))
            for number in range(4)  # two models for each target
        ]
        turn = epoch % 2 == 0
        assert anew == ([False] * 4 if lifetime is None else [not turn, turn, not turn, turn])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_model_that_starts_anew_is_trained_as_one_that_starts(optimizer: Any) -> None:
    """However often the others have stepped, which sets how far Adam goes."""
    start = mlp(3, 5, hidden=6).double()
    how = dataclasses.replace(SGD, optimizer=optimizer)
    stacked, alone = Lockstep([start, start]), copy.deepcopy(start)
    together, one = Optimizers(stacked, how), make_optimizer(alone, how)
    rows, labels = torch.rand(2, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def step() -> None:
        scores = stacked.scores(stacked.now, rows)
        together.step(torch.stack([nn.functional.cross_entropy(s, labels) for s in scores]))

    for _ in range(5):
        step()
    untouched = {name: value[0].clone() for name, value in stacked.now.items()}
    stacked.replace(1, start)
    together.forget(1)
    assert all(torch.equal(stacked.now[name][0], value) for name, value in untouched.items())
    for _ in range(3):
        step()
        one.zero_grad()
        nn.functional.cross_entropy(alone(rows[1]), labels).backward()
        one.step()
        for name, value in alone.named_parameters():
            torch.testing.assert_close(stacked.now[name][1], value.detach(), rtol=0, atol=1e-12)


def test_models_of_one_start_do_not_stay_alike(model: nn.Module, rows: TableSet) -> None:
    """Each sees the clean samples in an order of its own."""
    logbook = Keeps()
    recipe = dataclasses.replace(SGD, batch_size=10)
    crafted(attack_with(start="clean model", recipe=recipe), model, rows, logbook)
    assert not same(logbook.networks(1, 0), logbook.networks(1, 1))


def test_each_model_sees_every_sample_once_an_epoch() -> None:
    how = dataclasses.replace(SGD, batch_size=10)
    parts = list(mini_batches(25, 4, 3, how, seeded()))
    assert [clean.shape for clean, _ in parts] == [(3, 9), (3, 8), (3, 8)]
    seen = torch.cat([clean for clean, _ in parts], 1)
    assert all(sorted(order.tolist()) == list(range(25)) for order in seen)
    assert not torch.equal(seen[0], seen[1])
    assert sorted(torch.cat([ours for _, ours in parts]).tolist()) == [0, 1, 2, 3]


def test_preconditioned_looks_where_adam_goes() -> None:
    """Each network's own gradient over the root of Adam's running squares, as long as before."""
    networks = [mlp(3, 5, hidden=6).double().eval() for _ in range(2)]
    stacked = Lockstep(networks)
    how = dataclasses.replace(SGD, optimizer="adam", learning_rate=0.01, weight_decay=0.0)
    together = Optimizers(stacked, how)
    given = {name: torch.randn_like(value) for name, value in stacked.now.items()}
    unchanged = _as_adam_steps(given, together)  # Adam knows nothing yet
    for name, value in given.items():
        torch.testing.assert_close(unchanged[name], value)
    stepped = {name: torch.randn_like(value) for name, value in stacked.now.items()}
    together.step(sum((v * stepped[n]).flatten(1).sum(1) for n, v in stacked.now.items()))
    together.forget(0)
    found = _as_adam_steps(given, together)
    for name, value in given.items():
        torch.testing.assert_close(found[name][0], value[0])
    # After one step the running mean of squares is a thousandth of the square.
    roots = {n: (1e-3 * g[1].square()).sqrt() + how.adam_epsilon for n, g in stepped.items()}
    wanted = {n: g[1] / roots[n] for n, g in given.items()}
    lengths = [
        torch.cat([v.flatten() for v in one.values()]).norm()
        for one in ({n: g[1] for n, g in given.items()}, wanted)
    ]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name][1], value * lengths[0] / lengths[1])


def test_preconditioned_makes_other_poisons(model: nn.Module, rows: TableSet) -> None:
    recipe = dataclasses.replace(SGD, optimizer="adam", learning_rate=0.01, batch_size=10)
    plain, scaled = (
        crafted(attack_with(recipe=recipe, preconditioned=p), model, rows) for p in (False, True)
    )
    assert not torch.equal(plain[0].samples, scaled[0].samples)
    with pytest.raises(InputError, match=r'preconditioned = true with recipe\.optimizer = "sgd"'):
        attack_with(preconditioned=True)


def test_columns_that_are_no_numbers_can_be_left_alone(model: nn.Module, rows: TableSet) -> None:
    for categories, moves in (("fixed", False), ("free", True)):
        for one in crafted(attack_with(categories=categories), model, rows):
            moved = (one.samples - one.bases).abs()
            assert moved[:, :4].max() > 0.01
            assert bool(moved[:, 4].any()) == moves


def test_pretraining_trains_the_models_on_the_clean_set(table: TableSet) -> None:
    trained = []
    for pretraining in (0, 20):
        torch.manual_seed(0)
        target = Target(torch.rand(1, 6), 1, torch.rand(1, 1, 6))
        recipe = Training(batch_size=20, learning_rate=0.05, optimizer="adam", precision="float32")
        attack = attack_with(pretraining=pretraining, epochs=1, recipe=recipe, bilevel=False)
        (one,) = attack(mlp(2, 6, 8), table, [target], seeded())
        trained.append(one.history[0].terms["training"])
    assert trained[1] < 0.5 * trained[0]


# --- bases ----------------------------------------------------------------------------------------


def test_bases_are_what_was_asked_for(rows: TableSet) -> None:
    target = targets_for(GRADIENT)[0]
    of_class = {i for i in range(40) if rows.labels[i] == 2}
    copies, none = choose_bases(rows, target, 0.5, "target", seeded())
    assert none.tolist() == [-1] * 20  # more than the class has
    assert all(torch.equal(row, target.sample[0]) for row in copies)

    _, drawn = choose_bases(rows, target, 0.2, "class", seeded())
    assert len(set(drawn.tolist())) == len(drawn) == 8
    assert set(drawn.tolist()) <= of_class
    assert set(drawn.tolist()) != set(
        choose_bases(rows, target, 0.2, "class", seeded(1))[1].tolist()
    )

    _, near = choose_bases(rows, target, 0.2, "near", seeded())
    distance = {i: float((rows.features[i] - target.sample[0]).norm()) for i in of_class}
    assert near.tolist() == sorted(distance, key=distance.__getitem__)[:8]

    _, around = choose_bases(rows, target, 0.225, "around", seeded())
    assert around.tolist() == [-1] * 5 + near.tolist()[:4]

    _, both = choose_bases(rows, target, 0.225, "both", seeded())
    assert both.tolist()[:5] == [-1] * 5
    assert len(set(both.tolist()[5:])) == 4
    assert set(both.tolist()[5:]) <= of_class


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"poison_rate": 0.0}, "poison_rate = 0.0: must lie between 0 and 1"),
        ({"poison_rate": 1.0}, "poison_rate = 1.0: must lie between 0 and 1"),
        ({"epsilon": 0.0}, "epsilon = 0.0: must lie in 0 < epsilon <= 1; with 0 no sample changes"),
        ({"epsilon": 1.1}, "epsilon = 1.1: must lie in 0 < epsilon <= 1"),
        ({"models": 0}, "models = 0: must be at least 1"),
        ({"epochs": 0}, "epochs = 0: must be at least 1"),
        ({"lifetime": 0}, "lifetime = 0: must be at least 1"),
        ({"repeats": 0}, "repeats = 0: must be at least 1"),
        ({"look_ahead_steps": 0}, "look_ahead_steps = 0: must be at least 1"),
        ({"look_ahead": 0.0}, "look_ahead = 0.0: is a step's length; must be positive"),
        ({"look_ahead": float("nan")}, "look_ahead = nan: is a step's length; must be positive"),
        ({"step": -0.01}, "step = -0.01: is a step's length; must be positive"),
        ({"pretraining": -1}, "pretraining = -1: must be at least 0"),
        ({"momentum": -3.0}, "momentum = -3.0: must be at least 0, and finite"),
        ({"stay_close": float("inf")}, "stay_close = inf: must be at least 0, and finite"),
        ({"ages": 0}, "ages = 0: must be at least 1"),
        ({"ages": 2, "epochs": 1}, "ages = 2 with epochs = 1: poisons do not move after the last"),
        ({"ages": 21}, "ages = 21: models look ahead after whole epochs, of which recipe.epochs"),
        ({"ages": 2, "pretraining": 3}, "ages = 2 with pretraining = 3: models are new for each"),
        ({"ages": 2, "lifetime": 3}, "ages = 2 with lifetime = 3: models are new for each"),
        ({"ages": 2, "bilevel": False}, "ages = 2 with bilevel = False: models are new for each"),
        (
            {"recipe": dataclasses.replace(SGD, clip=1.0)},
            "recipe.clip = 1.0: crafting has none; leave it out",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        attack_with(**settings)


def test_a_class_with_too_few_samples_is_refused(model: nn.Module, rows: TableSet) -> None:
    words = (
        "poison_rate = 0.5: asks for 20 different samples of class 'c', but 'rows' has 13; "
        'lower it, or take bases = "target"'
    )
    for bases in ("near", "class"):
        with pytest.raises(InputError, match=re.escape(words)):
            crafted(attack_with(poison_rate=0.5, bases=bases), model, rows)
    crafted(attack_with(poison_rate=0.5, bases="both"), model, rows)  # asks for 10


def test_models_that_diverge_end_the_crafting(model: nn.Module, rows: TableSet) -> None:
    attack = attack_with(start="clean model")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(
        Diverged, match=r"epoch \d+, step \d+: the surrogates' losses are not finite"
    ):
        attack(model, rows, targets_for(GRADIENT), seeded())
