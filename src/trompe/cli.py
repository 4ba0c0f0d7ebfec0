"""The command line. Each command gathers arguments and calls one function."""

import contextlib
import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trompe import catalog
from trompe.classifier import SHIPPED, load_model
from trompe.clean_models import train_clean_model
from trompe.data._reading import IMG_EXTENSIONS
from trompe.experiment import (
    AttackJob,
    Experiment,
    drop_key,
    experiment_table,
    note_streamed,
    read_experiment,
    remeasure,
    run,
    set_key,
    shipped_experiment,
)
from trompe.explaining import explain
from trompe.files import read_json
from trompe.interfaces import InputError, Trigger, TrompeError
from trompe.machine import choose_device, choose_threads
from trompe.many import Crew, Job, Outcome, Place, crew_of, run_jobs
from trompe.measure_victims import victims_name, victims_of
from trompe.poisoning import Victims, poison, read_poisoning, read_run
from trompe.printing import (
    megabytes,
    print_cells,
    print_differences,
    print_numbers,
    print_papers,
    print_poisons,
    print_runs,
    print_search,
    print_table,
    print_victims,
)
from trompe.ranks import Lost, device_here, is_first, joined, started
from trompe.replicating import (
    Plan,
    Results,
    paper_names,
    read_paper,
    replicate,
    to_run,
)
from trompe.replicating import choose as choose_cells
from trompe.report import draw_gallery, render
from trompe.report.gallery_picture import KINDS
from trompe.report.poison_pictures import draw_maps, draw_poisons
from trompe.report.search_pictures import draw_search
from trompe.run_list import (
    Run,
    choose,
    list_runs,
    remove,
    rename_old,
)
from trompe.runs import RunFolder
from trompe.screen import Screen, Silent, console, progress_bars
from trompe.search import read_search, search

app = typer.Typer(
    help="Can this model's explanations be trusted?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: the idle cores.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the experiment's seed.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a setting: attack.weight=0.95; KEY= leaves it out.",
    ),
]
Skip = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave unreadable images out; record which.")
]
Root = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]
Workers = Annotated[
    int, typer.Option(help="Runs at once, each in a process of its own; a GPU each if there are.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="tcp://HOST:PORT", help="Run on the workers of this Dask cluster."),
]


def _prepare(device: str, threads: int | None) -> Any:
    if started().count > 1:
        raise InputError(
            "torchrun: several processes can share trompe attack, train and demo; start this "
            "command without it"
        )
    return _chosen(device, threads)


def _chosen(device: str, threads: int | None) -> Any:
    chosen = choose_device(device_here(device))
    count, processes = choose_threads(threads), started().count
    told = f"  on {chosen}, {count} CPU thread{'s' if count > 1 else ''}"
    if started().rank == 0:
        told += f"; the first of {processes} processes" if processes > 1 else ""
        console.print(told, highlight=False)
    return chosen


def _gather(device: str, threads: int | None, workers: int, scheduler: str | None) -> Crew:
    """Who runs many runs; says where, as `_prepare` does for one."""
    crew = crew_of(workers, scheduler, threads)
    if scheduler is not None:
        console.print(f"  on the workers of {scheduler}", highlight=False)
    elif workers > 1:
        console.print(f"  on {choose_device(device)}, {workers} processes", highlight=False)
    else:
        _prepare(device, threads)
    return crew


def _run_all(jobs: Sequence[Job], place: Place, crew: Crew) -> list[Outcome]:
    """Their outcomes, in the order of the jobs."""
    with progress_bars() as bars:
        found = {id(outcome.job): outcome for outcome in run_jobs(jobs, place, crew, bars)}
    return [found[id(job)] for job in jobs]


def _end(outcomes: Sequence[Outcome]) -> None:
    """Says which runs failed, and why; exit code 1 if any did."""
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        told = f"[red]failed:[/red] {escape(f'{outcome.job.name}: {outcome.error}')}"
        console.print(told, soft_wrap=True, highlight=False)
    if failed:
        told = f"{len(failed)} of {len(outcomes)} failed; the same command tries them again"
        console.print(told, soft_wrap=True, highlight=False)
        raise typer.Exit(1)


@contextlib.contextmanager
def _bars() -> Iterator[Screen]:
    """The first of the processes that share a run shows how far it is."""
    if is_first():
        with progress_bars() as bars:
            yield bars
    else:
        yield Silent()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and the report.")] = Path("demo"),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """A dual attack on drawn traffic signs: a few minutes, no download, ends in a report."""
    chosen = _chosen(device, threads)
    with joined(chosen):
        with _bars() as bars:
            folder = run(shipped_experiment("demo"), out, chosen, bars)
        if is_first():
            file = out / "report.html"
            render([folder], file)
            print_numbers(folder)
            print(f"open {file}")


@app.command()
def train(
    experiment: Annotated[
        Path | None, typer.Argument(help="Take data, model and training from this experiment.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="What `trompe list data` shows; default: signs.")
    ] = None,
    data_root: Annotated[str | None, typer.Option(help="Folder of the data.")] = None,
    size: Annotated[int | None, typer.Option(help="Images are size x size pixels.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="resnet20 (the default), a torchvision name, or package.module:callable."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Start from this file, or torchvision's IMAGENET1K_V1.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("model"),
    seed: Seed = None,
    settings: Settings = None,
    skip_unreadable: Skip = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a clean reference model (augmentation, one-cycle). The same command resumes."""
    given = {
        "data.kind": data,
        "data.root": data_root,
        "data.size": size,
        "model.name": model,
        "model.weights": weights,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if experiment is not None:
        table = experiment_table(experiment)
        if given:
            key, value = next(iter(given.items()))
            raise InputError(
                f"{experiment} names its own {key}; to train with another, give --set {key}={value}"
            )
    else:
        table = {
            "name": "train",
            "data": {"kind": "signs"},
            "model": {"name": "resnet20"},
            # An attack belongs to every experiment; training a clean model does not use it.
            "attack": catalog.describe(shipped_experiment("demo").attack),
        }
        for key, value in given.items():
            set_key(table, key, value)
    if epochs is not None:
        table.setdefault("honest", {}).setdefault("training", {})["epochs"] = epochs
    spec = _spec(table, str(experiment or "options"), seed, settings, skip_unreadable)
    chosen = _chosen(device, threads)
    with joined(chosen):
        with _bars() as bars:
            bars.stage("reading data")
            training, test = spec.data.train(), spec.data.test()
            note_streamed(training, bars)
            file = train_clean_model(
                training,
                test,
                spec.data,
                spec.model,
                spec.honest,
                spec.seed,
                out,
                chosen,
                bars,
                out,
            )
        if is_first():
            print(f"model {file}")


@app.command()
def attack(
    experiments: Annotated[
        list[Path], typer.Argument(metavar="EXPERIMENT...", help="Experiments in TOML.")
    ],
    seed: Seed = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="A run for each of these seeds.")
    ] = None,
    settings: Settings = None,
    root: Root = Path("runs"),
    skip_unreadable: Skip = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Run experiments: clean models, attack, numbers. The same command resumes.

    One run on several GPUs: torchrun --nproc-per-node 4 -m trompe attack EXPERIMENT
    """
    jobs = []
    for file in experiments:
        for each in _seeds(seed, seeds):
            table = _table(experiment_table(file), each, settings, skip_unreadable)
            read_experiment(table, str(file))  # says what is wrong before anything runs
            jobs.append(AttackJob(table, str(file)))
    if len(jobs) == 1 and workers == 1 and scheduler is None:
        spec, chosen = read_experiment(jobs[0].table, jobs[0].where), _chosen(device, threads)
        with joined(chosen):
            with _bars() as bars:
                paths = [run(spec, root, chosen, bars).path]
            if not is_first():
                return
        outcomes = []
    else:
        if started().count > 1:
            raise InputError(
                f"{len(jobs)} runs under torchrun: it shares one run among processes; give one "
                "experiment and seed, or leave torchrun out and say --workers"
            )
        crew = _gather(device, threads, workers, scheduler)
        outcomes = _run_all(jobs, Place(root, device), crew)
        paths = [Path(outcome.result) for outcome in outcomes if not outcome.error]
    for path in paths:
        print_numbers(RunFolder(path))
        print(f"run {path}")
    _end(outcomes)


@app.command(name="search")
def search_(
    experiment: Annotated[Path, typer.Argument(help="An experiment in TOML with a [search].")],
    workers: Workers = 1,
    scheduler: Scheduler = None,
    storage: Annotated[
        str | None,
        typer.Option(help="postgresql://..., where searches on several machines share the points."),
    ] = None,
    seed: Seed = None,
    settings: Settings = None,
    root: Root = Path("runs"),
    skip_unreadable: Skip = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Try an experiment with many settings and write down the best. The same command resumes."""
    table = _table(experiment_table(experiment), seed, settings, skip_unreadable)
    spec = read_search(table, str(experiment))
    crew = _gather(device, threads, workers, scheduler)
    with progress_bars() as bars:
        folder = search(spec, root, device, crew, storage, bars)
        bars.stage("drawing")
        picture = draw_search(folder.path)
    print_search(folder.read())
    if folder.best.is_file():
        print(f"best {folder.best}")
    print(f"open {picture}")


@app.command(name="poison")
def poison_(
    experiment: Annotated[str, typer.Argument(help=f"An experiment in TOML, or {SHIPPED}poison.")],
    seed: Seed = None,
    settings: Settings = None,
    root: Root = Path("runs"),
    threads: Threads = None,
) -> None:
    """Craft samples that, added to a training set, make explanations lie; the same resumes."""
    table = _changed(experiment_table(experiment), seed, settings)
    spec = read_poisoning(table, experiment)
    _prepare("cpu", threads)
    with progress_bars() as bars:
        folder = poison(spec, root, bars)
        bars.stage("drawing")
        draw_poisons(folder)
    print_poisons(folder)
    print(f"poisons {folder.path}")


@app.command()
def victim(
    folder: Annotated[Path, typer.Argument(help="The folder that trompe poison printed.")],
    count: Annotated[int | None, typer.Option(help="Victims for each target.")] = None,
    start: Annotated[
        str | None, typer.Option(help='From what: "clean model", "new head" or scratch.')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Another architecture than the poisons were made for.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of noise on training samples.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Another setting: victims.training.batch_size=64"
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train victims on poisoned sets and on the clean one; what do their explanations show?"""
    run_ = RunFolder(folder)
    own = {k: v for k, v in catalog.describe(read_run(run_).victims).items() if v is not None}
    others = [text for text in settings or [] if text.startswith("victims.model")]
    if model is not None or not all(text.endswith("=") for text in others):
        own.pop("model", None)  # nor its weights
    table = {"victims": own}
    given = {"count": count, "start": start, "model.name": model, "noise": noise}
    for key, value in {**given, "training.epochs": epochs}.items():
        if value is not None:
            set_key(table, f"victims.{key}", value)
    table = _changed(table, None, settings)
    if other := set(table) - {"victims"}:
        raise InputError(
            f"--set {min(other)}: the poisons are made; only settings of victims can change, for "
            "instance victims.noise=0.1"
        )
    if not isinstance(table["victims"], dict):
        raise InputError(f"--set victims={table['victims']}: must read victims.KEY=VALUE")
    victims = catalog.build_dataclass(Victims, table["victims"], "victims")
    _prepare("cpu", threads)
    with progress_bars() as bars:
        numbers = victims_of(run_, victims, bars)
        bars.stage("drawing")
        picture = draw_maps(run_, victims_name(victims))
    print_victims(run_, numbers)
    print(f"numbers {run_.path / victims_name(victims)}.json")
    print(f"open {picture}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the clean models; default: the run's own.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure a run's saved model again and write its numbers."""
    chosen = _prepare(device, threads)
    with progress_bars() as bars:
        remeasure(RunFolder(folder), root, chosen, bars)
    print_numbers(RunFolder(folder))


@app.command(name="explain")
def explain_(
    model: Annotated[str, typer.Argument(help=f"A model file, a run folder, or {SHIPPED}NAME.")],
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of them.")],
    explainer: Annotated[str, typer.Option(help="See: trompe list explainers")] = "gradcam",
    layer: Annotated[str | None, typer.Option(help="Layer to read; default: found.")] = None,
    target: Annotated[int | None, typer.Option(help="Class to explain, not the predicted.")] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="Put this trigger on the images first: own (that of the run), a kind "
            '(checkerboard), or a table of settings ({ kind = "rectangle", top = 9 }).'
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="package.module:callable of a model of your own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("explanations"),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Explain image files: predicted class and a heatmap picture for each."""
    chosen = _prepare(device, threads)
    net, card = load_model(model, architecture)
    how = catalog.build("explainers", {"kind": explainer, **({"layer": layer} if layer else {})})
    print(f"{type(how).__name__} reads layer {', '.join(how.watches(net))}")
    done = explain(
        net.to(chosen),
        _image_files(images),
        how,
        card.image_size,
        target,
        None if trigger is None else _trigger(trigger, model),
        out,
    )
    table = Table("image", "class", "probability", "picture")
    for one in done:
        name = card.class_names[one.explained_class]
        flat = " (empty map)" if one.degenerate else ""
        cells = (str(one.file), name, f"{one.probability:.3f}", f"{one.picture}{flat}")
        table.add_row(*map(escape, cells))
    Console().print(table)


def _trigger(text: str, model: str) -> Trigger:
    """The trigger that --trigger names."""
    if text == "own":
        table = _own_trigger(model)
    elif text.lstrip().startswith("{"):
        table = _toml_value(text)
        if not isinstance(table, dict):
            raise InputError(
                f'--trigger {text}: is no table of TOML, such as {{ kind = "rectangle", top = 9 }}'
            )
    else:
        table = text
    trigger: Trigger = catalog.build("triggers", table, "--trigger")
    return trigger


def _own_trigger(model: str) -> Any:
    """The (first) trigger of a run's attack, as its spec has it."""
    file = Path(model) / "spec.json"
    # A stranger's file may hold anything.
    attack = _entry(read_json(file), "attack") if file.is_file() else None
    goals = _entry(attack, "goals")
    places = (attack, *(goals if isinstance(goals, list) else ()))
    kinds = [one for place in places if isinstance(one := _entry(place, "trigger"), dict)]
    if not kinds:
        raise InputError(f"--trigger own: {model} is no run of an attack with a trigger; name one")
    if ":" in str(kinds[0].get("kind")):  # code that a folder names is not run for that
        raise InputError(
            f"--trigger own: {file} asks to import {kinds[0]['kind']!r}, which would run that "
            "code; if you trust it, name it yourself"
        )
    return kinds[0]


def _entry(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else None


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path, typer.Option(help="The page to write; a .png, .pdf or .svg is its gallery alone.")
    ] = Path("report.html"),
    images: Annotated[
        int | None, typer.Option(help="At most so many in a .png, .pdf or .svg; default: 4.")
    ] = None,
) -> None:
    """One self-contained HTML page about one or several runs, or its gallery as a figure."""
    folders = [RunFolder(path) for path in runs]
    if out.suffix.lower() not in (".html", ".htm", *KINDS):
        raise InputError(f"--out {out}: must end in .html, {', '.join(KINDS)}")
    if out.suffix.lower() in KINDS:
        draw_gallery(folders, out, 4 if images is None else images)
    elif images is None:
        render(folders, out)
    else:
        raise InputError(
            f"--images {images} with --out {out}: a page shows all that the runs keep; leave it "
            "out, or write a .png, .pdf or .svg"
        )
    print(f"open {out}")


@app.command(name="runs")
def runs_(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ROOT|RUN]...", help="Folders of runs, or runs. Default: runs"),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="KEY=VALUE",
            help="Only these: name, kind, state, or a setting (attack.weight=0.9); * is any text.",
        ),
    ] = None,
    interrupted: Annotated[bool, typer.Option("--interrupted", help="Only these.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show in which settings they differ, and numbers.")
    ] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the runs that are named or filtered.")
    ] = False,
    rename: Annotated[
        bool, typer.Option("--rename", help="Give runs of earlier versions today's names.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Which runs there are; compare or remove some."""
    if compare + delete + rename > 1:
        raise InputError("trompe runs: give one of --compare, --delete and --rename")
    filters = [*(filters or []), *(["state=interrupted"] if interrupted else [])]
    places = places or [Path("runs")]
    if delete and not filters and not all((place / "spec.json").is_file() for place in places):
        raise InputError(
            "--delete: does not say which; name run folders, or choose some with --filter"
        )
    found = choose(list_runs(places), filters)
    if compare:
        print_differences(found)
    elif rename:
        rename_old(found, print)
    else:
        print_runs(found)
        if delete and found and _agreed(found, yes):
            for run_ in found:
                print(remove(run_))


def _agreed(runs: list[Run], yes: bool) -> bool:
    """Does the user want these to be removed?"""
    if yes:
        return True
    try:
        return typer.confirm(f"Remove {len(runs)} runs, {megabytes(runs):.1f} MB?")
    except typer.Abort:
        raise InputError("--delete: nobody said yes; add --yes in scripts") from None


@app.command(name="replicate")
def replicate_(
    paper: Annotated[str | None, typer.Argument(help="Without one: what there is.")] = None,
    table: Annotated[str | None, typer.Argument(help="A table; * and ? match.")] = None,
    row: Annotated[str | None, typer.Argument(help="A row; * and ? match.")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2; default: the table's own.")] = None,
    data: Annotated[Path, typer.Option(help="Folder that holds the data.")] = Path("data"),
    root: Root = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of the tables; default: results.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Look at so many at most, where a table can (and --again).")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="The size of a test, into results-small.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also rows that are there already.")
    ] = False,
    only_write: Annotated[
        bool, typer.Option("--only-write", help="Run nothing; write the pages from the rows.")
    ] = False,
    list_rows: Annotated[
        bool, typer.Option("--list", help="Run nothing; say which rows there are.")
    ] = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """A paper's tables: run what is missing, print them, write them. The same command goes on."""
    results = Results(out or Path("results-small" if small else "results"), small)
    plan = Plan(_numbers(seeds), data, images, small)
    if paper is None:
        if only_write:
            for known in map(read_paper, paper_names()):
                results.write(known)
        else:
            print_papers(results)
        return
    known = read_paper(paper)
    chosen = choose_cells(known, plan, table, row)
    missing = chosen if again else to_run(known, chosen, results)
    if list_rows:
        print_cells(chosen, missing)
        return
    outcomes: list[Outcome] = []
    if missing and not only_write:
        crew = _gather(device, threads, workers, scheduler)
        with progress_bars() as bars:
            for outcome in replicate(known, missing, results, Place(root, device), crew, bars):
                bars.note(f"{outcome.job.name} ({outcome.seconds:.0f} s)")
                outcomes.append(outcome)
    results.write(known)
    for name in chosen:
        print_table(known, name, results)
    _end(outcomes)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help=", ".join(catalog.KINDS))],
) -> None:
    """What there is of a kind, with its settings and their defaults."""
    table = Table("name", "what", "settings", show_lines=True)
    for name in catalog.names(kind):
        plugin = catalog.find(kind, name)
        what = (plugin.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
        table.add_row(name, what, _settings(plugin))
    Console().print(table)


def _settings(plugin: Any) -> str:
    if not dataclasses.is_dataclass(plugin):
        return ""
    lines = []
    for field in dataclasses.fields(plugin):
        if field.default is not dataclasses.MISSING:
            lines.append(f"{field.name} = {field.default!r}")
        else:
            needed = field.default_factory is dataclasses.MISSING
            lines.append(field.name + (" (needed)" if needed else ""))
    return "\n".join(lines)


def _seeds(seed: int | None, seeds: str | None) -> list[int | None]:
    """Those of the runs to make; None: the experiment's."""
    if seeds is None:
        return [seed]
    if seed is not None:
        raise InputError(f"--seed {seed} --seeds {seeds}: give one of the two")
    return list(_numbers(seeds) or ())


def _spec(
    table: dict[str, Any], where: str, seed: int | None, settings: list[str] | None, skip: bool
) -> Experiment:
    """The experiment with the command line's changes."""
    return read_experiment(_table(table, seed, settings, skip), where)


def _table(
    table: dict[str, Any], seed: int | None, settings: list[str] | None, skip: bool
) -> dict[str, Any]:
    """An experiment's table with the command line's changes."""
    table = _changed(table, seed, settings)
    if skip:
        if isinstance(table.get("data"), str):
            table["data"] = {"kind": table["data"]}
        set_key(table, "data.skip_unreadable", True)
    return table


def _changed(table: dict[str, Any], seed: int | None, settings: list[str] | None) -> dict[str, Any]:
    """The table with the command line's settings in it."""
    for text in settings or []:
        key, found, value = text.partition("=")
        if not found:
            raise InputError(f"--set {text}: must read KEY=VALUE, for instance attack.weight=0.95")
        try:
            if value.strip():
                set_key(table, key.strip(), _toml_value(value))
            else:
                drop_key(table, key.strip())
        except InputError as error:
            raise InputError(f"--set {error}") from error
    if seed is not None:
        table["seed"] = seed
    return table


def _toml_value(text: str) -> Any:
    """What the text means in TOML; a plain word needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """Whole numbers between commas."""
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError as error:
        raise InputError(f"--seeds {text}: must be whole numbers, for instance 0,1,2") from error


def _image_files(paths: list[Path]) -> list[Path]:
    """The files, and of folders all images in them: what else lies there is not asked for."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        else:
            files.append(path)
    if not files:
        raise InputError(f"images {', '.join(map(str, paths))}: no image found there")
    return files


def main() -> None:
    """Entry point: mistakes of the user's end in one sentence and exit code 2."""
    try:
        # Outside standalone mode typer hands a command's exit code back; 130 is Ctrl-C.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        raise SystemExit(code)
    except TrompeError as error:
        # What all processes of a run meet, one on each machine says; that one is lost, all may.
        if started().rank_here > 0 and not isinstance(error, Lost):
            raise SystemExit(2) from None
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        if started().rank_here == 0:
            console.print("interrupted; the same command goes on from what was kept")
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except Exception as error:  # click's own usage errors, whichever click typer is built on
        if not hasattr(error, "format_message"):
            raise
        console.print(f"[red]error:[/red] {escape(error.format_message())}", soft_wrap=True)
        raise SystemExit(2) from None
