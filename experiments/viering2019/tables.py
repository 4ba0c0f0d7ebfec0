"""Tables 1 and 2 of Viering et al. 2019, with a numeric audit, on several networks.

    trompe replicate viering2019 [table1 | table2 | detections | transfer] [ROW] [--images 500]

A row is MODEL/TECHNIQUE/CONSTANTS/WIRING/PRECISION: 'resnet20/T1/*/float32'. resnet20, vgg_small:
on GTSRB's whole test set, references trained as in gtsrb.toml. squeezenet, mobilenet_v2: ImageNet
weights and images of ILSVRC2012's validation set from --data. vgg16-random: the paper's network
with random weights, for the rows that do not depend on training; vgg16, if it is named: with
torchvision's own weights, which are downloaded. --images limits how many are looked at; by default
all in float32, fewer in slower precisions. detections: how often each detector finds warped
stickers. transfer: what other explainers show.
"""

import copy
import csv
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trompe
from trompe.attacks.channel_hijack import ChannelHijack
from trompe.attacks.gradcam_surgery import GradCamSurgery
from trompe.classifier import Classifier, ModelSpec, build_model
from trompe.data._reading import read_images
from trompe.evaluate import answers, share_right
from trompe.experiment import experiment_table, set_up
from trompe.explainers.input_gradient import InputGradient
from trompe.explainers.visual_backprop import VisualBackProp
from trompe.files import Row, read_json
from trompe.foreign import witnesses
from trompe.interfaces import Answers, ImageSet, InputError
from trompe.machine import choose_device
from trompe.many import Place
from trompe.maps import peak_one
from trompe.over_seeds import over_seeds
from trompe.replicating import Figure, Paper, Plan, Table
from trompe.runs import RunFolder, provenance
from trompe.screen import Screen, Silent
from trompe.surgery import StickerDetector
from trompe.target_maps.border import Border
from trompe.target_maps.detected_stickers import DetectedStickers
from trompe.target_maps.flat import Flat
from trompe.triggers.stickers import Stickers

HERE = Path(__file__).parent
PRECISIONS = ("float32", "float64", "float16", "bfloat16")
# technique, constants, wiring (None: the usual one)
VARIANTS = (
    *[(t, "paper", None) for t in ("T1", "T2", "T3", "T4")],
    *[(t, "automatic", "head") for t in ("T1", "T2")],
    *[(t, "automatic", None) for t in ("T1", "T2", "T3", "T4")],
    *[(t, "automatic", "no new module") for t in ("T5 flat", "T5 border")],
)
KEYS = ("technique", "constants", "wiring", "condition", "model", "dtype", "seed")
PAPER_FIGURES = {  # Tables 1 and 2: accuracy, |y_o - y_n|, L1
    ("T1", "clean"): (0.71594, 0.01713, 0.00513),
    ("T2", "clean"): (0.71594, 0.00454, 0.01079),
    ("T3", "clean"): (0.71592, 0.0, 0.05932),
    ("T4", "clean"): (0.71592, 0.0, 0.0),
    ("T4", "stickers"): (0.69048, 0.0, 0.00006),
}
IMAGENET = {  # name -> network, weights in --data (None: random, or torchvision's name)
    "squeezenet": ("squeezenet1_0", "weights/squeezenet1_0_imagenet.safetensors"),
    "mobilenet_v2": ("mobilenet_v2", "weights/mobilenet_v2_imagenet.safetensors"),
    "vgg16-random": ("vgg16", None),
    "vgg16": ("vgg16", "IMAGENET1K_V1"),
}
MODELS = ("resnet20", "vgg_small", *IMAGENET)
# Where convolutions in half precision run in software, fewer images have to do.
FEWER = {"float64": {32: 4000, 224: 100}, "float16": {32: 300, 224: 40}}
FEWER["bfloat16"] = FEWER["float16"]
TRANSFER_IMAGES = {32: 100, 224: 21}
DETECTION_IMAGES = 200
GTSRB, ILSVRC = "GTSRB", "ILSVRC2012 validation"
STICKERS = {GTSRB: Stickers(size=7), ILSVRC: Stickers(size=14)}  # that fit on their images
RANDOM_IMAGES = 12  # of the untrained VGG-16, whose rows do not depend on the images
# The last convolution of SqueezeNet gives the scores' own maps: in the head there is no layer with
# weights behind it. The one before has.
LAYER = {"squeezenet": "net.features"}


@dataclass(frozen=True)
class Scene:
    """A network, the images that it is judged by, and the stickers that fit on them."""

    name: str
    model: Classifier
    data: ImageSet
    looked_at: ImageSet  # other images, from which automatic constants are taken
    stickers: Stickers
    data_name: str


@functools.lru_cache(maxsize=1)  # cells of one network follow one another
def scene_of(name: str, root: Path, data: Path) -> Scene:
    """InputError for missing data or weights."""
    if name not in IMAGENET:
        table = experiment_table(HERE / "gtsrb.toml")
        table["data"]["root"] = str(data)
        table = {**table, "model": {**table["model"], "name": name}}
        scene = set_up(trompe.read_experiment(table, name), root, "cpu", Silent())
        return Scene(name, scene.reference, scene.test, scene.train, STICKERS[GTSRB], GTSRB)
    network, weights = IMAGENET[name]
    torch.manual_seed(0)
    if weights is None or weights.isupper():
        model = build_model(ModelSpec(network, weights), 1000).eval()
    else:
        card = read_json((data / weights).with_suffix(".json"))
        spec = ModelSpec(network, str(data / weights), tuple(card["mean"]), tuple(card["std"]))
        model = build_model(spec, 1000).eval()
    images = ilsvrc(data / "ilsvrc_val")
    if weights is None:
        images = images.subset(torch.arange(RANDOM_IMAGES))
    every = torch.arange(len(images))  # every seventh image is for choices, the others for numbers
    choices, reported = every % 7 == 0, every % 7 != 0
    return Scene(
        *(name, model, images.subset(every[reported]), images.subset(every[choices])),
        *(STICKERS[ILSVRC], ILSVRC),
    )


def ilsvrc(folder: Path) -> ImageSet:
    """One folder a class, and labels.csv (file, class index); the middle 224x224 of each image."""
    file = folder / "labels.csv"
    if not file.is_file():
        raise InputError(f"labels {file}: no such file; it must list file and class index")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    files, labels = (
        [folder / row["file"] for row in rows],
        [int(row["class_index"]) for row in rows],
    )
    names = tuple(map(str, range(1000)))
    whole = read_images(files, labels, 227, False, names, ILSVRC)
    return replace(whole, images=whole.images[:, :, 1:225, 1:225].contiguous())


# --- tables 1 and 2 -------------------------------------------------------------------------------


def limit(precision: str, size: int, given: int | None) -> int:
    """How many images are looked at."""
    usual = FEWER.get(precision, {}).get(size, 10**9)
    return usual if given is None else min(given, usual)


@dataclass(frozen=True)
class Audit:
    """A network edited in one way, in one precision. wiring: None is the usual one."""

    model: str
    technique: str
    constants: str
    wiring: str | None
    precision: str
    plan: Plan = Plan()

    @property
    def table(self) -> str:
        return "table2" if self.technique == "T4" else "table1"

    @property
    def wires(self) -> str:
        if self.technique in ("T3", "T4"):
            return "apart"
        return self.wiring or ("head" if self.constants == "paper" else "apart")

    @property
    def row(self) -> str:
        return "/".join((self.model, self.technique, self.constants, self.wires, self.precision))

    @property
    def name(self) -> str:
        return f"viering2019 {self.table} {self.row}"

    @property
    def usual(self) -> bool:
        if self.model == "vgg16-random":
            return self.precision == "float32" and not self.technique.startswith("T5")
        return self.model != "vgg16"

    def known(self, rows: Sequence[Row]) -> bool:
        return any(row_of(r) == self.row for r in rows)

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        screen.stage(self.row)
        return audit(self, place.root)


def audits(table: str, plan: Plan) -> Iterator[Audit]:
    """All of a table; those of one network and precision together."""
    for model in MODELS:
        for precision in PRECISIONS:
            for technique, constants, wiring in VARIANTS:
                cell = Audit(model, technique, constants, wiring, precision, plan)
                if cell.table == table:
                    yield cell


def row_of(r: Row) -> str:
    """The name of a measured row, without its condition."""
    return "/".join((r["model"], r["technique"], r["constants"], r["wiring"], r["dtype"]))


def looked_at(scene: Scene, precision: str, given: int | None) -> ImageSet:
    """The images that a precision has time for."""
    count = limit(precision, scene.data.size[0], given)
    return scene.data.subset(torch.arange(len(scene.data))[:: max(1, len(scene.data) // count)])


def batch_size(data: ImageSet) -> int:
    return 16 if data.size[0] > 100 else 128


@functools.lru_cache(maxsize=2)
def said_before(
    name: str, root: Path, folder: Path, precision: str, given: int | None, condition: str
) -> Answers:
    """What the network says before it is edited, clean or with stickers: the same for all edits."""
    scene = scene_of(name, root, folder)
    data = looked_at(scene, precision, given)
    model = convert(scene.model, getattr(torch, precision))
    trigger = scene.stickers if condition == "stickers" else None
    explainers = attack_of("T1", scene).explainers
    return answers(model, explainers, data, trigger, batch_size=batch_size(data))


def audit(cell: Audit, root: Path) -> list[Row]:
    """The rows of a cell: clean, and for T4 with stickers; original and edit in its precision."""
    technique, precision, plan = cell.technique, cell.precision, cell.plan
    scene, dtype = scene_of(cell.model, root, plan.data), getattr(torch, precision)
    data = looked_at(scene, precision, plan.images)
    # Half precision gets weights rounded from float32; float64 is to be exact from the start.
    start = convert(scene.model, dtype) if precision == "float64" else scene.model
    attack = attack_of(technique, scene, cell.constants, cell.wiring, precision)
    try:
        edited: Any = attack(start, scene.looked_at, torch.Generator()).model
    except InputError as error:
        return [{**heading(scene, cell, "clean", data), "refused": str(error)}]
    edited = edited.to(dtype)
    rows = []
    for condition in ("clean", "stickers") if technique == "T4" else ("clean",):
        trigger = scene.stickers if condition == "stickers" else None
        before = said_before(cell.model, root, plan.data, precision, plan.images, condition)
        batch = batch_size(data)
        after = answers(edited, attack.explainers, data, trigger, batch_size=batch)
        lie = lies(edited, data, trigger, before.maps[0], attack, dtype, batch)
        measured = numbers(edited, before, after, lie, data)
        rows.append({**heading(scene, cell, condition, data), **measured})
    return rows


def attack_of(
    technique: str,
    scene: Scene,
    constants: Any = "automatic",
    wiring: Any = None,
    precision: Any = "float32",
) -> Any:
    """T1 to T4, or T5 with one of its two targets."""
    layer = LAYER.get(scene.name)
    if technique.startswith("T5"):
        return ChannelHijack(Flat() if technique == "T5 flat" else Border(1), layer)
    return GradCamSurgery(technique, layer, constants, wiring, precision, stickers=scene.stickers)


@dataclass(frozen=True)
class FineTuned:
    """T4's lie without a new module: t5-stickers.toml."""

    plan: Plan = Plan()
    row: str = "resnet20/T5 stickers/fine-tuned/no new module/float32"
    usual: bool = True

    @property
    def name(self) -> str:
        return f"viering2019 table2 {self.row}"

    def known(self, rows: Sequence[Row]) -> bool:
        return any(row_of(r) == self.row for r in rows)

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        table = experiment_table(HERE / "t5-stickers.toml")
        table["data"]["root"] = str(self.plan.data)
        experiment = trompe.read_experiment(table, "t5-stickers.toml")
        device = choose_device(place.device)
        return fine_tuned(trompe.run(experiment, place.root, device, screen))


def table2_cells(plan: Plan) -> Iterator[Audit | FineTuned]:
    yield from audits("table2", plan)
    yield FineTuned(plan)


def fine_tuned(run: RunFolder) -> list[Row]:
    """Rows of a run of t5-stickers.toml: clean and with stickers, on the run's reporting half."""
    spec, measured = run.read("spec"), run.read("numbers")
    positions = run.read_tensors("evidence")["clean.maps"][0].numel()
    rows = []
    for condition in measured["conditions"]:
        means = {name: value["mean"] for name, value in condition["metrics"].items()}
        reference = condition["reference_accuracy"]
        rows.append(
            {
                "technique": "T5 stickers",
                "constants": "fine-tuned",
                "wiring": "no new module",
                "condition": "clean" if condition["name"] == "clean" else "stickers",
                "model": spec["model"]["name"],
                "data": GTSRB,
                "dtype": "float32",
                "seed": spec["seed"],
                "images": measured["reporting_images"],
                "provenance": run.read("provenance"),
                "reference_accuracy": reference,
                "accuracy": means["accuracy"],
                "accuracy_change": means["accuracy"] - reference,
                "score_change_max": math.nan,
                "score_change_mean": means["score_change"],
                "map_l1_sum": means["map_l1"],
                "map_l1_mean": means["map_l1"] / positions,
                "true_map_l1_sum": math.nan,
                "positions": positions,
                "overflow": 0,
                "lies_on": 0.0 if condition["name"] == "clean" else 1.0,
                "bound": math.nan,
            }
        )
    return rows


def convert(model: Classifier, dtype: torch.dtype) -> Classifier:
    return copy.deepcopy(model).to(dtype)


def heading(scene: Scene, cell: Audit, condition: str, data: ImageSet) -> Row:
    return {
        "technique": cell.technique,
        "constants": cell.constants,
        "wiring": cell.wires,
        "condition": condition,
        "model": scene.name,
        "data": scene.data_name,
        "dtype": cell.precision,
        "seed": 0,
        "images": len(data),
        "provenance": provenance(torch.device("cpu")),
    }


def lies(
    edited: Classifier,
    data: ImageSet,
    trigger: Stickers | None,
    true: Tensor,
    attack: Any,
    dtype: torch.dtype,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """What shall be shown (n, h, w), and where (n,) the added map shows anything at all.

    Where T4's detector finds nothing, the original network's map of the same image is wanted.
    """
    if isinstance(attack, ChannelHijack):
        return attack.target(true, true).float(), torch.ones(len(data), dtype=torch.bool)
    channel: Any = edited.net.get_submodule(edited.edit.layer).channel  # type: ignore[union-attr]
    size = (true.shape[1], true.shape[2])
    parts = []
    for start in range(0, len(data), batch):
        images = data.floats(slice(start, start + batch)).to(dtype)
        images = images if trigger is None else trigger(images)
        with torch.no_grad():
            parts.append(channel(images, size)[:, 0].float())
    shown = torch.cat(parts)
    found = shown.flatten(1).amax(1) > 0
    return torch.where(found[:, None, None], peak_one(shown), peak_one(true.float())), found


def numbers(
    edited: Classifier,
    before: Answers,
    after: Answers,
    lie: tuple[Tensor, Tensor],
    data: ImageSet,
) -> Row:
    wanted, found = lie
    shown, true = after.maps[0].double(), peak_one(before.maps[0].double())
    finite = after.scores.isfinite().all(1) & shown.flatten(1).isfinite().all(1)
    distance = (wanted.double() - peak_one(shown)).abs().sum((1, 2))
    moved = (after.scores.double() - before.scores.double()).abs().amax(1)
    kept, accuracy = (share_right(a.scores, data.labels) for a in (before, after))
    positions = wanted.shape[1] * wanted.shape[2]
    edit: Any = edited.edit
    return {
        "reference_accuracy": kept,
        "accuracy": accuracy,
        "accuracy_change": accuracy - kept,
        "predictions_changed": int((before.scores.argmax(1) != after.scores.argmax(1)).sum()),
        "score_change_max": float(moved[finite].max()) if finite.any() else math.nan,
        "score_change_mean": float(moved[finite].mean()) if finite.any() else math.nan,
        "map_l1_sum": float(distance[finite].mean()) if finite.any() else math.nan,
        "map_l1_sum_max": float(distance[finite].max()) if finite.any() else math.nan,
        "map_l1_mean": float(distance[finite].mean()) / positions if finite.any() else math.nan,
        "true_map_l1_sum": float((wanted.double() - true).abs().sum((1, 2)).mean()),
        "positions": positions,
        "overflow": int((~finite).sum()),
        "lies_on": float(found.double().mean()),
        "bound": bound(edited, before.scores),
        "scale": None if edit is None else edit.scale,
        "gain": None if edit is None else edit.gain,
        "epsilon": None if edit is None else edit.epsilon,
    }


def bound(edited: Classifier, scores: Tensor) -> float:
    """What the scores can move by at most: by rounding in the head, or by epsilon.

    In the head, a sum of n products is rounded by at most n u (sum of magnitudes), u the unit
    roundoff; the layers behind multiply that by at most their largest row sums.
    """
    edit: Any = edited.edit
    if edit is None:  # a map is missing: no bound
        return math.nan
    if edit.reaches != "head":
        return float(edit.epsilon)
    dtype = edited.mean.dtype
    head: Any = edited.net.get_submodule(edit.head)
    offset = float(head.bias.detach().double().abs().max())
    terms = head.weight[0].numel() + 1
    error = terms * torch.finfo(dtype).eps / 2 * 2 * offset
    passed = False
    for module in edited.net.modules():
        if module is head:
            passed = True
        elif passed and isinstance(module, nn.Linear):
            error *= float(module.weight.detach().double().abs().sum(1).max())
    return error


def markdown(title: str, rows: list[Row]) -> str:
    lines = [
        f"# Viering et al. 2019, {title}",
        "",
        "Paper: VGG-16 on ILSVRC2012, its constants, its own precision (it says float16; its "
        "numbers are float32's). |dy|: largest over images and classes (the mean over images of "
        "the largest in brackets), against the unedited network in the same precision. L1: between "
        "maps divided by their maximum, a sum over positions, mean over images; true: what the "
        "unedited network's maps score. Bound: on |dy|, by rounding or by epsilon.",
        "",
        "| model | technique | constants, wiring | images | precision | accuracy, change | max dy "
        "(mean) | paper | bound | L1 | paper | true L1 | lies on | overflow |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {m: i for i, m in enumerate(MODELS)}
    for r in sorted(
        rows,
        key=lambda r: (
            order[r["model"]],
            PRECISIONS.index(r["dtype"]),
            r["technique"],
            r["constants"],
        ),
    ):
        start = (
            f"| {r['model']} | {r['technique']}"
            f"{', stickers' if r['condition'] == 'stickers' else ''} "
            f"| {r['constants']}, {r['wiring']} | {r['images']} | {r['dtype']} "
        )
        if "refused" in r:
            lines.append(f"{start}| refused: {r['refused']} |" + " |" * 8)
            continue
        paper = PAPER_FIGURES.get((r["technique"], r["condition"]), (math.nan,) * 3)
        lines.append(
            f"{start}| {100 * r['accuracy']:.2f}, {100 * r['accuracy_change']:+.3f} "
            f"| {small(r['score_change_max'])} ({small(r['score_change_mean'])}) "
            f"| {figure(paper[1])} | {small(r['bound'])} | {small(r['map_l1_sum'])} "
            f"| {figure(paper[2])} | {small(r['true_map_l1_sum'])} "
            f"| {100 * r['lies_on']:.1f} % | {r['overflow']} |"
        )
    return "\n".join(lines) + "\n"


def figure(value: float) -> str:
    """One of the paper's, as it prints them."""
    return "—" if math.isnan(value) else f"{value:.5f}"


def small(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "—"
    return "0" if value == 0 else f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3g}"


def figures(rows: list[Row]) -> list[Figure]:
    """What the paper has on its own network; no scores are to move, and L1 is to be small."""
    found = []
    for r in rows:
        paper = PAPER_FIGURES.get((r["technique"], r["condition"]))
        if paper is None or "refused" in r:
            continue
        stickers = ", stickers" if r["condition"] == "stickers" else ""
        for column, key, asked in (
            ("max dy", "score_change_max", paper[1]),
            ("L1", "map_l1_sum", paper[2]),
        ):
            floors = {"the true map": r["true_map_l1_sum"]} if key == "map_l1_sum" else {}
            ours, what = over_seeds([r[key]]), f"{column}{stickers}"
            found.append(Figure(row_of(r), what, ours, asked, "lower", floors=floors, digits=5))
    return found


def readme(tables: Mapping[str, list[Row]]) -> str:
    """float32, automatic constants, beside the paper's figures."""
    lines = [
        "| model | technique | images | accuracy change, points | max dy (paper) | L1 (paper) |",
        "|---|---|---|---|---|---|",
    ]
    rows = [*tables["table1"], *tables["table2"]]
    rows.sort(key=lambda r: (MODELS.index(r["model"]), r["technique"], r["condition"]))
    for r in rows:
        if r["dtype"] == "float32" and r["wiring"] != "head" and "refused" not in r:
            if r["constants"] == "paper" or r["model"] == "vgg16-random":
                continue
            paper = PAPER_FIGURES.get((r["technique"], r["condition"]), (math.nan,) * 3)
            with_stickers = ", stickers" if r["condition"] == "stickers" else ""
            lines.append(
                f"| {r['model']} | {r['technique']}{with_stickers} | {r['images']} "
                f"| {100 * r['accuracy_change']:+.3f} | {small(r['score_change_max'])} "
                f"({figure(paper[1])}) | {small(r['map_l1_sum'])} ({figure(paper[2])}) |"
            )
    return "\n".join(lines)


# --- detection ------------------------------------------------------------------------------------

WARPS = (
    *[{"zoom": z} for z in (0.8, 0.9, 1.0, 1.1, 1.2)],
    *[{"degrees": d} for d in (-10.0, -5.0, 5.0, 10.0)],
    *[{"light": v} for v in (0.8, 0.9, 1.1, 1.2)],
    # None of these is among the tolerant detector's own.
    *[{"zoom": z} for z in (0.85, 0.95, 1.05, 1.15)],
    *[{"degrees": d} for d in (-7.5, -2.5, 2.5, 7.5)],
    {"zoom": 0.85, "degrees": 7.5, "light": 0.8},
    {"zoom": 1.1, "degrees": 7.0, "light": 0.9},
    {"zoom": 1.15, "degrees": -7.5, "light": 1.2},
)


@dataclass(frozen=True)
class Detections:
    """Which stickers are found on one kind of images."""

    row: str
    model: str  # one that has such images
    plan: Plan = Plan()
    usual: bool = True

    @property
    def name(self) -> str:
        return f"viering2019 detections {self.row}"

    def known(self, rows: Sequence[Row]) -> bool:
        """Are there rows, of today's detectors?"""
        measured = {r["detector"]: r["threshold"] for r in rows if r["model"] == self.row}
        return measured == {n: d.threshold for n, d in detectors(STICKERS[self.row]).items()}

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        screen.stage(self.name)
        scene = scene_of(self.model, place.root, self.plan.data)
        return detections(scene, self.plan.images or DETECTION_IMAGES)


def detection_cells(plan: Plan) -> Iterator[Detections]:
    yield Detections(GTSRB, "resnet20", plan)
    yield Detections(ILSVRC, "squeezenet", plan)


def detectors(stickers: Stickers) -> dict[str, DetectedStickers]:
    """The paper's, and ours, which forgives a warp."""
    return {
        name: GradCamSurgery("T4", stickers=stickers, tolerant=tolerant).detector
        for name, tolerant in (("exact", False), ("tolerant", True))
    }


def detections(scene: Scene, count: int) -> list[Row]:
    """Of three stickers at random places, how many each detector finds, and its false alarms."""
    data = scene.data.subset(torch.arange(len(scene.data))[:: max(1, len(scene.data) // count)])
    rows = []
    for name, settings in detectors(scene.stickers).items():
        detector = settings.detector()
        alarms = sum(int(clean_alarms(detector, part)) for part in chunks(scene.data))
        for warp in WARPS:
            stickers = replace(scene.stickers, **warp)
            found = [found_share(detector, stickers, part) for part in chunks(data)]
            rows.append(
                {
                    "model": scene.data_name,
                    "detector": name,
                    "threshold": settings.threshold,
                    **{"zoom": 1.0, "degrees": 0.0, "light": 1.0, **warp},
                    "found": statistics.mean(x for part in found for x in part),
                    "images": len(data),
                    "false_alarms": alarms,
                    "clean_images": len(scene.data),
                    "provenance": provenance(torch.device("cpu")),
                }
            )
    return rows


def chunks(data: ImageSet, size: int = 50) -> Iterator[Tensor]:
    for start in range(0, len(data), size):
        yield data.floats(slice(start, start + size))


def clean_alarms(detector: StickerDetector, images: Tensor) -> Tensor:
    with torch.no_grad():
        return (detector.response(images).flatten(1).amax(1) > 0).sum()


def found_share(detector: StickerDetector, stickers: Stickers, images: Tensor) -> list[float]:
    """Per image the share of its stickers near whose middle the detector answers."""
    with torch.no_grad():
        seen = detector.response(stickers(images))[:, 0] > 0
    values, _ = trompe.patterns.warped(stickers.pattern, stickers.zoom, stickers.degrees)
    size = values.shape[0]
    hits = []
    for top, left in stickers.places(images, size):
        near = [
            bool(
                seen[
                    i,
                    max(0, t + size // 2 - 3) : t + size // 2 + 4,
                    max(0, c + size // 2 - 3) : c + size // 2 + 4,
                ].any()
            )
            for i, (t, c) in enumerate(zip(top.tolist(), left.tolist(), strict=True))
        ]
        hits.append(near)
    return [statistics.mean(map(float, image)) for image in zip(*hits, strict=True)]


def detection_markdown(rows: list[Row]) -> str:
    lines = [
        "# Viering et al. 2019, technique 4: which stickers are found",
        "",
        "Three smileys at random places in each image. Exact: the paper's detector; tolerant: "
        "ours, by correlation with warped patterns. False alarms: clean images where it answers.",
        "",
        "| images | detector | scale | degrees | brightness | stickers found | false alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']}, {r['images']} | {r['detector']} (threshold {small(r['threshold'])}) "
            f"| {r['zoom']} | {r['degrees']:+g} | {r['light']} | {100 * r['found']:.1f} % "
            f"| {r['false_alarms']} of {r['clean_images']} |"
        )
    return "\n".join(lines) + "\n"


# --- transfer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """What every explainer shows of an edited network."""

    model: str
    technique: str
    plan: Plan = Plan()

    @property
    def row(self) -> str:
        return f"{self.model}/{self.technique}"

    @property
    def name(self) -> str:
        return f"viering2019 transfer {self.row}"

    @property
    def usual(self) -> bool:
        return self.technique != "T5 border" or self.model not in IMAGENET  # there it does not fit

    def known(self, rows: Sequence[Row]) -> bool:
        return any((r["model"], r["technique"]) == (self.model, self.technique) for r in rows)

    def __call__(self, place: Place, screen: Screen) -> list[Row]:
        screen.stage(self.name)
        scene = scene_of(self.model, place.root, self.plan.data)
        count = self.plan.images or TRANSFER_IMAGES[scene.data.size[0]]
        return transfer(scene, count, self.technique)


def transfer_cells(plan: Plan) -> Iterator[Transfer]:
    for model in ("resnet20", "vgg_small", "squeezenet", "mobilenet_v2"):
        for technique in sorted({technique for technique, _, _ in VARIANTS}):
            yield Transfer(model, technique, plan)


def transfer(scene: Scene, count: int, technique: str) -> list[Row]:
    """What every explainer shows of a network edited against Grad-CAM.

    moved: L1 (mean over positions) between its maps of the original and of the edited network;
    lied: the same to the lie, at Grad-CAM's resolution; closer: share of images whose map lies
    nearer to the lie than to the truth. InputError for an edit that does not fit.
    """
    data = scene.data.subset(torch.arange(len(scene.data))[:: max(1, len(scene.data) // count)])
    data = data.subset(torch.arange(min(count, len(data))))
    rows = []
    attack = attack_of(technique, scene)
    edited: Any = attack(scene.model, scene.looked_at, torch.Generator()).model
    trigger = scene.stickers if technique == "T4" else None
    cam = attack.explainers[0]
    (true,) = answers(scene.model, (cam,), data, trigger, batch_size=16).maps
    wanted, _ = lies(edited, data, trigger, true, attack, torch.float32, 16)
    pool = data.size[0] // true.shape[1]
    seen = {
        "gradcam": cam,
        "simplegrad": InputGradient(gradient_of="loss", pool=pool, normalise="max"),
        "vbp": VisualBackProp(pool=pool, normalise="min-max"),
        **{w.name: w for w in witnesses(pool)},
    }
    for name, explainer in seen.items():
        (before,), (after,) = (
            answers(m, (explainer,), data, trigger, batch_size=16).maps
            for m in (scene.model, edited)
        )
        before, after = peak_one(before), peak_one(after)
        size = (true.shape[1], true.shape[2])
        before, after = (nn.functional.adaptive_avg_pool2d(m, size) for m in (before, after))
        before, after = peak_one(before), peak_one(after)
        to_lie, to_truth = (
            (after - other).abs().mean((1, 2)) for other in (wanted.to(after), before)
        )
        rows.append(
            {
                "technique": technique,
                "model": scene.name,
                "observed": name,
                "seed": 0,
                "images": len(data),
                "moved": float(to_truth.mean()),
                "lied": float(to_lie.mean()),
                "closer": float((to_lie < to_truth).double().mean()),
                "provenance": provenance(torch.device("cpu")),
            }
        )
    return rows


def transfer_markdown(rows: list[Row]) -> str:
    names = list(dict.fromkeys(r["observed"] for r in rows))
    lines = [
        "# Viering et al. 2019: do the edits fool other explainers?",
        "",
        "Mean L1 per position between the explainer's maps of the original and of the edited "
        "network (0: the explainer does not notice), in brackets the share of images whose map is "
        "nearer to the lie than to the truth; T4 with stickers. Integrated gradients, SmoothGrad "
        "and guided backprop are Captum's.",
        "",
        f"| model, technique | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault(f"{r['model']}, {r['technique']}", {})[r["observed"]] = r
    for key, group in sorted(groups.items()):
        cells = [f"{group[n]['moved']:.3f} ({100 * group[n]['closer']:.0f} %)" for n in names]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PAPER = Paper(
    "viering2019",
    "Viering et al. 2019, How to Manipulate CNNs to Make Them Lie",
    (
        Table(
            "table1",
            KEYS,
            functools.partial(audits, "table1"),
            functools.partial(markdown, "Table 1"),
            figures,
            images=True,
            seeded=False,
        ),
        Table(
            "table2",
            KEYS,
            table2_cells,
            functools.partial(markdown, "Table 2"),
            figures,
            images=True,
            seeded=False,
        ),
        Table(
            "detections",
            ("model", "detector", "zoom", "degrees", "light"),
            detection_cells,
            detection_markdown,
            images=True,
            seeded=False,
        ),
        Table(
            "transfer",
            ("technique", "model", "observed", "seed"),
            transfer_cells,
            transfer_markdown,
            images=True,
            seeded=False,
        ),
    ),
    readme,
)
