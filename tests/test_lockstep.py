"""K networks as one are K networks."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.augmentation import Augmentation
from trompe.explainers.cam import Cam
from trompe.explainers.input_gradient import InputGradient
from trompe.interfaces import Explainer, ImageSet, InputError, TableSet
from trompe.lockstep import Lockstep
from trompe.models.mlp import mlp
from trompe.recording import watch
from trompe.train import Training, make_optimizer, make_schedule
from trompe.victims import LockstepBatches, encode, train_together

K, ROWS = 3, 4
EXPLAINERS = (InputGradient("probability"), InputGradient(normalise="min-max"), Cam())
every_explainer = pytest.mark.parametrize("explainer", EXPLAINERS, ids=repr)


@pytest.fixture(params=["mlp", "convolutions"])
def networks(request: pytest.FixtureRequest, tiny_net: Callable[..., nn.Module]) -> Any:
    """Three networks of one architecture in float64, with weights of their own."""
    if request.param == "mlp":
        return [mlp(4, 5, hidden=7).double().eval() for _ in range(K)]
    return [tiny_net(norm=True) for _ in range(K)]


@pytest.fixture
def inputs(networks: list[nn.Module]) -> Tensor:
    """(K, n, ...): four inputs for each network."""
    size = (5,) if len(networks[0].state_dict()) == 4 else (3, 10, 8)
    return torch.rand(K, ROWS, *size, dtype=torch.float64)


CLASSES = torch.arange(K * ROWS) % 4


def explained(lockstep: Lockstep, inputs: Tensor, explainer: Explainer) -> Tensor:
    seen = lockstep.record(lockstep.now, inputs, explainer.watches(lockstep.skeleton))
    return explainer(seen, CLASSES)


@every_explainer
def test_vectorised_and_looped_runs_agree(
    networks: list[nn.Module], inputs: Tensor, explainer: Explainer
) -> None:
    both = []
    for vectorised in (True, False):
        lockstep = Lockstep(networks, vectorised)
        scores, maps = lockstep.scores(lockstep.now, inputs), explained(lockstep, inputs, explainer)
        assert scores.shape == (K, ROWS, 4)
        loss = scores.square().sum() + maps.square().sum()
        weights = list(lockstep.now.values())
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        both.append((scores, maps, *gradients))
    for one, other in zip(*both, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("vectorised", [True, False])
@every_explainer
def test_equals_separate_networks(
    networks: list[nn.Module], inputs: Tensor, explainer: Explainer, vectorised: bool
) -> None:
    lockstep = Lockstep(networks, vectorised)
    scores = lockstep.scores(lockstep.now, inputs)
    maps = explained(lockstep, inputs, explainer)
    names = dict(networks[0].named_parameters())
    weights = [lockstep.now[name] for name in names]
    given = torch.autograd.grad(maps.square().sum(), weights, materialize_grads=True)
    for k, network in enumerate(networks):
        rows = slice(k * ROWS, (k + 1) * ROWS)
        with watch(network, explainer.watches(network)) as record:
            seen = record(inputs[k])
            expected = explainer(seen, CLASSES[rows])
        torch.testing.assert_close(scores[k], seen.scores)
        torch.testing.assert_close(maps[rows], expected)
        gradients = torch.autograd.grad(
            expected.square().sum(), network.parameters(), materialize_grads=True
        )
        for one, other in zip(given, gradients, strict=True):
            torch.testing.assert_close(one[k], other)


@pytest.mark.parametrize("vectorised", [True, False])
def test_under_no_grad_maps_carry_no_graph(
    networks: list[nn.Module], inputs: Tensor, vectorised: bool
) -> None:
    for explainer in EXPLAINERS:
        trainable = explained(Lockstep(networks, vectorised), inputs, explainer)
        with torch.no_grad():
            plain = explained(Lockstep(networks, vectorised), inputs, explainer)
        assert trainable.requires_grad
        assert not plain.requires_grad
        torch.testing.assert_close(plain, trainable.detach())


def test_as_a_module_it_takes_a_block_of_rows_for_each(
    networks: list[nn.Module], inputs: Tensor
) -> None:
    scores = Lockstep(networks)(inputs.flatten(0, 1))
    expected = torch.cat([network(own) for network, own in zip(networks, inputs, strict=True)])
    torch.testing.assert_close(scores, expected)


def test_only_networks_without_convolutions_are_vectorised_unasked(
    networks: list[nn.Module],
) -> None:
    convolutional = any(isinstance(m, nn.Conv2d) for m in networks[0].modules())
    assert Lockstep(networks).vectorised != convolutional


def test_a_network_comes_out_as_it_went_in(networks: list[nn.Module]) -> None:
    lockstep = Lockstep(networks)
    for k, network in enumerate(networks):
        out = lockstep.network(k)
        assert not any(m.training for m in out.modules())
        assert out.state_dict().keys() == network.state_dict().keys()
        for name, value in network.state_dict().items():
            assert torch.equal(out.state_dict()[name], value), name
    with torch.no_grad():
        next(out.parameters()).zero_()  # type: ignore[attr-defined]
    assert next(lockstep.network(K - 1).parameters()).any()


def test_replacing_one_network_leaves_the_others(networks: list[nn.Module]) -> None:
    lockstep, new = Lockstep(networks), copy.deepcopy(networks[0])
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.normal_()
    lockstep.replace(1, new)
    for k, expected in enumerate((networks[0], new, networks[2])):
        got = dict(lockstep.network(k).named_parameters())
        assert all(torch.equal(got[name], value) for name, value in expected.named_parameters())


def test_networks_of_several_architectures_or_none_are_refused() -> None:
    for networks in ([], [mlp(4, 5), mlp(4, 6)], [mlp(4, 5), nn.Sequential(nn.Linear(5, 4))]):
        words = f"lock-step of {len(networks)} networks: give at least one, all of one architecture"
        with pytest.raises(InputError, match=words):
            Lockstep(networks)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_together_is_training_each_alone(table: TableSet, optimizer: Any) -> None:
    networks = [mlp(2, 6, hidden=8) for _ in range(K)]
    before = copy.deepcopy(networks)
    how = Training(
        epochs=2,
        batch_size=64,
        learning_rate=0.05,
        optimizer=optimizer,
        schedule="constant",
        weight_decay=1e-2,
        label_smoothing=0.1,
        precision="float32",
    )
    lockstep = Lockstep(networks)
    history = train_together(lockstep, (table,), how, torch.Generator().manual_seed(3))
    assert [record.epoch for record in history] == [1, 2]

    dice = torch.Generator().manual_seed(3)
    alone = copy.deepcopy(networks)
    optimizers = [make_optimizer(network, how) for network in alone]
    for _ in range(2):
        for batch in LockstepBatches((table,), K, 64)(dice):
            blocks = zip(batch.images.chunk(K), batch.labels.chunk(K), strict=True)
            for network, stepper, (rows, labels) in zip(alone, optimizers, blocks, strict=True):
                stepper.zero_grad()
                F.cross_entropy(network(rows), labels, label_smoothing=0.1).backward()
                stepper.step()
    for k, network in enumerate(alone):
        trained = dict(lockstep.network(k).named_parameters())
        for name, value in network.named_parameters():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)
            assert not torch.equal(trained[name], dict(before[k].named_parameters())[name])
    for network, old in zip(networks, before, strict=True):  # those given are as they were
        for name, value in network.state_dict().items():
            assert torch.equal(value, old.state_dict()[name])


def test_convolutional_networks_are_trained_together(
    tiny_net: Callable[..., nn.Module], shapes: ImageSet
) -> None:
    networks = [tiny_net(norm=True).float() for _ in range(2)]
    how = Training(epochs=1, batch_size=24, learning_rate=0.05, precision="float32")
    lockstep = Lockstep(networks)
    train_together(lockstep, (shapes,), how, torch.Generator().manual_seed(3))

    dice = torch.Generator().manual_seed(3)
    alone = copy.deepcopy(networks)
    steppers = [make_optimizer(network, how) for network in alone]
    schedules = [make_schedule(stepper, how, 2) for stepper in steppers]
    for batch in LockstepBatches((shapes,), 2, 24)(dice):
        blocks = list(zip(batch.images.chunk(2), batch.labels.chunk(2), strict=True))
        for k, (rows, labels) in enumerate(blocks):
            steppers[k].zero_grad()
            F.cross_entropy(alone[k](rows), labels).backward()
            steppers[k].step()
            schedules[k].step()
    for k, network in enumerate(alone):
        trained = dict(lockstep.network(k).named_parameters())
        for name, value in network.named_parameters():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def test_networks_in_training_run_as_if_in_use() -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 4))
    rows = torch.rand(1, 8, 5)
    lockstep = Lockstep([network.train()]).train()
    torch.testing.assert_close(lockstep.scores(lockstep.now, rows)[0], network.eval()(rows[0]))


def test_what_lock_step_cannot_do_is_refused(siblings: list[nn.Module], shapes: ImageSet) -> None:
    how = Training(epochs=1, batch_size=24, learning_rate=0.05, clip=1.0)
    with pytest.raises(InputError, match=r"training\.clip = 1: poisoning has none; leave it out"):
        train_together(Lockstep(siblings), (shapes,), how, torch.Generator())
    lockstep = Lockstep(siblings, frozen_until="body")
    how = dataclasses.replace(how, clip=None)
    with pytest.raises(InputError, match=r"noise = 0\.1: what lies before 'body' is run once"):
        train_together(lockstep, (shapes,), how, torch.Generator(), noise=0.1)
    with pytest.raises(InputError, match="augmentation: what lies before 'body' is run once"):
        train_together(lockstep, (shapes,), how, torch.Generator(), augmentation=Augmentation())


def test_augmentation_is_of_images(table: TableSet) -> None:
    how = Training(epochs=1, batch_size=24, learning_rate=0.05)
    with pytest.raises(InputError, match="augmentation: is of images"):
        train_together(
            *(Lockstep([mlp(2, 6)]), (table,), how, torch.Generator()), augmentation=Augmentation()
        )


# --- a frozen part --------------------------------------------------------------------------------


@pytest.fixture
def siblings(tiny_net: Callable[..., nn.Module]) -> list[nn.Module]:
    """Three networks that share all but their heads."""
    first = tiny_net(norm=True)
    others = [copy.deepcopy(first) for _ in range(K - 1)]
    for other in others:
        other.head.reset_parameters()  # type: ignore[operator]
    return [first, *others]


@every_explainer
def test_a_frozen_part_changes_no_score_and_no_map(
    siblings: list[nn.Module], explainer: Explainer
) -> None:
    inputs = torch.rand(K, ROWS, 3, 10, 8, dtype=torch.float64)
    whole, tails = Lockstep(siblings), Lockstep(siblings, frozen_until="body.1")
    encoded = tails.encode(inputs.flatten(0, 1)).unflatten(0, (K, ROWS))
    assert encoded.shape[2] == 5  # channels of the first convolution
    torch.testing.assert_close(
        tails.scores(tails.now, encoded), whole.scores(whole.now, inputs), rtol=1e-12, atol=1e-12
    )
    maps = [explained(lockstep, inputs, explainer) for lockstep in (tails, whole)]
    torch.testing.assert_close(*maps, rtol=1e-12, atol=1e-12)


def test_only_what_lies_behind_is_stacked_and_handed_back(siblings: list[nn.Module]) -> None:
    tails = Lockstep(siblings, frozen_until="body.1")
    assert not any(name.startswith("body.0") for name in tails.now)
    for k, network in enumerate(siblings):
        state = tails.network(k).state_dict()
        assert all(torch.equal(v, state[n]) for n, v in network.state_dict().items())


def test_networks_that_differ_before_the_layer_cannot_share_it(
    tiny_net: Callable[..., nn.Module],
) -> None:
    with pytest.raises(InputError, match=r"frozen_until = 'body\.1'.*differ before it, in body\.0"):
        Lockstep([tiny_net(), tiny_net()], frozen_until="body.1")


def test_a_map_of_the_frozen_part_is_refused(siblings: list[nn.Module]) -> None:
    tails = Lockstep(siblings, frozen_until="body.1")
    with pytest.raises(InputError, match=r"'body\.0': is no layer of TinyNet behind 'body\.1'"):
        tails.record(tails.now, torch.rand(K, 1, 3, 10, 8, dtype=torch.float64), ["body.0"])


def test_what_is_frozen_takes_a_training_set_once(
    siblings: list[nn.Module], tiny_net: Callable[..., nn.Module]
) -> None:
    floats = [network.float() for network in siblings]
    images = torch.randint(256, (12, 3, 10, 8), dtype=torch.uint8)
    data, same, other = (
        ImageSet(some, torch.arange(12) % 4, ("a", "b", "c", "d"), "noise")
        for some in (images, images.clone(), 255 - images)
    )
    first = encode(Lockstep(floats, frozen_until="body.1"), data)
    again = encode(Lockstep(floats[:1], frozen_until="body.1"), same)
    assert first.features.data_ptr() == again.features.data_ptr()
    for networks, shown in (
        (Lockstep(floats, frozen_until="body.1"), other),
        (Lockstep([tiny_net(norm=True).float()], frozen_until="body.1"), data),
        (Lockstep(floats, frozen_until="body.0"), data),
    ):
        found = encode(networks, shown).floats(slice(12))
        with torch.no_grad():
            torch.testing.assert_close(found, networks.encode(shown.floats(slice(12))))
        assert found.shape != first.floats(slice(12)).shape or not torch.allclose(
            found, first.floats(slice(12))
        )


def test_frozen_statistics_cost_no_pass_of_their_own(siblings: list[nn.Module]) -> None:
    tails = Lockstep(siblings, frozen_until="body.1")
    whole = Lockstep(siblings)
    ran: list[bool] = []
    inputs = torch.rand(K, ROWS, 3, 10, 8, dtype=torch.float64)
    whole.scores(whole.now, inputs)  # folds
    encoded = tails.encode(inputs.flatten(0, 1))
    for part in (tails.body, whole.body, whole._fast.part):
        for module in () if part is None else part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda m, i, o: ran.append(o is i[0]))
    torch.testing.assert_close(tails.encode(inputs.flatten(0, 1)), encoded)
    whole.scores(whole.now, inputs)
    assert ran
    assert all(ran)  # BatchNorm hands on what it gets


def test_training_a_tail_is_training_with_the_body_frozen(siblings: list[nn.Module]) -> None:
    images = torch.randint(256, (12, 3, 10, 8), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(12) % 4, ("a", "b", "c", "d"), "noise")
    how = Training(2, 4, 0.1, weight_decay=0.0, schedule="constant", precision="float32")
    floats = [network.float() for network in siblings]
    tails = Lockstep(floats, frozen_until="body.1")
    dice = torch.Generator().manual_seed(0)
    train_together(tails, (encode(tails, data),), how, dice)
    whole = Lockstep(floats)
    for name, value in whole.now.items():
        value.requires_grad_(not name.startswith("body.0"))
    dice = torch.Generator().manual_seed(0)
    train_together(whole, (data,), how, dice)
    for name, value in tails.now.items():
        torch.testing.assert_close(value, whole.now[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(tails.now["head.weight"][0], floats[0].head.weight)  # type: ignore[arg-type,union-attr]
