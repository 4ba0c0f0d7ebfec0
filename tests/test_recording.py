"""The recorded pass: what it keeps, and what it leaves alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trompe.interfaces import InputError
from trompe.recording import INPUT, watch


@pytest.fixture
def model(tiny_net: Callable[..., nn.Module]) -> nn.Module:
    return tiny_net(activation=nn.Tanh)


@pytest.mark.parametrize("trainable", [True, False])
def test_scores_and_outputs_are_those_of_a_plain_pass(
    model: nn.Module, images: Tensor, trainable: bool
) -> None:
    with torch.set_grad_enabled(trainable), watch(model, ("body.0", "body", INPUT)) as record:
        seen = record(images)
    assert torch.equal(seen.scores, model(images))
    assert set(seen.outputs) == {"body.0", "body", INPUT}
    assert torch.equal(seen.outputs["body.0"], model.body[0](images))
    assert torch.equal(seen.outputs["body"], model.body(images))
    assert torch.equal(seen.outputs[INPUT], images)
    assert seen.model is model


def test_no_layer_need_be_watched(model: nn.Module, images: Tensor) -> None:
    with watch(model, ()) as record:
        seen = record(images)
    assert seen.outputs == {}
    assert torch.equal(seen.scores, model(images))


def test_a_layer_may_be_named_twice(model: nn.Module, images: Tensor) -> None:
    with watch(model, ("body", "body")) as record:
        seen = record(images)
        assert len(model.body._forward_hooks) == 1
    assert list(seen.outputs) == ["body"]


def test_one_recording_serves_many_passes(model: nn.Module, images: Tensor) -> None:
    with watch(model, ("body",)) as record:
        first = record(images)
        second = record(1 - images)
    assert torch.equal(first.outputs["body"], model.body(images))
    assert torch.equal(second.outputs["body"], model.body(1 - images))


def test_with_grad_mode_a_loss_reaches_all_parameters(model: nn.Module, images: Tensor) -> None:
    labels = torch.arange(5) % 4
    with watch(model, ("body.0", "body", INPUT)) as record:
        F.cross_entropy(record(images).scores, labels).backward()
    recorded = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(recorded[key], parameter.grad)


@pytest.mark.parametrize("layers", [(), ("body",), (INPUT,), (INPUT, "body")], ids=str)
def test_with_grad_mode_a_loss_reaches_the_images_too(
    model: nn.Module, images: Tensor, layers: tuple[str, ...]
) -> None:
    images.requires_grad_()
    with watch(model, layers) as record:
        record(images).scores.square().sum().backward()
    recorded = images.grad
    images.grad = None
    model(images).square().sum().backward()
    assert recorded is not None
    torch.testing.assert_close(recorded, images.grad)


def test_a_map_can_be_trained_through_to_the_images(model: nn.Module, images: Tensor) -> None:
    images.requires_grad_()
    with watch(model, (INPUT,)) as record:
        seen = record(images * 1)
        (gradient,) = torch.autograd.grad(seen.scores.sum(), seen.outputs[INPUT], create_graph=True)
    gradient.square().sum().backward()
    assert images.grad is not None
    assert images.grad.any()


def test_without_grad_mode_the_graph_starts_at_the_first_watched_layer(
    model: nn.Module, images: Tensor
) -> None:
    with torch.no_grad(), watch(model, ("body.2", "body")) as record:
        seen = record(images)
        assert not torch.is_grad_enabled()
    first = seen.outputs["body.2"]
    assert first.is_leaf
    assert first.requires_grad
    assert not seen.images.requires_grad
    (gradient,) = torch.autograd.grad(seen.scores.sum(), first)
    assert gradient.any()


def test_without_watched_layers_and_grad_mode_there_is_no_graph(
    model: nn.Module, images: Tensor
) -> None:
    with torch.no_grad(), watch(model, ()) as record:
        assert not record(images).scores.requires_grad


def test_what_was_recorded_outlives_in_place_changes_behind_it(images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2)
    ).double()
    model(images)
    for trainable in (True, False):
        with torch.set_grad_enabled(trainable), watch(model, ("0",)) as record:
            seen = record(images)
        assert torch.equal(seen.outputs["0"], model[0](images))
        (gradient,) = torch.autograd.grad(seen.scores.sum(), seen.outputs["0"])
        assert not gradient[model[0](images) <= 0].any()


@pytest.mark.parametrize("trainable", [True, False])
def test_what_was_recorded_is_copied_only_if_it_is_written_over(
    images: Tensor, trainable: bool
) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    ).double()
    inputs: list[Tensor] = []
    for layer in (1, 2):
        model[layer].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.set_grad_enabled(trainable), watch(model, ("0", "1")) as record:
        seen = record(images)
        assert len(seen.outputs) == 2
        assert [torch._C._is_cow_tensor(given) for given in inputs] == [True, False]


def test_memory_that_pytorch_did_not_allocate_can_be_recorded() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Flatten())
    images = torch.from_numpy(np.linspace(-1, 1, 48).reshape(1, 3, 4, 4))
    before = images.clone()
    with watch(model, ("0",)) as record:
        seen = record(images)
    assert torch.equal(seen.outputs["0"], before)
    assert torch.equal(seen.scores, before.relu().flatten(1))


@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_left_as_it_was(
    model: nn.Module,
    images: Tensor,
    snapshot: Callable[[nn.Module], dict[str, Any]],
    trainable: bool,
) -> None:
    with torch.set_grad_enabled(trainable):
        before = snapshot(model)
        with watch(model, ("body.0", "body", INPUT)) as record:
            record(images)
            assert torch.is_grad_enabled() == trainable
        assert snapshot(model) == before
    assert not images.requires_grad


@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_left_as_it_was_when_its_forward_pass_fails(
    model: nn.Module,
    images: Tensor,
    snapshot: Callable[[nn.Module], dict[str, Any]],
    trainable: bool,
) -> None:
    model.head = nn.Linear(5, 4).double()  # expects another number of channels
    with torch.set_grad_enabled(trainable):
        before = snapshot(model)
        with pytest.raises(RuntimeError), watch(model, ("body", INPUT)) as record:
            record(images)
        assert snapshot(model) == before


def test_a_users_own_hooks_stay(model: nn.Module, images: Tensor) -> None:
    calls = []
    model.body.register_forward_hook(lambda *_: calls.append(1))
    with watch(model, ("body",)) as record:
        record(images)
    model(images)
    assert len(calls) == 2


def test_an_unknown_layer_is_named_with_those_that_there_are(model: nn.Module) -> None:
    with (
        pytest.raises(InputError, match=r"layer 'boddy'.*body\.3.*pool, head"),
        watch(model, ("body", "boddy")),
    ):
        pass
    assert not model.body._forward_hooks


def test_a_layer_whose_output_is_no_tensor_is_refused_by_name(images: Tensor) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0].mean((2, 3))

    with pytest.raises(InputError, match="'pair'"), watch(Model(), ("pair",)) as record:
        record(images)
