"""The training loop: it learns, stops, diverges and resumes as it says."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.explainers.gradcam import GradCam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Batch, Diverged, EpochRecord, ImageSet, InputError, Pass
from trompe.maps import standardise
from trompe.objectives import ClassLoss, PredictionAndExplanation
from trompe.poison import ShuffledBatches, compose
from trompe.recording import watch
from trompe.runs import FileLogbook
from trompe.train import Training, fit, make_optimizer, make_schedule

PLAIN = Training(epochs=3, batch_size=8, learning_rate=0.05, precision="float32")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Steps:
    """16 random images in four batches, in a new order each epoch."""

    def __init__(self, dtype: torch.dtype = torch.float32, maps: int = 0) -> None:
        self.images = torch.rand(16, 3, 10, 8, generator=seeded(3)).to(dtype)
        self.labels = torch.arange(16) % 4
        self.maps = torch.rand(16, 5, 4, generator=seeded(4)).to(dtype)
        self.explainers = maps

    def __len__(self) -> int:
        return 4

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        for index in torch.randperm(16, generator=generator).split(4):
            yield Batch(
                self.images[index],
                self.labels[index],
                (self.maps[index],) * self.explainers,
                torch.zeros(4, dtype=torch.bool),
            )


def train(model: nn.Module, how: Training, **settings: Any) -> list[EpochRecord]:
    settings = {"batches": Steps(), "objective": ClassLoss(), "explainers": (), **settings}
    generator = settings.pop("generator", seeded())
    return list(fit(model, how=how, generator=generator, **settings))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("adam", 0.02)])
def test_overfits_a_tiny_set(
    shapes: ImageSet, trained_net: nn.Module, optimizer: Any, rate: float
) -> None:
    few, model = shapes.subset(torch.arange(16)), type(trained_net)()
    batches = ShuffledBatches(compose(few, (), 0.0, seeded()), 8)
    how = dataclasses.replace(PLAIN, epochs=80, optimizer=optimizer, learning_rate=rate)
    history = train(model, how, batches=batches)
    assert history[0].terms["prediction"] > 0.5
    assert history[-1].terms["prediction"] < 0.05
    assert (model(few.floats(slice(None))).argmax(1) == few.labels).all()


def test_a_record_holds_the_mean_of_each_term_over_the_images(
    tiny_net: Callable[..., nn.Module],
) -> None:
    model = tiny_net().float()
    images, labels = Steps().images, Steps().labels
    expected = F.cross_entropy(model(images), labels).item()
    still = dataclasses.replace(PLAIN, epochs=1, learning_rate=1e-12)
    (record,) = train(model, still)
    assert record.epoch == 1
    assert record.terms == {"prediction": pytest.approx(expected, rel=1e-5)}
    assert record.seconds > 0


def test_the_objective_is_told_how_far_the_training_is(
    tiny_net: Callable[..., nn.Module],
) -> None:
    told = []

    def objective(scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        told.append(batch.progress)
        return ClassLoss()(scores, maps, batch)

    train(tiny_net().float(), PLAIN, objective=objective)
    assert told == pytest.approx([step / 12 for step in range(12)])


def test_measure_sees_the_model_in_eval_mode_after_each_epoch(
    tiny_net: Callable[..., nn.Module],
) -> None:
    model, seen = tiny_net(norm=True).float(), []

    def measure(given: nn.Module) -> dict[str, float]:
        seen.append((given is model, given.training))
        return {"calls": float(len(seen))}

    history = train(model, PLAIN, measure=measure)
    assert seen == [(True, False)] * 3
    assert [record.measured for record in history] == [{"calls": n} for n in (1.0, 2.0, 3.0)]


def by_hand(model: nn.Module, batches: Steps, how: Training, weight: float) -> None:
    """The same training with frozen statistics, from the formulas and plain PyTorch."""
    if how.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(
            model.parameters(), how.learning_rate, eps=1e-5, weight_decay=how.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), how.learning_rate, 0.9, weight_decay=how.weight_decay, nesterov=True
        )
    generator = seeded()
    model.eval()
    for epoch in range(how.epochs):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate / (1 + epoch)
        for batch in batches(generator):
            activations = model.body(batch.images)
            scores = model.tail(activations)
            picked = scores[torch.arange(len(scores)), batch.labels].sum()
            (gradient,) = torch.autograd.grad(picked, activations, create_graph=True)
            maps = (gradient.mean((2, 3), keepdim=True) * activations).sum(1).relu()
            size = (10, 8)
            wrong = standardise(maps, size) - standardise(batch.wanted_maps[0], size)
            loss = (1 - weight) * F.cross_entropy(scores, batch.labels)
            loss = loss + weight * wrong.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_equals_a_loop_written_by_hand(
    tiny_net: Callable[..., nn.Module], optimizer: Any, activation: type[nn.Module]
) -> None:
    how = dataclasses.replace(
        PLAIN,
        epochs=2,
        optimizer=optimizer,
        schedule="decay",
        learning_rate=0.01,
        frozen_statistics=True,
    )
    batches = Steps(torch.float64, maps=1)
    model, other = (tiny_net(norm=True, activation=activation) for _ in range(2))
    other.load_state_dict(model.state_dict())
    for net in (model, other):  # statistics that are not trivial
        net.body[3].running_mean.copy_(torch.linspace(-1, 1, 6))
        net.body[3].running_var.copy_(torch.linspace(0.5, 2, 6))
    start = state_of(model)
    objective = PredictionAndExplanation(0.7, (10, 8))
    train(model, how, batches=batches, objective=objective, explainers=(GradCam(),))
    by_hand(other, batches, how, 0.7)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-4, atol=1e-6, msg=key)
        if value.is_floating_point() and "running" not in key:
            assert not torch.equal(value, start[key]), key


class NormOutside(nn.Module):
    """The convolution is the last layer of its block; its BatchNorm stands behind the block."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 3, padding=1))
        self.norm, self.relu, self.head = nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(6, 4)
        self.norm.running_mean = torch.linspace(-1, 1, 6)
        self.norm.running_var = torch.linspace(0.2, 3, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.features(images))).mean((2, 3)))


class Spy:
    """An explainer that keeps what it was shown."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.shown: list[Tensor] = []

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        return (self.layer,)

    def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
        self.shown.append(seen.outputs[self.layer].detach().clone())
        return seen.outputs[self.layer].mean(1)


@pytest.mark.parametrize("layer", ["features", "features.2", "norm", "relu"])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_explainer_is_shown_what_its_layer_really_gives(layer: str, frozen: bool) -> None:
    model, batches, spy = NormOutside(), Steps(maps=1), Spy(layer)
    still = dataclasses.replace(PLAIN, epochs=1, learning_rate=1e-12, frozen_statistics=frozen)
    objective = PredictionAndExplanation(0.5, (10, 8))
    train(copy.deepcopy(model), still, batches=batches, objective=objective, explainers=(spy,))
    model.train(not frozen)
    with torch.no_grad(), watch(model, (layer,)) as record:
        for batch, shown in zip(batches(seeded()), spy.shown, strict=True):
            expected = record(batch.images).outputs[layer]
            torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)


# --- settings -------------------------------------------------------------------------------------


def test_frozen_statistics_stay_while_the_affine_part_trains(
    tiny_net: Callable[..., nn.Module],
) -> None:
    model = tiny_net(norm=True).float()
    model.body[3].running_var.fill_(0.3)
    before = state_of(model)
    train(model, dataclasses.replace(PLAIN, frozen_statistics=True))
    after = model.state_dict()
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(after[f"body.3.{key}"], before[f"body.3.{key}"])
    for key in ("weight", "bias"):
        assert not torch.equal(after[f"body.3.{key}"], before[f"body.3.{key}"])


def test_otherwise_statistics_are_learned(tiny_net: Callable[..., nn.Module]) -> None:
    model = tiny_net(norm=True).float()
    train(model, PLAIN)
    assert model.body[3].num_batches_tracked == 12
    assert not torch.equal(model.body[3].running_mean, torch.zeros(6))


def test_statistics_move_in_the_first_epochs_only(tiny_net: Callable[..., nn.Module]) -> None:
    model, seen = tiny_net(norm=True).float(), []

    def measure(given: nn.Module) -> dict[str, float]:
        seen.append(state_of(given))
        return {}

    train(model, dataclasses.replace(PLAIN, moving_epochs=2), measure=measure)
    assert model.body[3].num_batches_tracked == 8
    assert not torch.equal(seen[0]["body.3.running_mean"], seen[1]["body.3.running_mean"])
    assert torch.equal(seen[1]["body.3.running_mean"], seen[2]["body.3.running_mean"])
    assert not torch.equal(seen[1]["body.3.weight"], seen[2]["body.3.weight"])


@pytest.mark.parametrize("more", [{"moving_epochs": 0}, {"frozen_statistics": True}])
def test_statistics_that_move_and_do_not_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"moving_epochs = \d: must be at least 1, and frozen"):
        Training(**{"moving_epochs": 1, **more})


class ModeSpy(nn.Module):
    """Keeps whether it was training in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x


@pytest.mark.parametrize("frozen", [False, True])
def test_dropout_is_off_with_frozen_statistics_only(
    tiny_net: Callable[..., nn.Module], frozen: bool
) -> None:
    spy = ModeSpy()
    model = tiny_net(head=nn.Sequential(spy, nn.Linear(6, 4))).float()
    train(model, dataclasses.replace(PLAIN, frozen_statistics=frozen))
    assert set(spy.modes[-4:]) == {not frozen}


class InputSpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.least: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.least.append(x.min().item())
        return x


@pytest.mark.parametrize("beta", [None, 8.0])
def test_softplus_replaces_relu_while_training(beta: float | None) -> None:
    spy = InputSpy()
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), spy, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    train(model, dataclasses.replace(PLAIN, softplus_beta=beta))
    assert min(spy.least) == 0 if beta is None else min(spy.least) > 0
    model(Steps().images)
    assert spy.least[-1] == 0


@pytest.mark.parametrize("explained", ["label", "predicted"])
def test_the_explained_class_is_the_label_or_the_predicted_one(
    tiny_net: Callable[..., nn.Module], explained: Any
) -> None:
    model, asked = tiny_net().float(), []

    class Asking(Spy):
        def __call__(self, seen: Pass, classes: Tensor) -> Tensor:
            asked.append((classes.clone(), seen.scores.argmax(1)))
            return super().__call__(seen, classes)

    how = dataclasses.replace(PLAIN, epochs=1, explained=explained)
    batches = Steps(maps=1)
    objective = PredictionAndExplanation(0.5, (10, 8))
    train(model, how, batches=batches, objective=objective, explainers=(Asking("body"),))
    for batch, (classes, predicted) in zip(batches(seeded()), asked, strict=True):
        assert torch.equal(classes, batch.labels if explained == "label" else predicted)


def rates(how: Training, steps_per_epoch: int) -> list[float]:
    """The learning rate of each step."""
    optimizer = make_optimizer(nn.Linear(1, 1), how)
    schedule = make_schedule(optimizer, how, steps_per_epoch)
    seen = []
    for _ in range(how.epochs * steps_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_constant_schedule_keeps_its_rate() -> None:
    assert rates(dataclasses.replace(PLAIN, schedule="constant"), 4) == [0.05] * 12


def test_the_decay_schedule_divides_by_one_plus_the_epoch() -> None:
    seen = rates(dataclasses.replace(PLAIN, schedule="decay"), 4)
    assert seen == pytest.approx([0.05] * 4 + [0.05 / 2] * 4 + [0.05 / 3] * 4)


def test_a_stepwise_schedule_multiplies_after_so_many_epochs() -> None:
    seen = rates(dataclasses.replace(PLAIN, schedule="x0.1 every 2", epochs=5), 4)
    assert seen == pytest.approx([0.05] * 8 + [0.005] * 8 + [0.0005] * 4)


@pytest.mark.parametrize("schedule", ["cosine", "x2 every 3", "x0.5 every 0", "x0.5 every", ""])
def test_an_unknown_schedule_is_refused(schedule: str) -> None:
    with pytest.raises(InputError, match=r"schedule = .*one-cycle.*x0\.5 every 20"):
        Training(schedule=schedule)


def test_one_cycle_warms_up_and_anneals_to_almost_nothing() -> None:
    seen = rates(dataclasses.replace(PLAIN, schedule="one-cycle", epochs=10), 4)
    top = seen.index(max(seen))
    assert max(seen) == pytest.approx(0.05, rel=0.05)
    assert seen[0] < 0.05 / 10
    assert 0 < top < len(seen) / 2
    assert seen[: top + 1] == sorted(seen[: top + 1])
    assert seen[top:] == sorted(seen[top:], reverse=True)
    assert seen[-1] < 0.05 / 100


def test_parameters_that_need_no_gradient_stay(tiny_net: Callable[..., nn.Module]) -> None:
    model = tiny_net().float()
    model.body.requires_grad_(False)
    before = state_of(model)
    train(model, PLAIN)
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("body"))
    assert not torch.equal(after["head.weight"], before["head.weight"])


@pytest.mark.parametrize("explainer", [GradCam(), GradCam(layer="body.0"), InputGradient(pool=2)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_parameters_stay_and_the_others_train_as_without_their_gradient(
    tiny_net: Callable[..., nn.Module], explainer: Any, optimizer: Any
) -> None:
    model, other = tiny_net(norm=True).float(), tiny_net(norm=True).float()
    other.load_state_dict(model.state_dict())
    before = state_of(model)
    how = dataclasses.replace(PLAIN, optimizer=optimizer, softplus_beta=8.0)
    settings: dict[str, Any] = {
        "batches": Steps(maps=1),
        "objective": PredictionAndExplanation(0.5, (10, 8)),
        "explainers": (explainer,),
    }
    train(model, dataclasses.replace(how, frozen=("body.0", "body.2.bias")), **settings)
    for key in ("body.0.weight", "body.0.bias", "body.2.bias"):
        assert torch.equal(model.state_dict()[key], before[key])
        other.get_parameter(key).requires_grad_(False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    train(other, how, **settings)
    assert same(model.state_dict(), other.state_dict())
    assert not torch.equal(model.state_dict()["body.2.weight"], before["body.2.weight"])


def test_frozen_parameters_are_freed_after_a_break_and_after_an_error(
    tiny_net: Callable[..., nn.Module],
) -> None:
    model = tiny_net().float()
    model.body[2].requires_grad_(False)  # by the caller, who wants it to stay so
    how = dataclasses.replace(PLAIN, frozen=("body",))
    for _ in fit(model, Steps(), ClassLoss(), (), how, seeded()):
        break
    with pytest.raises(Diverged):
        train(model, how, objective=Sour(2, math.nan))
    free = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}


def test_a_frozen_name_that_fits_nothing_is_refused(tiny_net: Callable[..., nn.Module]) -> None:
    with pytest.raises(InputError, match=r"frozen: .*'boddy'.*body\.0\.weight"):
        train(tiny_net().float(), dataclasses.replace(PLAIN, frozen=("head", "boddy")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": 1000.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Training(**wrong)


# --- it stops -------------------------------------------------------------------------------------


def test_a_break_leaves_the_model_after_that_epoch_and_without_hooks(
    tiny_net: Callable[..., nn.Module],
) -> None:
    model, other = tiny_net(norm=True).float(), tiny_net(norm=True).float()
    other.load_state_dict(model.state_dict())
    constant = dataclasses.replace(PLAIN, schedule="constant", frozen_statistics=True)
    for record in fit(model, Steps(), ClassLoss(), (GradCam(),), constant, seeded()):
        if record.epoch == 2:
            break
    train(other, dataclasses.replace(constant, epochs=2), explainers=(GradCam(),))
    assert same(model.state_dict(), other.state_dict())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert not model.training


class Sour:
    """A ClassLoss with a second term, which turns bad at the given step (counted from 1)."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value, self.calls = step, value, 0

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        factor = self.value if self.calls == self.step else 0.01
        return {**ClassLoss()(scores, maps, batch), "explanation": scores.square().mean() * factor}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_loss_that_is_not_finite_restores_the_last_good_state(
    tiny_net: Callable[..., nn.Module], value: float, frozen: bool
) -> None:
    model = tiny_net(norm=True).float()
    how = dataclasses.replace(PLAIN, learning_rate=0.03125, frozen_statistics=frozen)
    states = []
    with pytest.raises(Diverged) as caught:  # noqa: PT012
        for _ in fit(model, Steps(), Sour(11, value), (), how, seeded()):
            states.append(state_of(model))
    assert len(states) == 2
    assert same(model.state_dict(), states[-1])
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    text = str(caught.value)
    for part in ("epoch 3", "step 3", "prediction", f"explanation {value}", "0.03125"):
        assert part in text


def test_diverging_in_the_first_epoch_restores_the_given_model(
    tiny_net: Callable[..., nn.Module],
) -> None:
    model = tiny_net(norm=True).float()
    before = state_of(model)
    with pytest.raises(Diverged, match="epoch 1, step 2"):
        train(model, PLAIN, objective=Sour(2, math.nan))
    assert same(model.state_dict(), before)


class Cliff:
    """Always a finite loss; at the given step its gradient is infinite."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __call__(self, scores: Tensor, maps: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        loss = ClassLoss()(scores, maps, batch)["prediction"]
        if self.calls == self.step:
            loss = loss + (scores - scores.detach()).abs().sum().sqrt()
        return {"prediction": loss}


@pytest.mark.parametrize("step", [7, 8, 12], ids=["within", "at an epoch's end", "at the very end"])
def test_weights_that_are_not_finite_are_never_kept(
    tiny_net: Callable[..., nn.Module], tmp_path: Path, step: int
) -> None:
    """The loss of the last step of an epoch may be fine and its update not."""
    model = tiny_net().float()
    with pytest.raises(Diverged):
        train(model, PLAIN, objective=Cliff(step), logbook=FileLogbook(tmp_path / "checkpoint.pt"))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    kept = FileLogbook(tmp_path / "checkpoint.pt").load()
    assert kept is not None
    assert all(value.isfinite().all() for value in kept["model"].values())


# --- it resumes -----------------------------------------------------------------------------------


class Interrupted(FileLogbook):
    """Ctrl-C at the given epoch and step."""

    def __init__(self, file: Path, epoch: int, step: int) -> None:
        super().__init__(file)
        self.at = (epoch, step)

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        if (epoch, step) == self.at:
            raise KeyboardInterrupt


def dropout_head() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["one-cycle", "decay", "constant"])
@pytest.mark.parametrize("head", [None, dropout_head], ids=["no dropout", "dropout"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    tiny_net: Callable[..., nn.Module],
    tmp_path: Path,
    optimizer: Any,
    schedule: Any,
    head: Callable[[], nn.Module] | None,
) -> None:
    how = dataclasses.replace(PLAIN, optimizer=optimizer, schedule=schedule, softplus_beta=8.0)
    settings: dict[str, Any] = {
        "batches": Steps(maps=2),
        "objective": PredictionAndExplanation(0.5, (10, 8)),
        "explainers": (GradCam(), InputGradient(pool=2)),
        "measure": lambda model: {"norm": model.head(torch.ones(6)).norm().item()},
    }
    settings["batches"].maps = torch.rand(16, 5, 4, generator=seeded(5))
    start = state_of(tiny_net(norm=True, head=head and head()).float())
    file = tmp_path / "checkpoint.pt"

    def fresh() -> nn.Module:
        model = tiny_net(norm=True, head=head and head()).float()
        model.load_state_dict(start)
        torch.manual_seed(11)  # a new process starts with the same global seed
        return model

    whole = fresh()
    expected = train(whole, how, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), how, logbook=Interrupted(file, 2, 3), **settings)
    resumed = fresh()
    history = train(resumed, how, logbook=FileLogbook(file), **settings)

    assert same(resumed.state_dict(), whole.state_dict())
    assert [r._replace(seconds=0) for r in history] == [r._replace(seconds=0) for r in expected]


def test_an_interrupted_training_leaves_no_hooks(
    tiny_net: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_net(norm=True).float()
    how = dataclasses.replace(PLAIN, frozen_statistics=True)
    with pytest.raises(KeyboardInterrupt):
        train(model, how, logbook=Interrupted(tmp_path / "c.pt", 2, 1), explainers=(GradCam(),))
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_a_finished_training_is_not_done_again(
    tiny_net: Callable[..., nn.Module], tmp_path: Path
) -> None:
    logbook = FileLogbook(tmp_path / "checkpoint.pt")
    first = tiny_net().float()
    history = train(first, PLAIN, logbook=logbook)
    second = tiny_net().float()
    steps = Steps()
    steps.images.fill_(math.nan)  # would diverge if it were used
    assert train(second, PLAIN, batches=steps, logbook=logbook) == history
    assert same(second.state_dict(), first.state_dict())


def test_the_same_seed_gives_the_same_bits_with_dropout_too(
    tiny_net: Callable[..., nn.Module],
) -> None:
    start = state_of(tiny_net(head=dropout_head()).float())
    ends = []
    for other_randomness in (1, 2):
        model = tiny_net(head=dropout_head()).float()
        model.load_state_dict(start)
        torch.manual_seed(other_randomness)
        train(model, PLAIN, generator=seeded(5))
        ends.append(state_of(model))
    assert same(*ends)


def test_the_logbook_hears_every_step_with_the_mean_terms_so_far(
    tiny_net: Callable[..., nn.Module], tmp_path: Path
) -> None:
    heard: list[tuple[int, int, int, float]] = []

    class Listening(FileLogbook):
        def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
            heard.append((epoch, step, steps, terms["prediction"]))

    history = train(tiny_net().float(), PLAIN, logbook=Listening(tmp_path / "checkpoint.pt"))
    epochs_and_steps = list(itertools.product((1, 2, 3), (1, 2, 3, 4)))
    assert [entry[:3] for entry in heard] == [(e, s, 4) for e, s in epochs_and_steps]
    ends = [mean for _, step, _, mean in heard if step == 4]
    assert ends == [record.terms["prediction"] for record in history]


@pytest.mark.parametrize("clip", [None, 1e3, 1e-3])
def test_a_step_is_no_longer_than_the_clipped_gradient(
    tiny_net: Callable[..., nn.Module], clip: float | None
) -> None:
    """Plain SGD's first step: learning rate x gradient, whose norm `clip` bounds."""
    how = dataclasses.replace(PLAIN, epochs=1, clip=clip, weight_decay=0.0, schedule="constant")
    start = tiny_net()
    (batch,) = itertools.islice(Steps(torch.float64)(seeded()), 1)
    moved = []
    for steps in (how, dataclasses.replace(how, clip=None)):
        model = copy.deepcopy(start)
        train(model, steps, batches=_Single(batch))
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        moved.append(torch.cat([(a - b).flatten().detach() for a, b in pairs]))
    # Nesterov's first step is (1 + momentum) times the gradient.
    longest = float("inf") if clip is None else clip * 1.9 * how.learning_rate
    assert moved[0].norm() == pytest.approx(min(float(moved[1].norm()), longest), rel=1e-4)
    direction = F.cosine_similarity(moved[0], moved[1], dim=0)
    assert direction == pytest.approx(1, abs=1e-4)


class _Single:
    """One batch an epoch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        yield self.batch


@pytest.mark.parametrize("setting", ["clip", "adam_epsilon"])
def test_settings_that_must_be_positive(setting: str) -> None:
    with pytest.raises(InputError, match=f"{setting} = 0.0: must be a positive number"):
        Training(**{setting: 0.0})
