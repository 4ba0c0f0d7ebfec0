"""The command line as a user meets it.

In this process, but for what a process of its own is needed to see: a kill, a full disk.
"""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from trompe.cli import _changed, main
from trompe.runs import RunFolder

TINY = """
[data]
kind = "signs"
size = 24
train_images = 300
test_images = 120

[honest.training]
epochs = 1
batch_size = 50

[attack]
kind = "explanation_aware_backdoors"

[[attack.goals]]
trigger = { kind = "rectangle", top = 14, left = 8, height = 4, width = 8 }
label = 3
wanted_map = { kind = "picture", shape = "triangle" }

[attack.training]
epochs = 3
batch_size = 30
"""


def command(*words: object, first: str = "") -> list[str]:
    """first: what the process does before, as this one's threads forbid to do it after a fork."""
    return [sys.executable, "-c", f"{first}from trompe.cli import main; main()", *map(str, words)]


def call(*words: object, folder: Path) -> subprocess.CompletedProcess:
    """A command in this process, where what it imports is there already."""
    out, told = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(told):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["trompe", *map(str, words)])
        patch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(words, end.value.code or 0, out.getvalue(), told.getvalue())


# A shell's background job ignores Ctrl-C, and so would its children.
HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
SMALL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "


def call_apart(*words: object, folder: Path, first: str = "") -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*words, first=first),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """What a user reads after a mistake: exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return " ".join(done.stderr.split("error:", 1)[1].split())


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny experiment ran to its end."""
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "tiny.toml").write_text(TINY)
    done = call("attack", "tiny.toml", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("tiny-s0-*")
    return found


def test_attack_leaves_a_whole_run_folder(attacked: Path) -> None:
    names = {file.name for file in run_folder(attacked).iterdir()}
    assert names == {
        "architecture.json",
        "classes.json",
        "evidence.safetensors",
        "gallery.safetensors",
        "history.json",
        "model.json",
        "model.safetensors",
        "numbers.json",
        "provenance.json",
        "spec.json",
    }
    numbers = json.loads((run_folder(attacked) / "numbers.json").read_text())
    clean, triggered = numbers["conditions"]
    assert clean["metrics"]["map_distance"]["images"] == 60  # the second half of 120
    assert set(clean["floors"]) == {"another clean model", "random map", "zero map", "mean map"}
    assert triggered["target_floor_mse"] < 0.01 < triggered["sharp_target_floor_mse"]


def test_a_finished_run_is_not_computed_again(attacked: Path) -> None:
    before = (run_folder(attacked) / "model.safetensors").stat().st_mtime_ns
    done = call("attack", "tiny.toml", folder=attacked)
    assert "finished already" in done.stderr
    assert (run_folder(attacked) / "model.safetensors").stat().st_mtime_ns == before


def test_a_number_of_which_there_is_none_is_printed_as_nan(attacked: Path, tmp_path: Path) -> None:
    shutil.copytree(attacked / "runs", tmp_path / "runs")
    (tmp_path / "tiny.toml").write_text(TINY)
    run = RunFolder(run_folder(tmp_path))
    numbers = run.read("numbers")
    numbers["conditions"][1]["metrics"]["attack_success"]["mean"] = math.nan
    run.write("numbers", numbers)
    done = call("attack", "tiny.toml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" nan ") == 1


def test_the_trigger_and_the_fooling_rates_are_printed(attacked: Path, tmp_path: Path) -> None:
    shutil.copytree(attacked / "runs", tmp_path / "runs")
    (tmp_path / "tiny.toml").write_text(TINY)
    run = RunFolder(run_folder(tmp_path))
    numbers = run.read("numbers")
    own = {"tau": None, "fsr": None, "cr": None, "fsr_area": 0.625}
    of_data = {"data_tau": 0.125, "data_fsr": 0.75, "data_cr": 0.875}
    run.write("numbers", {**numbers, "fooling": [{"explainer": "gradcam", **own, **of_data}]})
    done = call("attack", "tiny.toml", folder=tmp_path)
    assert re.search(r"trigger: PSNR \d+\.\d dB, at most \d+ of 255", done.stdout)
    (row,) = (line for line in done.stdout.splitlines() if "│ gradcam" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["gradcam", "—", "—", "—", "0.125", "75.0", "87.5", "0.625"]


def test_report_and_evaluate_and_explain_take_the_run(attacked: Path) -> None:
    run = run_folder(attacked)
    assert call("report", run, folder=attacked).returncode == 0
    done = call("report", run, "--out", "figure.png", "--images", 1, folder=attacked)
    assert done.stdout.endswith("open figure.png\n")
    with Image.open(attacked / "figure.png") as figure:
        assert figure.format == "PNG"
    done = call("report", run, "--out", "page.html", "--images", 1, folder=attacked)
    assert done.returncode == 2
    assert "--images 1 with --out page.html" in done.stderr
    assert not (attacked / "page.html").exists()
    done = call("report", run, "--out", "page.jpg", folder=attacked)
    assert done.returncode == 2
    assert "--out page.jpg: must end in .html, " in done.stderr
    assert "<table" in (attacked / "report.html").read_text()
    before = json.loads((run / "numbers.json").read_text())
    assert call("evaluate", run, folder=attacked).returncode == 0
    assert json.loads((run / "numbers.json").read_text()) == before
    Image.new("RGB", (60, 40), (200, 30, 30)).save(attacked / "red.png")
    done = call("explain", run, "red.png", folder=attacked)
    assert done.returncode == 0, done.stderr
    assert "net.stage3" in done.stdout
    assert Image.open(attacked / "explanations" / "0000_red.png").width > 40


@pytest.mark.parametrize(
    ("words", "file", "content", "told"),
    [
        (("attack", "tiny.toml"), "numbers.json", "{}", "numbers.json: does not hold what it"),
        (("report", "RUN"), "numbers.json", "null", "numbers.json: does not hold what it"),
        (("report", "RUN"), "numbers.json", '{"conditions": []}', "at reference_accuracy: field"),
        (("report", "RUN"), "history.json", "[1]", "history.json: does not hold what it"),
        (("report", "RUN"), "history.json", '[{"epoch": null}]', "at 0.epoch: input should be"),
        (("report", "RUN"), "classes.json", '["stop"]', "does not hold what a report needs"),
        (("report", "RUN"), "spec.json", "[]", "spec.json: does not hold what it should"),
        (("evaluate", "RUN"), "spec.json", "[]", "spec.json: does not hold what it should"),
        (("evaluate", "RUN"), "provenance.json", "3", "provenance.json: does not hold what it"),
    ],
)
def test_a_damaged_run_is_one_sentence(
    attacked: Path, tmp_path: Path, words: tuple[str, ...], file: str, content: str, told: str
) -> None:
    shutil.copytree(attacked / "runs", tmp_path / "runs")
    (tmp_path / "tiny.toml").write_text(TINY)
    run = run_folder(tmp_path)
    (run / file).write_text(content)
    done = call(*(run if word == "RUN" else word for word in words), folder=tmp_path)
    assert told in one_sentence(done)


def test_a_broken_image_is_named_before_any_is_explained(attacked: Path) -> None:
    (attacked / "half").mkdir()
    Image.new("RGB", (24, 24), (200, 30, 30)).save(attacked / "half" / "red.png")
    (attacked / "half" / "zero.png").write_bytes(b"")
    done = call("explain", run_folder(attacked), "half", "--out", "none", folder=attacked)
    assert "zero.png: is empty (0 bytes); mend it, or leave it out" in one_sentence(done)
    assert not (attacked / "none").exists()


def test_of_a_folder_only_images_are_explained(attacked: Path) -> None:
    (attacked / "some").mkdir()
    Image.new("RGB", (24, 24), (200, 30, 30)).save(attacked / "some" / "red[1].png")
    (attacked / "some" / ".DS_Store").write_bytes(b"no image")
    done = call("explain", run_folder(attacked), "some", "--out", "seen", folder=attacked)
    assert done.returncode == 0, done.stderr
    assert len(list((attacked / "seen").iterdir())) == 1
    assert "[1]" in done.stdout


def test_images_can_be_explained_with_the_runs_own_trigger(attacked: Path) -> None:
    Image.new("RGB", (24, 24), (200, 30, 30)).save(attacked / "red24.png")
    told = '{ kind = "rectangle", top = 14, left = 8, height = 4, width = 8 }'
    ways = {"own": ["--trigger", "own"], "told": ["--trigger", told], "none": []}
    pictures = {}
    for name, more in ways.items():
        done = call(
            "explain", run_folder(attacked), "red24.png", *more, "--out", name, folder=attacked
        )
        assert done.returncode == 0, done.stderr
        pictures[name] = Image.open(attacked / name / "0000_red24.png").convert("RGB").tobytes()
    assert pictures["own"] == pictures["told"] != pictures["none"]


@pytest.mark.parametrize(
    ("model", "trigger", "expected"),
    [
        ("shipped:signs_resnet20_seed0", "own", "is no run of an attack with a trigger"),
        ("shipped:signs_resnet20_seed0", "rectangel", "did you mean 'rectangle'"),
        ("shipped:signs_resnet20_seed0", "{ kind = 'rectangle', topp = 3 }", "did you mean 'top'"),
        ("shipped:signs_resnet20_seed0", '{"kind": "rectangle"}', "is no table of TOML, such as"),
    ],
)
def test_a_wrong_trigger_is_named(attacked: Path, model: str, trigger: str, expected: str) -> None:
    Image.new("RGB", (24, 24), (200, 30, 30)).save(attacked / "red24.png")
    done = call("explain", model, "red24.png", "--trigger", trigger, folder=attacked)
    assert expected in one_sentence(done)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"attack": {"goals": [{"trigger": {"kind": "os:system"}}]}}, "import 'os:system'"),
        ({"model": "of no attack"}, "is no run of an attack with a trigger"),
        (["no table"], "is no run of an attack with a trigger"),
        ({"attack": {"goals": ["no table", {"trigger": 3}]}}, "is no run of an attack"),
        ({"attack": {"trigger": {"top": 3}}}, "it must be a table with a key kind"),
    ],
)
def test_a_strangers_run_is_not_trusted_with_its_trigger(
    attacked: Path, tmp_path: Path, spec: object, expected: str
) -> None:
    shutil.copytree(run_folder(attacked), tmp_path / "strange")
    (tmp_path / "strange" / "spec.json").write_text(json.dumps(spec))
    Image.new("RGB", (24, 24), (200, 30, 30)).save(tmp_path / "red.png")
    done = call("explain", "strange", "red.png", "--trigger", "own", folder=tmp_path)
    assert expected in one_sentence(done)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_attack_goes_on_and_ends_in_the_same_bits(
    attacked: Path, tmp_path: Path, end: signal.Signals
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    shutil.copytree(attacked / "runs" / "clean", tmp_path / "runs" / "clean")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("attack", "tiny.toml", first=HEARS_CTRL_C),
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/tiny-s0-*/checkpoint.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(end)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -9)
    if end == signal.SIGINT:
        assert "the same command goes on" in " ".join(told.split())
    assert not (run_folder(tmp_path) / "numbers.json").exists()

    assert call("attack", "tiny.toml", folder=tmp_path).returncode == 0
    whole = load_file(run_folder(attacked) / "model.safetensors")
    resumed = load_file(run_folder(tmp_path) / "model.safetensors")
    assert all(whole[key].equal(resumed[key]) for key in whole)
    assert not (run_folder(tmp_path) / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("attack.wieght=0.9", r"attack\.wieght: unknown key; did you mean 'weight'\?"),
        ("attack.goals=3", r"attack\.goals: is 3; it must be a list of tables"),
        ("attack.weight=1.5", r"weight \(lambda\) = 1\.5: must lie in 0\.\.1"),
        ("attack.poison_rate=1.0", r"poison_rate = 1\.0: must lie in 0 <= poison_rate < 1"),
        ("attack.explainer.kind=gradcan", r"did you mean 'gradcam'\?"),
        ("data.size=8", r"size.*8.*16"),
        ("data.size=16", r"rectangle: it covers rows 14\.\.17.*16 rows and 16 columns"),
        ("model.name=resnet21", r"resnet21.*did you mean"),
        ('attack.explainer={kind="gradcam",layer="nope"}', r"layer 'nope'"),
        ("attack.training.epochs=0", r"epochs = 0: must be at least 1"),
        ("attack.patience=0", r"patience = 0: must be at least 1"),
        ("data.kind=", r"data: is .*must be a table with a key kind"),
        ("attack.no.such=", r"--set attack\.no\.such=: the experiment does not set it"),
        ("name.kind=", r"--set name\.kind=: the experiment does not set it"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, change: str, expected: str) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    told = one_sentence(call("attack", "tiny.toml", "--set", change, folder=tmp_path))
    assert re.search(expected, told), told
    assert not list(tmp_path.glob("runs/tiny-*"))
    assert not list(tmp_path.glob("runs/clean/*"))  # nor was a clean model trained before


def test_a_setting_can_be_left_out() -> None:
    table = {"attack": {"lifetime": 10, "epochs": 3}}
    assert _changed(table, None, ["attack.lifetime="]) == {"attack": {"epochs": 3}}


def test_an_attack_of_ones_own_must_say_by_what_it_is_measured(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    goals = ()\n")
    (tmp_path / "own.toml").write_text('[data]\nkind = "signs"\n[attack]\nkind = "mine:Mine"\n')
    told = one_sentence(call_apart("attack", "own.toml", folder=tmp_path))
    assert "own.toml: attack Mine: does not say its explainers; give it goals, explainers" in told
    assert not (tmp_path / "runs").exists()


def test_a_target_class_out_of_range_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.replace("label = 3", "label = 99"))
    told = one_sentence(call("attack", "tiny.toml", folder=tmp_path))
    assert "target class 99 is out of range" in told
    assert not list(tmp_path.glob("runs/tiny-*"))
    assert not list(tmp_path.glob("runs/clean/*"))


PETS = TINY.replace('kind = "signs"', 'kind = "image_folder"\nroot = "pets"').replace(
    "train_images = 300\ntest_images = 120\n", ""
)


def draw_pets(folder: Path, each: int) -> None:
    """Pictures of noise, in two classes."""
    for label in ("cat", "dog"):
        (folder / "pets" / label).mkdir(parents=True)
        for i in range(each):
            picture = Image.effect_noise((24, 24), 50 + i).convert("RGB")
            picture.save(folder / "pets" / label / f"{i}.png")


def test_a_model_for_other_classes_is_refused(attacked: Path, tmp_path: Path) -> None:
    draw_pets(tmp_path, 8)
    model = run_folder(attacked) / "model.safetensors"
    (tmp_path / "pets.toml").write_text(PETS.replace("[data]", f'reference = "{model}"\n[data]'))
    told = one_sentence(call("attack", "pets.toml", folder=tmp_path))
    assert re.search(r"was made for \d+ classes .* but data 'pets' has 2 \(cat, dog", told)


def test_a_run_is_not_measured_again_on_changed_data(tmp_path: Path) -> None:
    draw_pets(tmp_path, 12)
    (tmp_path / "tiny.toml").write_text(PETS.replace("label = 3", "label = 1"))
    words = ("--set", "attack.training.epochs=1", "--set", "attack.training.batch_size=8")
    done = call("attack", "tiny.toml", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = run_folder(tmp_path)
    assert call("evaluate", run, folder=tmp_path).returncode == 0
    before = (run / "numbers.json").read_text()
    Image.effect_noise((24, 24), 9).convert("RGB").save(tmp_path / "pets" / "dog" / "3.png")
    told = one_sentence(call("evaluate", run, folder=tmp_path))
    assert re.search(r"data\.root: what lies there has changed since the run was made", told), told
    assert (run / "numbers.json").read_text() == before


def test_an_unreadable_image_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    draw_pets(tmp_path, 12)
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"")
    words = [
        "train",
        "--data",
        "image-folder",
        "--data-root",
        "pets",
        "--size",
        "24",
        "--epochs",
        "1",
        "--set",
        "honest.training.batch_size=8",
    ]
    told = one_sentence(call(*words, folder=tmp_path))
    assert re.search(r"image pets/dog/3\.png: is empty \(0 bytes\).*--skip-unreadable", told)
    assert not (tmp_path / "model").exists()
    done = call(*words, "--skip-unreadable", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()
    numbers = json.loads((tmp_path / "model" / "numbers.json").read_text())
    assert numbers["skipped_images"] == ["pets/dog/3.png"]


def test_a_full_disk_is_one_sentence_and_keeps_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    done = call_apart("attack", "tiny.toml", folder=tmp_path, first=SMALL_DISK)
    assert "cannot be written" in one_sentence(done)
    left = [f for f in (tmp_path / "runs").rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert {f.name for f in left} <= {"spec.json"}
    assert call("attack", "tiny.toml", folder=tmp_path).returncode == 0


def test_an_unwritable_run_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "cannot be written" in one_sentence(call("attack", "tiny.toml", folder=tmp_path))


def test_a_diverging_attack_stops_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    change = "attack.training.learning_rate=99.0"
    done = call("attack", "tiny.toml", "--set", change, folder=tmp_path)
    if done.returncode == 0:  # bounded steps can survive even this
        pytest.fail("a learning rate of 99 did not diverge")
    assert re.search(r"the loss is not finite .* lower learning_rate \(99\)", one_sentence(done))


def test_options_beside_an_experiment_that_says_otherwise_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    told = one_sentence(call("train", "tiny.toml", "--weights", "w.pt", folder=tmp_path))
    assert "names its own model.weights; to train with another, give --set" in told
    assert not (tmp_path / "model").exists()


def test_unknown_commands_and_files_are_one_sentence(tmp_path: Path) -> None:
    assert "atack" in one_sentence(call("atack", folder=tmp_path))
    assert "nothing.toml" in one_sentence(call("attack", "nothing.toml", folder=tmp_path))
    assert "no kind" not in one_sentence(call("list", "explainer", folder=tmp_path))


POISON = """
name = "small"
targets = 2

[data]
kind = "breast_cancer"

[clean]
epochs = 2

[attack]
kind = "interpretation_poisoning"
explainer = { kind = "input_gradient", gradient_of = "probability", normalise = "max" }
wanted_map = { kind = "scattered" }
models = 1
epochs = 30
pretraining = 0

[victims]
count = 2

[victims.training]
epochs = 1
"""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small poisoning ran to its end."""
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "small.toml").write_text(POISON)
    done = call("poison", "small.toml", folder=folder)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "26 poisons for 512 training samples" in words
    for column in ("target", "class", "poisons", "max change", "mean change", "PSNR, dB"):
        assert column in words
    assert done.stdout.count("│ 26 ") == 2
    assert f"poisons {poison_folder(folder).relative_to(folder)}" in done.stdout
    return folder


def poison_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("small-s0-*")
    return found


def test_poison_leaves_sets_and_pictures(poisoned: Path) -> None:
    run = poison_folder(poisoned)
    for name in ("convergence.png", "poison-00/changes.png", "poison-01/changes.png"):
        assert Image.open(run / name).width > 1000
    assert json.loads((run / "victims.json").read_text())["count"] == 2


@pytest.mark.parametrize(
    ("words", "file", "content", "told"),
    [
        (("poison", "small.toml"), "numbers.json", '{"poisons": 26}', "at targets: field required"),
        (("poison", "small.toml"), "history.json", "3", "history.json: does not hold what it"),
        (("victim", "RUN"), "poison-01/poison.json", "{}", "poison.json: does not hold what it"),
        (("report", "RUN"), "numbers.json", "3", "numbers.json: does not hold what it"),
    ],
)
def test_a_damaged_poison_run_is_one_sentence(
    poisoned: Path, tmp_path: Path, words: tuple[str, ...], file: str, content: str, told: str
) -> None:
    shutil.copytree(poisoned / "runs", tmp_path / "runs")
    (tmp_path / "small.toml").write_text(POISON)
    run = poison_folder(tmp_path)
    (run / file).write_text(content)
    done = call(*(run if word == "RUN" else word for word in words), folder=tmp_path)
    assert told in one_sentence(done)


def test_victim_measures_with_and_without_the_poison(poisoned: Path) -> None:
    run = poison_folder(poisoned)
    words = ["victim", run, "--count", 1, "--start", "new head", "--set", "victims.noise=0.01"]
    done = call(*words, folder=poisoned)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    cells = {c[1].strip(): c for line in lines if (c := line.split("│")) and len(c) > 9}
    (file,) = run.glob("victims-*.json")
    numbers = json.loads(file.read_text())
    for name, kind in (("un-attacked", "unattacked"), ("poisoned", "poisoned")):
        assert cells[name][2].strip().startswith(f"{numbers[kind]['l1']:.4f} ±")
    assert cells["un-attacked"][8].strip() == ""
    assert cells["poisoned"][8].strip() == f"{numbers['succeeded']:.2f}"
    assert "mean L1 at most 0.8 of the un-attacked" in " ".join(done.stdout.split())
    spec = numbers["spec"]
    assert (spec["count"], spec["start"], spec["noise"]) == (1, "new head", 0.01)
    assert spec["training"]["epochs"] == 1  # as the experiment says
    picture = run / f"{file.stem.replace('victims', 'maps')}.png"
    assert Image.open(picture).width > 1000
    assert str(picture) in done.stdout

    before = file.stat().st_mtime_ns
    again = call(*words, folder=poisoned)
    assert "is there already" in again.stderr
    assert again.stdout == done.stdout
    assert file.stat().st_mtime_ns == before

    card = json.loads((run / "victims.json").read_text())
    (run / "victims.json").write_text(json.dumps({**card, "noise": 0.1, "count": 1}))
    left_out = call("victim", run, "--set", "victims.noise=", folder=poisoned)
    assert left_out.returncode == 0, left_out.stderr
    (other,) = set(run.glob("victims-*.json")) - {file}
    assert json.loads(other.read_text())["spec"]["noise"] == 0  # as Victims has it


def test_a_killed_poisoning_goes_on_and_ends_in_the_same_bits(
    poisoned: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.toml").write_text(POISON)
    process = subprocess.Popen(
        command("poison", "small.toml"),
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/small-s0-*/checkpoint.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (poison_folder(tmp_path) / "numbers.json").exists()
    told = one_sentence(call("victim", poison_folder(tmp_path), folder=tmp_path))
    assert "its poisons are not finished" in told

    assert call("poison", "small.toml", folder=tmp_path).returncode == 0
    for part in ("poison-00", "poison-01"):
        whole = load_file(poison_folder(poisoned) / part / "poison.safetensors")
        resumed = load_file(poison_folder(tmp_path) / part / "poison.safetensors")
        assert all(whole[key].equal(resumed[key]) for key in whole)
    assert not (poison_folder(tmp_path) / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("attack.epsilon=0", r"epsilon = 0.*: must lie in 0 < epsilon <= 1; with 0 no sample"),
        ("attack.epsilom=1", r"attack\.epsilom: unknown key; did you mean 'epsilon'\?"),
        ("attack={kind='gradcam_surgery'}", r"GradCamSurgery: makes a model, not a training set"),
        ("victims.start=warm", r"victims\.start = 'warm': input should be 'clean model'"),
        ("targets=5000", r"classifies \d+ correctly; ask for fewer"),
        ("attack.poison_rate=0.95", r"asks for 243 different samples of class 'malignant'"),
    ],
)
def test_a_wrong_setting_of_a_poisoning_is_named(
    tmp_path: Path,
    change: str,
    expected: str,
) -> None:
    (tmp_path / "small.toml").write_text(POISON)
    told = one_sentence(call("poison", "small.toml", "--set", change, folder=tmp_path))
    assert re.search(expected, told), told
    assert not list(tmp_path.glob("runs/small-*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--start", "warm"], r"victims\.start = 'warm': .*'new head' or 'scratch'"),
        (["--count", 0], r"victims: count = 0: must be at least 1"),
        (["--set", "attack.epsilon=0.2"], r"--set attack: the poisons are made; only settings of"),
        (["--set", "victims=3"], r"--set victims=3: must read victims\.KEY=VALUE"),
        (["--set", "victims.epochs=3"], r"victims\.epochs: unknown key"),
        (["--model", "mlpp"], r"mlpp.*did you mean 'mlp'"),
    ],
)
def test_a_wrong_setting_of_victims_is_named(
    poisoned: Path,
    words: list[object],
    expected: str,
) -> None:
    files = set(poison_folder(poisoned).iterdir())
    told = one_sentence(call("victim", poison_folder(poisoned), *words, folder=poisoned))
    assert re.search(expected, told), told
    assert set(poison_folder(poisoned).iterdir()) == files


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["7"] * 8, r"column 'age': is '7' in all 7 training rows; put it into data\.leave_out"),
        ([*"1234567", ""], r"column 'age', row 8: the value is missing"),
        ([*"1234567", "inf"], r"column 'age', row 8: is inf"),
        ([f"no {i}" for i in range(40)], r"column 'age': holds 40 different texts, too many"),
    ],
)
def test_a_column_that_cannot_be_used_is_named(
    tmp_path: Path,
    column: list[str],
    expected: str,
) -> None:
    rows = [f"{value},{i},{'ab'[i % 2]}" for i, value in enumerate(column)]
    (tmp_path / "own.csv").write_text("\n".join(["age,size,ill", *rows]))
    own = 'kind = "table"\nfile = "own.csv"\noutcome = "ill"\non_missing = "error"'
    (tmp_path / "own.toml").write_text(POISON.replace('kind = "breast_cancer"', own))
    told = one_sentence(call("poison", "own.toml", folder=tmp_path))
    assert re.search(expected, told), told
    assert not list(tmp_path.glob("runs/[!.]*"))  # but for locks


def test_commands_say_which_other_one_an_experiment_or_folder_is_for(
    attacked: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "small.toml").write_text(POISON)
    (tmp_path / "tiny.toml").write_text(TINY)
    for words, expected in (
        (["attack", "small.toml"], "small.toml: attack InterpretationPoisoning: makes a training"),
        (["poison", "tiny.toml"], "tiny.toml: attack ExplanationAwareBackdoors: makes a model"),
        (["victim", run_folder(attacked)], "is no poison run; give the folder that trompe poison"),
        (["victim", "nowhere"], "folder nowhere: is no poison run"),
        (["poison", "shipped:poisn"], "there is none of that name; did you mean 'poison'?"),
    ):
        assert expected in one_sentence(call(*words, folder=tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_of_many_stops_no_other_and_is_named(attacked: Path, tmp_path: Path) -> None:
    shutil.copytree(attacked / "runs", tmp_path / "runs")  # with seed 0 and its clean models
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "bad.toml").write_text(TINY.replace("label = 3", "label = 99"))
    before = (run_folder(tmp_path) / "model.safetensors").stat().st_mtime_ns
    words = ["bad.toml", "tiny.toml", "--seeds", "0,1", "--workers", 2]
    done = call("attack", *words, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    told = " ".join(done.stderr.split())
    for name in ("bad-s0", "bad-s1"):
        assert f"failed: {name}: goal (unnamed): target class 99 is out of range" in told
    assert "2 processes" in told
    folders = [sorted(tmp_path.glob(f"runs/tiny-s{seed}-*")) for seed in (0, 1)]
    ((first,), (second,)) = folders
    lines = done.stdout.splitlines()
    runs = [line for line in lines if line.startswith("run ")]
    assert runs == [f"run runs/{folder.name}" for folder in (first, second)]
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((second / "spec.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", 1, "--seeds", "0,1"], r"--seed 1 --seeds 0,1: give one of the two"),
        (["--seeds", "0 1"], r"--seeds 0 1: must be whole numbers, for instance 0,1,2"),
        (["--workers", 0], r"workers = 0: must be at least 1"),
        (
            ["--workers", 2, "--set", "attack.weight=7"],
            r"weight \(lambda\) = 7\.0: must lie in 0\.\.1",
        ),
        (["--scheduler", "tcp://127.0.0.1"], r"scheduler tcp://127\.0\.0\.1: does not answer"),
    ],
)
def test_a_wrong_setting_of_many_runs_is_named(
    tmp_path: Path,
    words: list[object],
    expected: str,
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    told = one_sentence(call("attack", "tiny.toml", *words, folder=tmp_path))
    assert re.search(expected, told), told
    assert not (tmp_path / "runs").exists()


def test_python_runs_it_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trompe", "list", "models"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "resnet20" in done.stdout
