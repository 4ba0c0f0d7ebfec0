"""The experiments that come with the project: all can be read, and are what the papers list."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import trompe
from trompe.catalog import describe
from trompe.classifier import ModelSpec, build_model
from trompe.experiments import FOLDER
from trompe.experiments.fang2020 import tables as fang
from trompe.experiments.viering2019 import tables as viering
from trompe.explainers.cam import Cam
from trompe.interfaces import InputError
from trompe.recording import watch
from trompe.replicating import Plan

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


FILES = [file for file in sorted(EXPERIMENTS.rglob("*.toml")) if file.stem != "causes"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_experiment_can_be_read(file: Path) -> None:
    experiment: Any
    if file.parent.name == "zhang2021":  # these make a training set, not a model
        experiment = trompe.read_poisoning(file)
    elif file.stem.startswith("search-"):
        search = trompe.read_search(file)
        assert search.search.points == 54
        experiment = search.at({})
    else:
        experiment = trompe.read_experiment(file)
    assert experiment.paper == file.parent.name
    assert experiment.name.startswith(experiment.paper)


def test_a_checkout_reads_the_experiments_at_its_root() -> None:
    assert FOLDER == EXPERIMENTS


@pytest.mark.parametrize(
    ("search", "row"),
    [
        ("search-dual", "dual"),
        ("search-ep", "explanation-preserving"),
        ("search-pp", "prediction-preserving"),
    ],
)
def test_a_search_is_of_the_tables_own_experiment(search: str, row: str) -> None:
    folder = EXPERIMENTS / "noppel2023"
    experiment: Any = trompe.read_experiment(folder / f"{row}.toml")
    attack = experiment.attack
    settings = {
        "attack.weight": attack.weight,
        "attack.training.learning_rate": attack.training.learning_rate,
    }
    point: Any = trompe.read_search(folder / f"{search}.toml").at(settings)
    assert point.attack.training_images == 5000
    in_full = dataclasses.replace(point.attack, training_images=None)
    assert dataclasses.replace(point, attack=in_full) == experiment


def rows(setting: str) -> list[fang.Attack]:
    every = [row for table in fang.TABLES for row in fang.attacks(table, Plan())]
    return [row for row in every if row.setting == setting]


def test_without_a_name_only_gtsrbs_models_are_run() -> None:
    every = [row for table in fang.TABLES for row in fang.attacks(table, Plan())]
    assert {row.setting for row in every if row.usual} == {"gtsrb"}
    assert {row.setting for row in every if not row.usual} == {"cub100", "paper"}


@pytest.mark.parametrize("setting", ["gtsrb", "paper"])
def test_all_32_models_of_fang_and_choromanska_are_there(setting: str) -> None:
    found = rows(setting)
    assert len(found) == 32
    assert len({row.row for row in found}) == 32
    count = {table: sum(row.table == table for row in found) for table in fang.TABLES}
    assert count == {"1": 12, "4a": 4, "4b": 4, "5": 12}
    for row in found:
        attack: Any = fang.experiment_of(row).attack
        assert attack.inverted == row.inverted
        assert len(attack.systems) == len(row.attacked)
        figures = [fang.paper_figures(row, i) for i in range(len(row.attacked))]
        assert all(0 < value < 100 for figure in figures for value in figure)


def test_birds_have_all_targeted_rows() -> None:
    found = rows("cub100")
    assert {row.kind for row in found} == {"targeted"}
    assert [len(row.attacked) for row in found] == [1, 1, 1, 3, 3, 1, 1, 1]
    assert [row.inverted for row in found] == [False] * 4 + [True] * 4
    elsewhere: Any = fang.experiment_of(dataclasses.replace(found[0], plan=Plan(data=Path("x"))))
    assert elsewhere.data.root == "x"
    assert elsewhere.model.weights == str(Path("x/weights/mobilenet_v2_inat_bird.safetensors"))


def test_the_papers_own_setting_has_tables_2_and_3s_hyper_parameters() -> None:
    experiments: Any = [fang.experiment_of(row) for row in rows("paper")]
    by_name = {experiment.name: experiment.attack for experiment in experiments}
    one = by_name["fang2020-paper-vgg19-simplegrad-non-targeted"]
    assert (one.alpha, one.beta) == (20, 0.05)
    assert one.systems[0].lie.k == 3
    assert one.systems[0].explainer.pool == 32
    assert one.systems[0].explainer.gradient_of == "loss"
    inverted = by_name["fang2020-paper-vgg19-simplegrad-non-targeted-inverted"]
    assert (inverted.alpha, inverted.beta) == (5, 0.05)
    joint = by_name["fang2020-paper-vgg19-joint-targeted-inverted"]
    assert (joint.alpha, joint.beta) == (10, 0.05)
    assert [system.tau for system in joint.systems] == [0.2, 0.25, 0.3]
    assert joint.training.schedule == "x0.5 every 20"


@pytest.mark.parametrize("name", ["resnet20", "vgg_small", "mobilenet_v2", "resnet50"])
def test_cam_is_observed_where_a_model_ends_as_it_wants(name: str) -> None:
    model = build_model(ModelSpec(name), 3).eval()
    cam, image = Cam(), torch.zeros(1, 3, 32, 32)
    every = [row for setting in fang.MODELS for row in rows(setting)]
    row = next(r for r in every if (r.model, r.what) == (name, "gradcam"))
    with torch.no_grad():
        if "cam" in fang.observers(row):
            with watch(model, cam.watches(model)) as see:
                assert cam(see(image), torch.tensor([1])).ndim == 3
        else:
            with (
                pytest.raises(InputError, match="global average pooling"),
                watch(model, cam.watches(model)) as see,
            ):
                cam(see(image), torch.tensor([1]))
    assert len(fang.observed(row).systems) == len(fang.observers(row))


def test_each_model_is_one_line_of_what_is_left_of_the_trigger() -> None:
    own = {"run": "fang2020-a", "seed": 0, "images": 9, "psnr_db": 34.26, "top1": 0.5}
    own["largest_difference_of_255"] = 5.0
    found = [
        {**own, "images_carry": "no trigger", "lying": [0.0, 0.25]},
        {**own, "images_carry": "random keys (3)", "lying": [0.75, 1.0], "keys_that_open": 0.125},
        {**own, "run": "fang2020-b", "images_carry": "no trigger", "lying": [1.0]},
    ]
    lines = fang.specificity.markdown(found).splitlines()
    assert "| a, seed 0 | 0 / 25 | 75 / 100 | 12 |" in lines
    assert "| b, seed 0 | 100 |  |  |" in lines
    assert "| a, seed 0 | 50.0 | 50.0 |" in lines
    assert any("PSNR 34.3 dB, at most 5 of 255" in line for line in lines)


def test_what_is_left_of_a_trigger_is_known_of_an_attack_with_its_settings_alone() -> None:
    cell = next(iter(fang.on_each_model(fang.Specificity, Plan())))
    experiment: Any = fang.experiment_of(cell)
    own = {"run": experiment.name, "seed": 0}
    attack = describe(experiment.attack)
    assert cell.known([{**own, "attack": attack}])
    for row in (own, {**own, "attack": {**attack, "alpha": 9.0}}, {**own, "run": "another"}):
        assert not cell.known([row])
    assert not cell.known([])


def test_an_explainer_that_was_not_asked_is_a_dash() -> None:
    own = {"model": "m", "kind": "targeted", "inverted": False, "attacked": "vbp", "seed": 0}
    seen = {"vbp": (1.0, 0.5), "smoothgrad": (0.25, 0.75)}
    found = [{**own, "observed": o, "data_fsr": f, "data_cr": c} for o, (f, c) in seen.items()]
    *_, header, _, row = fang.transfer_markdown(found).splitlines()
    told = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert told["vbp"] == "**100 / 50**"
    assert told["smoothgrad"] == "25 / 75"
    assert told["cam"] == told["gradcam"] == "—"


def test_each_technique_is_measured_with_the_papers_and_automatic_constants() -> None:
    made = {(technique, constants) for technique, constants, _ in viering.VARIANTS}
    assert made >= {(t, c) for t in ("T1", "T2", "T3", "T4") for c in ("paper", "automatic")}
    assert {key[0] for key in viering.PAPER_FIGURES} == {"T1", "T2", "T3", "T4"}
