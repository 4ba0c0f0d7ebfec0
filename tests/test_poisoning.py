"""From an experiment to poison sets, victims, and what is kept of both."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trompe import catalog
from trompe.classifier import ModelSpec, build_model
from trompe.explainers.cam import Cam
from trompe.interfaces import ImageSet, InputError, Target
from trompe.measure_victims import (
    SUCCEEDED,
    measure_victims,
    succeeded,
    victims_name,
    victims_of,
)
from trompe.poisoning import (
    Scene,
    Victims,
    clean_model,
    poison,
    poison_sets,
    read_poisoning,
    read_run,
    set_up,
    set_up_again,
)
from trompe.report.reading import load
from trompe.runs import FileLogbook, RunFolder
from trompe.screen import Silent
from trompe.target_maps.region import Region
from trompe.train import Training

SMALL: dict[str, Any] = {
    "name": "small",
    "targets": 2,
    "data": {"kind": "breast_cancer"},
    "clean": {"epochs": 2},
    "attack": {
        "kind": "interpretation_poisoning",
        "explainer": {
            "kind": "input_gradient",
            "gradient_of": "probability",
            "normalise": "max",
        },
        "wanted_map": {"kind": "scattered"},
        "models": 1,
        "epochs": 3,
        "pretraining": 0,
    },
    "victims": {"count": 2, "training": {"epochs": 1}},
}


def small(**changes: Any) -> Any:
    return read_poisoning({**copy.deepcopy(SMALL), **changes})


class Notes(Silent):
    """A screen that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, epoch: int, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.steps += 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished folder. Tests copy what they change."""
    return poison(small(), tmp_path_factory.mktemp("poisoned"))


@pytest.fixture
def folder(made: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it."""
    return RunFolder(Path(shutil.copytree(made.path, tmp_path / made.path.name)))


def test_a_folder_keeps_what_victims_need(made: RunFolder) -> None:
    files = {file.name for file in made.path.iterdir()}
    assert files == {
        "classes.json",
        "clean.safetensors",
        "history.json",
        "numbers.json",
        "poison-00",
        "poison-01",
        "provenance.json",
        "spec.json",
        "victims.json",
    }
    assert made.read("victims") == catalog.describe(small().victims)
    assert read_run(made) == small()
    assert len(made.read_history()) == 3


def test_other_victims_need_no_other_poisons(made: RunFolder, folder: RunFolder) -> None:
    screen = Notes()
    other = small(victims={"count": 7})
    again = poison(other, folder.path.parent, screen)
    assert again.path == folder.path
    assert "finished already" in screen.notes[0]
    assert read_run(again).victims.count == 7
    assert all(
        torch.equal(a.samples, b.samples)
        for a, b in zip(poison_sets(made), poison_sets(again), strict=True)
    )


def test_an_interrupted_crafting_goes_on_and_ends_in_the_same_bits(
    made: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = FileLogbook.save

    def killed(self: FileLogbook, state: dict[str, Any]) -> None:
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(FileLogbook, "save", killed)
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            poison(small(), tmp_path)
        (checkpoint,) = tmp_path.glob("small-*/checkpoint.pt")
        assert len(torch.load(checkpoint)["history"]) == epoch
    monkeypatch.undo()
    ended = poison(small(), tmp_path)
    assert not checkpoint.exists()
    for one, other in zip(poison_sets(made), poison_sets(ended), strict=True):
        assert torch.equal(one.samples, other.samples)
        assert not torch.equal(one.samples, one.bases)


def test_victims_are_measured_with_and_without_the_poison_and_kept(folder: RunFolder) -> None:
    screen = Notes()
    numbers = victims_of(folder, None, screen)
    name = victims_name(small().victims)
    assert json.loads((folder.path / f"{name}.json").read_text()) == numbers
    assert screen.steps > 0
    assert numbers["spec"]["count"] == 2
    for kind in ("unattacked", "poisoned"):
        assert torch.tensor(numbers[kind]["values"]["l1"]).shape == (2, 2)  # targets, victims
        assert 0 < numbers[kind]["l1"] < 1
    assert numbers["unattacked"]["values"] != numbers["poisoned"]["values"]
    assert "0.8" in numbers["success"]
    assert "seconds" in numbers["provenance"]

    screen = Notes()
    assert victims_of(folder, None, screen) == numbers
    assert screen.steps == 0
    assert "is there already" in screen.notes[0]
    other = replace(small().victims, count=1)
    assert victims_name(other) != name
    assert victims_of(folder, other)["poisoned"]["victims"] == 1
    assert victims_of(folder) == numbers


def test_un_attacked_victims_are_those_of_the_clean_set_with_the_same_seeds(
    folder: RunFolder,
) -> None:
    experiment = small()
    numbers = victims_of(folder)
    scene = set_up(experiment)
    alone = measure_victims(scene, None, experiment.victims, experiment)
    assert alone.numbers == numbers["unattacked"]
    # Each target is shown to the same victims, alone or beside others.
    one = replace(scene, targets=scene.targets[1:], positions=scene.positions[1:])
    second = measure_victims(one, None, experiment.victims, experiment).numbers["values"]
    for name, values in alone.numbers["values"].items():
        assert second[name] == [pytest.approx(values[1])], name


def test_a_scene_is_set_up_again_from_the_folder_alone(folder: RunFolder) -> None:
    before, after = set_up(small()), set_up_again(folder, small())
    weights = after.clean.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in before.clean.state_dict().items())
    assert torch.equal(before.positions, after.positions)
    for one, other in zip(before.targets, after.targets, strict=True):
        assert torch.equal(one.sample, other.sample)
        assert torch.equal(one.wanted_map, other.wanted_map)
    assert not after.clean.training


def test_maps_of_victims_are_means_of_maps_in_0_to_1(folder: RunFolder) -> None:
    """Of one victim, its L1 can be read off the map; of two, the map is between theirs."""
    one = replace(small().victims, count=1)
    numbers = victims_of(folder, one)
    maps = load_file(folder.path / f"{victims_name(one)}.safetensors")
    assert maps["wanted"].shape == maps["poisoned"].shape == (2, 1, 30)
    assert set(maps["wanted"].unique().tolist()) == {0.0, 1.0}
    for kind in ("unattacked", "poisoned"):
        l1 = torch.tensor(numbers[kind]["values"]["l1"])[:, 0]
        assert torch.allclose((maps["wanted"] - maps[kind]).abs().mean((1, 2)), l1, atol=1e-6)
        assert maps[kind].amin() >= 0
        assert maps[kind].amax() <= 1
    victims_of(folder)
    two = load_file(folder.path / f"{victims_name(small().victims)}.safetensors")
    assert two["poisoned"].amax() <= 1


def test_a_target_succeeded_if_its_mean_l1_fell_far_enough() -> None:
    before = {"values": {"l1": [[0.5, 0.5], [0.4, 0.6], [0.5, 0.5], [0.5, 0.5]]}}
    l1 = [[0.4, 0.4], [0.1, 0.1], [0.41, 0.4], [0.9, 0.1]]
    after = {"values": {"l1": l1, "degenerate": [[0, 0]] * 4}}
    assert SUCCEEDED == 0.8
    assert succeeded(before, after) == 0.5
    before = {"values": {"l1": [[0.5, 0.5]]}}
    missing = {"values": {"l1": [[None, 0.1]], "degenerate": [[0, 0]]}}  # nan in a file
    assert succeeded(before, missing) == 0


def test_an_empty_map_is_no_success_however_near_it_is() -> None:
    before = {"values": {"l1": [[0.5, 0.5], [0.5, 0.5]]}}
    after = {"values": {"l1": [[0.2, 0.2], [0.2, 0.2]], "degenerate": [[0, 1], [0, 0]]}}
    assert succeeded(before, after) == 0.5


def test_a_folder_that_is_no_poison_run_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is no poison run; give the folder"):
        victims_of(RunFolder(tmp_path / "nowhere"))
    attack_run = RunFolder(tmp_path / "attack")
    attack_run.open({"name": "demo", "honest": {}})
    with pytest.raises(InputError, match="attack: is no poison run"):
        victims_of(attack_run)
    (folder.path / "numbers.json").unlink()
    with pytest.raises(InputError, match="are not finished; the same trompe poison command"):
        victims_of(folder)


def test_a_report_on_poisons_names_the_command_that_goes_on(made: RunFolder) -> None:
    with pytest.raises(InputError, match=r"holds poisons.*`trompe victim .*` trains victims"):
        load(made)


def test_data_that_have_changed_since_are_refused(folder: RunFolder) -> None:
    spec = folder.read("spec")
    spec["data"]["split_seed"] = 1
    folder.write("spec", spec)
    with pytest.raises(InputError, match="'breast_cancer': are not those that the poisons were"):
        victims_of(folder)
    assert not list(folder.path.glob("victims-*"))


def test_training_rows_that_have_changed_since_are_refused(tmp_path: Path) -> None:
    """Though the targets, which are no training rows, are where they were."""
    file = tmp_path / "rows.csv"
    values = torch.rand(120, 3, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [f"{a},{b},{c},{'yes' if a > b else 'no'}" for a, b, c in values]
    file.write_text("\n".join(["a,b,c,ill", *lines]) + "\n")
    data = {"kind": "table", "file": str(file), "outcome": "ill", "held_out": 0.5}
    made = poison(small(data=data, targets=1), tmp_path / "runs")
    file.write_text(file.read_text() + "0.1,0.2,0.3,no\n")
    with pytest.raises(InputError, match=r"data\.file: what lies there has changed since"):
        victims_of(made)
    assert not list(made.path.glob("victims-*"))


def test_a_model_that_takes_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model 'resnet18': cannot take rows of 30 numbers"):
        poison(small(model={"name": "resnet18"}), tmp_path)


def test_an_interrupted_crafting_keeps_its_clean_model(
    made: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of threads would train another one."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileLogbook, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        poison(small(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("trompe.poisoning.clean_model", killed)
    ended = poison(small(), tmp_path)
    for one, other in zip(poison_sets(made), poison_sets(ended), strict=True):
        assert torch.equal(one.samples, other.samples)


def test_a_wanted_map_with_open_places_is_refused(tmp_path: Path) -> None:
    class Open:
        def __call__(self, maps: Any, images: Any) -> Any:
            return torch.full_like(maps, float("nan"))

    one = small()
    attack = replace(one.attack, wanted_map=Open())
    with pytest.raises(InputError, match=r"wanted_map \(Open\): leaves open what parts"):
        set_up(replace(one, attack=attack))


def test_a_wanted_map_that_is_the_same_everywhere_is_refused() -> None:
    attack = {**SMALL["attack"], "wanted_map": {"kind": "flat"}}
    with pytest.raises(InputError, match=r"\(Flat\): is the same everywhere for 2 of 2 targets"):
        set_up(small(attack=attack))


@pytest.mark.parametrize("kind", ["semi_random", "detected_stickers"])
def test_a_wanted_map_that_is_made_from_images_is_none_for_tables(kind: str) -> None:
    attack = {**SMALL["attack"], "wanted_map": {"kind": kind}}
    with pytest.raises(InputError, match=f"target map {kind}: is made from images"):
        set_up(small(attack=attack))


def test_a_clean_model_that_is_never_right_must_train_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trompe.poisoning.pool_of", lambda _, test: torch.arange(0))
    with pytest.raises(InputError, match=r"classifies 0 correctly; train it for longer"):
        set_up(small())


def test_a_full_disk_while_crafting_keeps_the_clean_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next crafting would otherwise go on with another one, and other targets."""
    save, full = FileLogbook.save, False

    def saved(self: FileLogbook, state: dict[str, Any]) -> None:
        nonlocal full
        if full:
            raise InputError("file checkpoint.pt: cannot be written (disk full)")
        save(self, state)
        full = True

    monkeypatch.setattr(FileLogbook, "save", saved)
    with pytest.raises(InputError, match="disk full"):
        poison(small(), tmp_path)
    (kept,) = tmp_path.glob("small-*/clean.safetensors")
    assert (kept.parent / "checkpoint.pt").is_file()


@pytest.mark.parametrize("change", [{"targets": None}, {"targets": 0}, {"targets": "two"}])
def test_numbers_that_do_not_say_how_many_targets_are_refused(
    folder: RunFolder, change: dict[str, Any]
) -> None:
    folder.write("numbers", {**folder.read("numbers"), **change})
    with pytest.raises(InputError, match=r"at targets: input should be .*: remove its run"):
        victims_of(folder)


def test_a_card_without_its_targets_place_and_another_networks_weights_are_refused(
    folder: RunFolder,
) -> None:
    card = folder.path / "poison-00" / "poison.json"
    whole = json.loads(card.read_text())
    card.write_text(json.dumps({**whole, "target_position": "first"}))
    with pytest.raises(InputError, match=r"poison-00/poison\.json: .*at target_position: "):
        victims_of(folder)
    card.write_text(json.dumps(whole))
    folder.write_tensors("clean", {"net.head.weight": torch.zeros(3, 3)})
    with pytest.raises(InputError, match="holds weights of another network than 'mlp'"):
        victims_of(folder)
    (folder.path / "inputs.json").write_text("[]")
    with pytest.raises(InputError, match=r"inputs\.json: .*a valid dictionary.*bring it back"):
        victims_of(folder)


def test_another_model_must_show_as_much_as_the_poisons_want(
    shapes: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ResNet-18 a map has 1 place where ResNet-20's has 36: it fits any by broadcasting."""
    one = small()
    attack = replace(one.attack, explainer=Cam(), wanted_map=Region(), bases="target")
    net = build_model(ModelSpec("resnet20"), len(shapes.class_names)).eval()
    positions = torch.arange(2)
    wanted = Region()(torch.zeros(2, 6, 6), shapes.floats(positions))
    targets = tuple(Target(shapes.floats(p[None]), 0, wanted[p][None]) for p in positions)
    scene = Scene(shapes, shapes, net, targets, positions)
    experiment = replace(one, attack=attack, model=ModelSpec("resnet20"))
    monkeypatch.setattr("trompe.measure_victims.clean_model", None)  # it comes before training
    victims = Victims(count=1, model=ModelSpec("resnet18"))
    with pytest.raises(InputError, match=r"'resnet18': its maps have 1x1 places, the wanted ones"):
        measure_victims(scene, None, victims, experiment)


def test_victims_whose_statistics_shall_stay_are_trained(folder: RunFolder) -> None:
    victims = Victims(
        count=2, training=replace(Victims().training, epochs=1, frozen_statistics=True)
    )
    assert victims_of(folder, victims)["poisoned"]["victims"] == 2


def test_too_few_bases_leave_nothing_behind(tmp_path: Path) -> None:
    attack = {**SMALL["attack"], "poison_rate": 0.9, "bases": "class"}
    with pytest.raises(InputError, match="asks for 461 different samples of class"):
        poison(small(attack=attack), tmp_path)
    assert not list(tmp_path.glob("[!.]*"))  # but for locks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attack": {"kind": "gradcam_surgery"}}, r"makes a model, not a training set; run it"),
        ({"victims": {"count": 0}}, r"experiment\.victims: count = 0: must be at least 1"),
        ({"victims": {"noise": -0.1}}, r"victims: noise = -0\.1: is a standard deviation"),
        ({"victims": {"start": "warm"}}, r"victims\.start = 'warm'.*'new head' or 'scratch'"),
        ({"victims": {"noise": float("nan")}}, r"victims: noise = nan: is a standard deviation"),
        ({"targets": 0}, "targets = 0: must be at least 1"),
        ({"seed": 2**64}, "seed = 18446744073709551616: is too large; at most"),
        ({"data": {"kind": "breast_cancer", "split_seed": 10**20}}, "split_seed = 1.*too large"),
        ({"clean": {"weight_decay": -1}}, "weight_decay = -1.0: must be at least 0, and finite"),
        ({"clean": {"label_smoothing": 2}}, "label_smoothing = 2.0: must be at least 0, and less"),
        ({"clean": {"softplus_beta": 0}}, "softplus_beta = 0.0: must be a positive number"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clean": {"frozen": ["net.hidden"]}}, r"training\.frozen = \['net\.hidden'\]: poisoning"),
        ({"clean": {"softplus_beta": 8}}, r"softplus_beta = 8: networks of tables"),
        ({"clean": {"clip": 1}}, r"training\.clip = 1: poisoning has none"),
        ({"frozen_until": "net.head"}, "frozen_until 'net.head': behind it nothing could be"),
        ({"model": {"name": "vit_b_16"}}, "model 'vit_b_16': cannot take rows of 30 numbers"),
    ],
)
def test_what_networks_in_lock_step_do_not_have_is_refused(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        set_up(small(**changes))


def test_an_attack_on_a_model_is_named_before_its_other_keys() -> None:
    table = {**SMALL, "honest": {}, "attack": {"kind": "gradcam_surgery"}}
    with pytest.raises(InputError, match=r"x\.toml: attack GradCamSurgery: makes a model"):
        read_poisoning(table, "x.toml")


def test_the_shipped_experiment_is_one() -> None:
    experiment = read_poisoning("shipped:poison")
    assert experiment.victims.count == 5
    assert experiment.paper == "zhang2021"


def test_convolutions_are_trained_in_lock_step() -> None:
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(8) % 2, ("a", "b"), "noise")
    how = Training(epochs=1, batch_size=4, optimizer="adam")
    experiment = replace(small(), model=ModelSpec("resnet20"), clean=how)
    model = clean_model(experiment, experiment.model, data)
    assert model(data.floats(slice(2))).shape == (2, 2)
    frozen = replace(experiment, frozen_until="net.stage2")
    tail = clean_model(frozen, frozen.model, data)
    with torch.random.fork_rng():
        torch.manual_seed(frozen.seed)
        built = build_model(frozen.model, 2)
    for name, value in tail.named_parameters():
        behind = name.startswith(("net.stage3", "net.fc"))
        assert torch.equal(value, built.get_parameter(name)) != behind, name


def test_another_model_has_victims_of_its_own(folder: RunFolder) -> None:
    victims = Victims(1, "new head", Training(epochs=1), ModelSpec("mlp"))
    numbers = victims_of(folder, victims)
    assert numbers["spec"]["model"]["name"] == "mlp"
    assert read_run(folder).victims == small().victims
