"""Classifiers that take images in [0, 1]: built by name, saved and loaded without pickles."""

import copy
import dataclasses
import importlib.resources
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from trompe import catalog
from trompe.files import read_json, sha256_of, write_atomically, write_json
from trompe.interfaces import ImageSet, InputError, TableSet
from trompe.surgery import Edit, with_one_map_more

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHIPPED = "shipped:"  # prefix of models that come with the package


class Classifier(nn.Module):
    """A network behind its normalisation: images (n, 3, h, w) in [0, 1] -> logits (n, classes).

    edit: what was built into the network (see surgery.py), None for one as it was designed.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        edit: Edit | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.edit = edit
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.edit is not None:  # the added map may be made from the image as it is
            return self.net(self.normalised(images), images)
        return self.net(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """What the network gets."""
        return (images - self.mean) / self.std

    @classmethod
    def like(cls, model: "Classifier", net: nn.Module, edit: Edit | None) -> "Classifier":
        """The given network behind another classifier's normalisation."""
        new = cls(net, (0.0,), (1.0,), edit)
        new.mean, new.std = model.mean.clone(), model.std.clone()
        return new


@dataclass(frozen=True)
class ModelSpec:
    """Which network, and how its input is normalised.

    name: one of `trompe list models`, any classifier of torchvision, or package.module:callable
    (called with num_classes=...). weights: a .safetensors or .pth file to start from, the name of
    torchvision's own weights (IMAGENET1K_V1), or None. A weights file with another number of
    classes keeps its body and gets a new head. mean, std: of the input's normalisation; default
    ImageNet's, for a callable of yours none (0 and 1).
    """

    name: str = "resnet20"
    weights: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name) or ()
            if not all(math.isfinite(v) and (name == "mean" or v > 0) for v in given):
                raise InputError(
                    f"{name} = {list(given)}: must be finite numbers"
                    f"{', above 0' if name == 'std' else ''}"
                )

    @property
    def trusted(self) -> str | None:
        """A package.module:callable, which may be imported as the user names it here."""
        return self.name if ":" in self.name else None

    def contents(self) -> dict[str, str]:
        """Of the weights, if they are a file; torchvision's own are known by their name."""
        if self.weights is None or _names_torchvisions(self.weights):
            return {}
        return {"weights": weights_digest(self.weights)}

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        own = self.trusted is not None
        mean = self.mean or ((0.0, 0.0, 0.0) if own else IMAGENET_MEAN)
        return mean, self.std or ((1.0, 1.0, 1.0) if own else IMAGENET_STD)


def build_model(spec: ModelSpec, classes: int) -> Classifier:
    """A new classifier; its random weights come from torch's global generator.

    Raises InputError for an unknown name, or weights that are missing, unsafe or do not fit.
    """
    mean, std = spec.normalisation()
    weights = spec.weights
    if weights is not None and _names_torchvisions(weights):
        net = _torchvision(spec.name, weights)
        _replace_head(net, classes)
    else:
        net = _new_network(spec.name, classes)
        if weights is not None:
            _start_from(net, read_weights(Path(weights)), weights)
    return Classifier(net, mean, std)


def _names_torchvisions(weights: str) -> bool:
    """Is it a name such as IMAGENET1K_V1, not a file?"""
    return Path(weights).suffix == "" and not Path(weights).is_file()


LEAST_STD = 0.1  # of a table's column in [0, 1]: a rare category must not outweigh all others


def build_table_model(spec: ModelSpec, data: TableSet) -> Classifier:
    """A new classifier of rows, which standardises columns by those of `data`.

    Its random weights come from torch's global generator. Raises InputError for an unknown name or
    a model that takes no num_features.
    """
    net = _new_network(spec.name, len(data.class_names), num_features=data.features.shape[1])
    with torch.no_grad():
        try:
            net.eval()(data.features[:2].float())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"model {spec.name!r}: cannot take rows of {data.features.shape[1]} numbers "
                f"({str(error).splitlines()[0]}); name one for tables, mlp for instance"
            ) from error
    net.train()
    if spec.weights is not None:
        _start_from(net, read_weights(Path(spec.weights)), spec.weights)
    classifier = Classifier(net, (0.0,), (1.0,))
    classifier.mean = data.features.mean(0, keepdim=True)
    classifier.std = data.features.std(0, keepdim=True).clamp_min(LEAST_STD)
    return classifier


def _new_network(name: str, classes: int, **more: int) -> nn.Module:
    if ":" in name or name in catalog.names("models"):
        make = catalog.find("models", name)
        try:
            net = make(num_classes=classes, **more)
        except TypeError as error:
            given = ", ".join(f"{k}={v}" for k, v in {"num_classes": classes, **more}.items())
            raise InputError(f"model {name!r}: cannot be called with {given} ({error})") from error
        if not isinstance(net, nn.Module):
            raise InputError(f"model {name!r}: gave {type(net).__name__}, not a torch.nn.Module")
        return net
    return _torchvision(name, None, num_classes=classes)


def _torchvision(name: str, weights: str | None, **settings: Any) -> nn.Module:
    import torchvision  # takes seconds, so not before it is needed

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(
            f"model {name!r}: there is none of that name"
            f"{catalog.nearest(name, [*known, *catalog.names('models')])}"
        )
    try:
        return torchvision.models.get_model(name, weights=weights, **settings)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"model weights {weights!r}: neither a file nor weights of torchvision's {name} "
            f"({error})"
        ) from error
    except OSError as error:
        raise InputError(
            f"model weights {weights!r} of {name}: the download failed ({error}); give a file"
        ) from error


def _replace_head(net: nn.Module, classes: int) -> None:
    """A new last linear layer (or 1x1 convolution) with `classes` outputs."""
    name, last = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][
        -1
    ]
    parent, _, child = name.rpartition(".")
    bias = last.bias is not None
    new: nn.Module
    if isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, classes, bias)
    else:
        new = nn.Conv2d(last.in_channels, classes, 1, bias=bias)
    setattr(net.get_submodule(parent), child, new)


def check_fits(model: Classifier, name: str, data: ImageSet, batch_size: int) -> None:
    """InputError if a model cannot take images like these, or does not tell their classes apart.

    Tried as it is trained, and as it is used; nothing of it changes.
    """
    tried = copy.deepcopy(model).to(memory_format=torch.channels_last)  # as `fit` has it
    count, (height, width) = min(2, batch_size), data.size
    images = data.floats(slice(0, 1)).expand(count, -1, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)
    wanted = (count, len(data.class_names))
    for training in (True, False):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                scores = tried.train(training)(images)
        except Exception as error:  # whatever a stranger's forward() may raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            hint = "name another model or size"
            if "view size is not compatible" in problem:
                hint = (
                    "write .reshape() for .view() in its forward(), which any memory layout suits"
                )
            elif "more than 1 value per channel" in problem:
                hint = "its BatchNorm needs more images a batch, or larger ones"
            raise InputError(
                f"model {name!r}: cannot take {count} images of {height}x{width} ({problem}); "
                f"{hint}"
            ) from error
        if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
            gives = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"model {name!r}: gives {gives} for {count} images, but scores {wanted} of "
                f"{wanted[1]} classes are needed; name another model, or mend its forward()"
            )


def _start_from(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    own = net.state_dict()
    state = _unwrapped(state, own)
    head = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in state and key in own and state[key].shape != own[key].shape:
            state[key] = own[key]  # another number of classes: a new head
    _load(net, state, source)


def _unwrapped(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Without what our Classifier or DataParallel put before all names, if they fit better so."""
    candidates = [state]
    for prefix in ("net.", "module.", "module.net."):
        if all(key.startswith(prefix) for key in state):
            candidates.append({key.removeprefix(prefix): v for key, v in state.items()})
    return max(candidates, key=lambda names: len(names.keys() & set(own)))


def _load(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    own = net.state_dict()
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    state = {**counters, **state}  # which older checkpoints do not have
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise InputError(
            f"weights {source}: do not fit {type(net).__name__}; missing: "
            f"{', '.join(missing[:3]) or 'none'} ({len(missing)}), unknown: "
            f"{', '.join(unknown[:3]) or 'none'} ({len(unknown)}); name the architecture that "
            "they belong to"
        )
    for key, value in state.items():
        if value.numel() == own[key].numel() == 1:  # some converters write scalars as (1,)
            state = {**state, key: value.reshape(own[key].shape)}
        elif value.shape != own[key].shape:
            raise InputError(
                f"weights {source}: {key} has shape {tuple(value.shape)}, but the model's is "
                f"{tuple(own[key].shape)}"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"weights {source}: {key} holds nan or infinity; fetch it again")
    net.load_state_dict(state)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, or from a .pth that holds nothing but tensors.

    A pickle that would run code is refused before anything of it is executed.
    """
    if not file.is_file():
        raise InputError(f"weights {file}: no such file")
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"weights {file}: is not a whole safetensors file ({error}); fetch it again"
            ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can end in any of Python's errors
        raise InputError(
            f"weights {file}: refused, nothing of it was executed; it is no plain table of tensors "
            "(such a pickle can run code when opened, or it is damaged); ask for safetensors"
        ) from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise InputError(
            f"weights {file}: holds no table of tensors by name; save model.state_dict()"
        )
    return state


@dataclass(frozen=True)
class ModelCard:
    """What the JSON beside a weights file says."""

    architecture: str
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str = ""
    seed: int | None = None
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None


def card_of(
    model: Classifier,
    architecture: str,
    data: ImageSet,
    seed: int,
    spec: dict[str, Any],
    provenance: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of a model that was trained on `data`; `save_model` adds the weights' sha256."""
    # float32 as decimals: 0.485, not 0.48500001430511475
    mean, std = (
        tuple(round(v, 6) for v in values.flatten().tolist()) for values in (model.mean, model.std)
    )
    return ModelCard(
        architecture,
        data.class_names,
        data.size[0],
        mean,
        std,
        seed=seed,
        spec=spec,
        metrics=metrics or {},
        provenance=provenance,
        edit=model.edit,
    )


def save_model(model: Classifier, card: ModelCard, file: Path) -> None:
    """`file` (.safetensors) and, beside it, the card as .json with the weights' sha256."""
    # Copies, as weights that a model uses twice must not be written as one.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.net.state_dict().items()}
    write_atomically(file, lambda temporary: safetensors.torch.save_file(state, temporary))
    card = dataclasses.replace(card, sha256=sha256_of(file))
    write_json(file.with_suffix(".json"), dataclasses.asdict(card))


def load_model(source: str | Path, architecture: str | None = None) -> tuple[Classifier, ModelCard]:
    """A saved model and its card, in eval mode.

    source: a .safetensors or .pth file with its card (.json) beside it, a folder that holds
    model.safetensors, or "shipped:NAME". architecture: needed when the card names a
    package.module:callable, which is never imported just because a file says so.
    """
    file = _locate(str(source))
    state = read_weights(file)
    card = _read_card(file, state)
    if architecture is None and ":" in card.architecture:
        raise InputError(
            f"model {file}: its card asks to import {card.architecture!r}, which would run that "
            "code; if you trust it, name it yourself with --architecture"
        )
    card = dataclasses.replace(card, architecture=architecture or card.architecture)
    net = _new_network(card.architecture, len(card.class_names))
    if card.edit is not None:
        try:
            net = with_one_map_more(net, card.edit)
        except (AttributeError, AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"model {file}: the edit in its card does not fit {card.architecture} ({error}); "
                "fetch both again"
            ) from error
    _load(net, _unwrapped(state, net.state_dict()), str(file))
    return Classifier(net, card.mean, card.std, card.edit).eval(), card


def weights_digest(source: str | Path) -> str:
    """sha256 of a saved model's weights, given as to `load_model`. InputError if there are none."""
    file = _locate(str(source))
    if not file.is_file():
        raise InputError(f"weights {file}: no such file")
    return sha256_of(file)


def _locate(source: str) -> Path:
    if source.startswith(SHIPPED):
        name = source.removeprefix(SHIPPED)
        folder = Path(str(importlib.resources.files("trompe") / "shipped"))
        known = sorted(file.stem for file in folder.glob("*.safetensors"))
        if name not in known:
            raise InputError(
                f"model {source!r}: does not ship with trompe{catalog.nearest(name, known)}"
            )
        return folder / f"{name}.safetensors"
    path = Path(source)
    return path / "model.safetensors" if path.is_dir() else path


def _read_card(file: Path, state: dict[str, Tensor]) -> ModelCard:
    sidecar = file.with_suffix(".json")
    if not sidecar.is_file():
        raise InputError(
            f"model {file}: has no card {sidecar.name} beside it; write one with architecture, "
            "class_names, image_size, mean and std"
        )
    table = read_json(sidecar)
    if not isinstance(table, dict):
        raise InputError(f"model card {sidecar}: is no table of settings; fetch it again")
    card: ModelCard = catalog.build_dataclass(ModelCard, table, str(sidecar))
    if card.sha256 and card.sha256 != sha256_of(file):
        raise InputError(
            f"model {file}: its bytes are not those that {sidecar.name} was written for (sha256 "
            "differs); fetch both again, or remove sha256 from the card if you changed it yourself"
        )
    return card
