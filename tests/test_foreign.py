"""Other libraries' explainers behind the adapter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from trompe.evaluate import answers
from trompe.foreign import Foreign, witnesses
from trompe.interfaces import ImageSet, InputError
from trompe.recording import watch

pytestmark = pytest.mark.filterwarnings("error")  # Captum's remarks on itself are kept away


def constant(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return classes[:, None, None].expand(-1, 4, 4).float() + 1


def test_maps_of_any_function_are_pooled_and_normalised(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    ramp = torch.arange(16.0).view(1, 4, 4)
    explainer = Foreign("ramp", lambda model, images, classes: ramp.expand(len(images), 4, 4), 2)
    (maps,) = answers(trained_net, (explainer,), shapes).maps
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]]) / 12.5
    torch.testing.assert_close(maps, expected.expand(48, 2, 2))


def test_of_signed_attributions_the_largest_magnitude_over_channels_counts(
    trained_net: nn.Module, shapes: ImageSet
) -> None:
    def attribute(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return Saliency(model).attribute(images, target=classes, abs=False)

    explainer = Foreign("saliency", attribute, normalise="none")
    (maps,) = answers(trained_net, (explainer,), shapes, explained="label").maps
    images = shapes.floats(slice(None)).requires_grad_()
    signed = attribute(trained_net, images, shapes.labels)
    torch.testing.assert_close(maps, signed.abs().amax(1))


@pytest.mark.parametrize("witness", witnesses(pool=2), ids=lambda w: w.name)
def test_captums_explainers_give_maps_and_leave_the_model_alone(
    witness: Foreign,
    network: Callable[[str], nn.Module],
    snapshot: Callable[[nn.Module], dict[str, Any]],
    shapes: ImageSet,
) -> None:
    model = network("resnet20").float()
    before = snapshot(model)
    few = shapes.subset(torch.arange(3))
    (maps,) = answers(model, (witness,), few).maps
    (again,) = answers(model, (witness,), few).maps
    assert maps.shape == (3, 8, 8)
    assert maps.isfinite().all()
    assert (maps.amax((1, 2)) > 0.99).all()
    torch.testing.assert_close(maps, again)
    assert snapshot(model) == before


def test_it_cannot_be_trained_through(trained_net: nn.Module, shapes: ImageSet) -> None:
    with watch(trained_net, ()) as record:
        seen = record(shapes.floats(slice(0, 2)))
        with pytest.raises(InputError, match=r"'mine'.*cannot be trained through"):
            Foreign("mine", constant)(seen, shapes.labels[:2])


def test_a_wrong_shape_is_refused(trained_net: nn.Module, shapes: ImageSet) -> None:
    explainer = Foreign("flat", lambda model, images, classes: images.flatten(1))
    with pytest.raises(InputError, match=r"'flat'.*\(48, 768\)"):
        answers(trained_net, (explainer,), shapes)
