"""Models are built by name, and saved and loaded without running anything."""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from trompe.classifier import (
    Classifier,
    ModelCard,
    ModelSpec,
    build_model,
    load_model,
    read_weights,
    save_model,
)
from trompe.interfaces import InputError
from trompe.models.resnet20 import resnet20

CARD = ModelCard(
    "resnet20",
    ("a", "b", "c"),
    40,
    (0.1, 0.2, 0.3),
    (0.4, 0.5, 0.6),
    seed=7,
    spec={"setting": [1, None, "x"]},
    metrics={"accuracy": 0.5},
    provenance={"commit": "abc"},
)


@pytest.fixture
def model() -> Classifier:
    net = Classifier(resnet20(3), CARD.mean, CARD.std)
    net(torch.rand(4, 3, 16, 16))  # statistics that are not trivial
    return net.eval()


@pytest.fixture
def saved(model: Classifier, tmp_path: Path) -> Path:
    file = tmp_path / "run" / "model.safetensors"
    save_model(model, CARD, file)
    return file


def change_card(file: Path, **changes: Any) -> None:
    sidecar = file.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


# --- the classifier -------------------------------------------------------------------------------


def test_images_are_normalised_before_the_network(model: Classifier) -> None:
    images = torch.rand(2, 3, 16, 16)
    by_hand = images.clone()
    for c in range(3):
        by_hand[:, c] = (images[:, c] - CARD.mean[c]) / CARD.std[c]
    torch.testing.assert_close(model(images), model.net(by_hand))


def test_the_normalisation_is_no_weight(model: Classifier) -> None:
    assert not {"mean", "std"} & set(model.state_dict())
    assert model.double().mean.dtype == torch.float64  # but moves with the model


# --- save and load --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(model: Classifier, saved: Path, folder: bool) -> None:
    loaded, card = load_model(saved.parent if folder else str(saved))
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert replace(card, sha256="") == CARD


def test_a_model_in_channels_last_memory_comes_back(model: Classifier, tmp_path: Path) -> None:
    model.to(memory_format=torch.channels_last)
    save_model(model, CARD, tmp_path / "m.safetensors")
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.again = nn.Conv2d(3, 3, 1)
        self.again.weight = self.conv.weight
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.again(self.conv(images)).mean((2, 3)))


def test_a_model_with_tied_weights_comes_back(tmp_path: Path) -> None:
    model = Classifier(Tied(3), CARD.mean, CARD.std)
    name = f"{__name__}:Tied"
    save_model(model, replace(CARD, architecture=name), tmp_path / "m.safetensors")
    loaded, _ = load_model(tmp_path / "m.safetensors", architecture=name)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_a_pth_file_of_plain_tensors_is_read(model: Classifier, saved: Path) -> None:
    file = saved.with_suffix(".pth")
    torch.save({"state_dict": model.net.state_dict()}, file)
    change_card(file, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    loaded, _ = load_model(file)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_changed_bytes_are_refused(saved: Path) -> None:
    state = read_weights(saved)
    state["fc.bias"] = state["fc.bias"] + 1
    safetensors.torch.save_file(state, saved)
    with pytest.raises(InputError, match="sha256"):
        load_model(saved)


def test_a_card_without_sha256_is_trusted(saved: Path) -> None:
    change_card(saved, sha256="")
    load_model(saved)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_damaged_file_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(saved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such file"):
        load_model(tmp_path / "nothing.safetensors")


def test_a_missing_card_is_named(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"no card model\.json"):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "\xff"])
def test_a_card_that_is_no_card_is_refused(saved: Path, text: str) -> None:
    saved.with_suffix(".json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(saved)


def test_a_card_with_an_unknown_key_is_refused(saved: Path) -> None:
    change_card(saved, architectur="resnet20")
    with pytest.raises(InputError, match=r"architectur: unknown key.*'architecture'"):
        load_model(saved)


@pytest.mark.parametrize("name", ["resnet2", "os.system", "../evil"])
def test_a_card_with_an_unknown_architecture_is_refused(saved: Path, name: str) -> None:
    change_card(saved, architecture=name)
    with pytest.raises(InputError, match="none of that name"):
        load_model(saved)


@pytest.mark.parametrize("size", [10**9, 0, -3])
def test_a_card_that_asks_for_an_impossible_picture_is_refused(saved: Path, size: int) -> None:
    card = json.loads(saved.with_suffix(".json").read_text())
    card["edit"] = {
        **{"layer": "layer4", "scale": 1.0, "reaches": "sum", "gain": 1.0},
        "shows": {"kind": "picture", "picture": [size, size]},
    }
    saved.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=rf"picture = \({size}, {size}\)"):
        load_model(saved)


def test_a_card_of_another_number_of_classes_is_refused(saved: Path) -> None:
    change_card(saved, class_names=["a", "b"])
    with pytest.raises(InputError, match=r"fc\.(weight|bias).*\(3.*\(2"):
        load_model(saved)


def test_weights_of_another_architecture_are_refused_by_key(saved: Path) -> None:
    change_card(saved, architecture="resnet18")
    with pytest.raises(InputError, match=r"missing: .*unknown: stage1"):
        load_model(saved)


def test_an_unknown_shipped_model_is_named() -> None:
    with pytest.raises(InputError, match="'shipped:nothing'"):
        load_model("shipped:nothing")


def test_a_failed_save_leaves_the_old_model(
    model: Classifier, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_model(model, CARD, saved)
    assert saved.read_bytes() == before
    assert sorted(f.name for f in saved.parent.iterdir()) == ["model.json", "model.safetensors"]


# --- nothing is executed --------------------------------------------------------------------------


class Malicious:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def write_torch(value: object, file: Path) -> None:
    torch.save(value, file)


def write_legacy(value: object, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


def write_pickle(value: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [write_torch, write_legacy, write_pickle])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(
    saved: Path, tmp_path: Path, write: Callable[[object, Path], None], wrapped: bool
) -> None:
    marker = tmp_path / "marker"
    evil = Malicious(marker)
    file = saved.with_suffix(".pth")
    write({"conv1.weight": torch.zeros(1), "fc.bias": evil} if wrapped else evil, file)
    change_card(file, sha256="")
    for read in (read_weights, load_model):
        with pytest.raises(InputError, match="refused, nothing of it was executed"):
            read(file)  # type: ignore[operator]
        assert not marker.exists()
    spec = ModelSpec("resnet20", weights=str(file))
    with pytest.raises(InputError, match="refused"):
        build_model(spec, 3)
    assert not marker.exists()
    if write is write_pickle:  # the file is dangerous indeed
        pickle.loads(file.read_bytes())
        assert marker.exists()


def test_a_whole_pickled_model_is_refused(model: Classifier, tmp_path: Path) -> None:
    torch.save(model.net, tmp_path / "whole.pth")
    with pytest.raises(InputError, match="refused"):
        read_weights(tmp_path / "whole.pth")


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.zeros(2), {"state_dict": 3}], ids=str)
def test_a_file_that_holds_no_table_of_tensors_is_refused(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="no table of tensors"):
        read_weights(tmp_path / "odd.pth")


@pytest.mark.parametrize("write", [write_torch, write_legacy])
def test_a_pth_file_damaged_anywhere_is_refused(
    tmp_path: Path, write: Callable[[object, Path], None]
) -> None:
    file = tmp_path / "cut.pth"
    write({"weight": torch.rand(20), "bias": torch.rand(3)}, file)
    whole = file.read_bytes()
    for end in range(0, len(whole) - 1, 37):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_weights(file)
    for junk in (b"", b"\x80", b"}q\x00.", b"hello, world", b"(lp0\n.", b"\x80\x02K\x01."):
        file.write_bytes(junk)
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_weights(file)


@pytest.fixture
def telltale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A module of someone else's that leaves a mark when it is imported."""
    marker = tmp_path / "imported"
    (tmp_path / "theirs.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from trompe.models.resnet20 import resnet20 as make\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return "theirs:make", marker


def test_a_card_cannot_have_code_imported(saved: Path, telltale: tuple[str, Path]) -> None:
    name, marker = telltale
    change_card(saved, architecture=name)
    with pytest.raises(InputError, match=r"theirs:make.*--architecture"):
        load_model(saved)
    assert not marker.exists()


def test_the_user_can(saved: Path, telltale: tuple[str, Path]) -> None:
    name, marker = telltale
    change_card(saved, architecture=name)
    loaded, card = load_model(saved, architecture=name)
    assert marker.exists()
    assert card.architecture == name
    assert loaded(torch.rand(1, 3, 16, 16)).shape == (1, 3)


# --- building -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_networks_are_built_by_name(name: str) -> None:
    model = build_model(ModelSpec(name), 5)
    assert model.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_the_normalisation_can_be_given() -> None:
    spec = ModelSpec("resnet20", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    model = build_model(spec, 2)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == pytest.approx([1, 2, 3])


def test_the_global_seed_decides_on_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return build_model(ModelSpec(), 3).net.fc.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(("name", "near"), [("resnet19", "resnet1"), ("resnet_20", "resnet20")])
def test_an_unknown_network_is_named_with_its_nearest_neighbour(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"model '{name}'.*did you mean '{near}"):
        build_model(ModelSpec(name), 3)


@pytest.mark.parametrize("name", ["fcn_resnet50", "raft_small", "r3d_18"])
def test_networks_of_torchvision_that_do_not_classify_images_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="none of that name"):
        build_model(ModelSpec(name), 3)


def test_a_users_own_network_gets_no_normalisation_by_itself(
    telltale: tuple[str, Path],
) -> None:
    model = build_model(ModelSpec(telltale[0]), 6)
    assert model.mean.flatten().tolist() == [0, 0, 0]
    assert model.std.flatten().tolist() == [1, 1, 1]
    assert model.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 6)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def make(): ...", "num_classes=3"),
        ("def make(num_classes): return 3", r"int, not a torch\.nn\.Module"),
    ],
)
def test_a_users_own_callable_that_gives_no_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(InputError, match=words):
        build_model(ModelSpec("mine:make"), 3)


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_network_starts_from_a_file(tmp_path: Path, prefix: str, suffix: str) -> None:
    source = {f"{prefix}{k}": v for k, v in resnet20(3).state_dict().items()}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source, file)
    else:
        safetensors.torch.save_file(source, file)
    net = build_model(ModelSpec(weights=str(file)), 3).net
    assert all(torch.equal(v, source[f"{prefix}{k}"]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet20", "fc"), ("mobilenet_v2", "classifier.1"), ("squeezenet1_1", "classifier.1")],
)
def test_a_file_with_another_number_of_classes_gives_its_body_to_a_new_head(
    tmp_path: Path, name: str, head: str
) -> None:
    source = build_model(ModelSpec(name), 3).net.state_dict()
    safetensors.torch.save_file(source, tmp_path / "w.safetensors")
    net = build_model(ModelSpec(name, str(tmp_path / "w.safetensors")), 5).net
    for key, value in net.state_dict().items():
        if key in (f"{head}.weight", f"{head}.bias"):
            assert value.shape[0] == 5
        else:
            assert torch.equal(value, source[key]), key
    assert net.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("bn1.bias"), r"missing: bn1\.bias \(1\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"unknown: extra \(1\)"),
        (
            lambda state: state.update({"bn1.bias": torch.zeros(4)}),
            r"bn1\.bias has shape \(4,\), but the model's is \(16,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    state = dict(resnet20(3).state_dict())
    change(state)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=words):
        build_model(ModelSpec(weights=str(tmp_path / "w.safetensors")), 3)


def test_a_scalar_that_was_kept_as_one_number_in_a_row_fits(tmp_path: Path) -> None:
    state = resnet20(3).state_dict()
    state["bn1.num_batches_tracked"] = torch.tensor([7])
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    net = build_model(ModelSpec(weights=str(tmp_path / "w.safetensors")), 3).net
    assert net.get_buffer("bn1.num_batches_tracked") == 7


def test_weights_by_torchvisions_name_keep_the_body_and_get_a_new_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = torchvision.models.resnet18(num_classes=1000)
    asked = []

    def get_model(name: str, weights: str) -> nn.Module:
        asked.append((name, weights))
        return known

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    net = build_model(ModelSpec("resnet18", "IMAGENET1K_V1"), 7).net
    assert asked == [("resnet18", "IMAGENET1K_V1")]
    assert net.conv1 is known.conv1
    assert net.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_unknown_weights_of_torchvision_are_named() -> None:
    with pytest.raises(InputError, match=r"'IMAGENET9K'.*resnet18"):
        build_model(ModelSpec("resnet18", "IMAGENET9K"), 3)


def test_a_failed_download_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(InputError, match="download failed"):
        build_model(ModelSpec("resnet18", "IMAGENET1K_V1"), 3)


@pytest.mark.parametrize("weights", ["nothing.safetensors", "nowhere/nothing.pth"])
def test_a_missing_weights_file_is_named(weights: str) -> None:
    with pytest.raises(InputError, match=f"{weights}: no such file"):
        build_model(ModelSpec(weights=weights), 3)


class Netted(nn.Module):
    """A user's network whose own attribute is called as Classifier's is."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.net.append(nn.Linear(4, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def test_a_network_that_calls_a_part_of_itself_net_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = SimpleNamespace(make=Netted)
    monkeypatch.setitem(sys.modules, "mine", mine)  # type: ignore[arg-type]
    model = Classifier(Netted(), CARD.mean, CARD.std)
    card = replace(CARD, architecture="mine:make")
    save_model(model, card, tmp_path / "model.safetensors")
    again, _ = load_model(tmp_path, "mine:make")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"module.net.{key}": value for key, value in state.items()},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"model": state},
    ],
)
def test_ordinary_checkpoints_fit(wrapped: Callable[[Any], Any], tmp_path: Path) -> None:
    whole = resnet20(3).state_dict()
    torch.save(wrapped(whole), tmp_path / "net.pth")
    built = build_model(ModelSpec("resnet20", str(tmp_path / "net.pth")), 3)
    for key, value in whole.items():
        assert torch.equal(built.net.state_dict()[key], value)


def test_weights_that_are_not_finite_or_not_named_are_refused(tmp_path: Path) -> None:
    state = resnet20(3).state_dict()
    state["fc.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"net\.pth: fc\.weight holds nan or infinity"):
        build_model(ModelSpec("resnet20", str(tmp_path / "net.pth")), 3)
    torch.save({0: torch.ones(1)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="holds no table of tensors by name"):
        read_weights(tmp_path / "net.pth")


@pytest.mark.parametrize("given", [{"std": (0.0, 1.0, 1.0)}, {"mean": (float("nan"), 0.0, 0.0)}])
def test_a_normalisation_that_cannot_be_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"(std|mean) = \[.*\]: must be finite numbers"):
        ModelSpec(**given)
