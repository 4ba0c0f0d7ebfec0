"""Many runs: here, in processes, on a Dask cluster; and what they survive."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tiny_jobs import (
    DiesAtOnce,
    DiesWithItsResult,
    Marked,
    Raises,
    Steps,
    Unfit,
    Untravelled,
    Where,
    written,
)
from trompe import cluster
from trompe.experiment import AttackJob
from trompe.interfaces import InputError, TrompeError
from trompe.machine import own_gpu
from trompe.many import Crew, Job, Outcome, Place, crew_of, run_jobs
from trompe.processes import DEATHS
from trompe.screen import Plan, Silent

ATTACK: dict[str, Any] = {
    "name": "tiny",
    "reference": "shipped:signs_resnet20_seed0",
    "witness": "shipped:signs_resnet20_seed1",
    "data": {"kind": "signs", "size": 24, "train_images": 60, "test_images": 44},
    "gallery_images": 2,
    "attack": {
        "kind": "explanation_aware_backdoors",
        "goals": [
            {
                "trigger": {"kind": "rectangle", "top": 14, "left": 8, "height": 4, "width": 8},
                "label": 3,
                "wanted_map": {"kind": "picture", "shape": "triangle"},
            }
        ],
        "training": {"epochs": 3, "batch_size": 15},
    },
}


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attacks(count: int) -> list[AttackJob]:
    return [AttackJob({**ATTACK, "seed": seed}) for seed in range(count)]


def by_name(outcomes: Iterator[Outcome]) -> dict[str, Outcome]:
    return {outcome.job.name: outcome for outcome in outcomes}


def wait_for(what: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)
    return found


class Plans(Silent):
    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)


# Here, one after the other


def test_here_a_failed_job_stops_no_other_and_says_why(tmp_path: Path) -> None:
    place = Place(tmp_path)
    jobs = [Steps("a"), Raises("b"), Unfit("c/d"), Raises("e", SystemExit), Steps("f")]
    found = by_name(run_jobs(jobs, place))
    assert list(found) == ["a", "b", "c/d", "e", "f"]
    assert found["a"][1:3] == ([1, 2, 3], "")
    assert found["f"][1:3] == ([1, 2, 3], "")
    file = tmp_path / ".failed" / "b.txt"
    expected = f"ZeroDivisionError: nothing can be divided by [0] (traceback in {file})"
    assert found["b"][1:3] == (None, expected)
    assert "in __call__" in file.read_text()
    assert found["c/d"].error == "weight = 7: must lie in 0..1"
    assert found["e"].error.startswith("SystemExit: nothing")
    assert {file.name for file in file.parent.iterdir()} == {"b.txt", "e.txt"}


def test_jobs_are_taken_one_by_one_and_may_learn_from_outcomes(tmp_path: Path) -> None:
    told: list[str] = []

    def jobs() -> Iterator[Steps]:
        for name in "abc":
            assert told == list("abc"[: len(told)])
            assert len(told) == "abc".index(name)
            yield Steps(name)

    for outcome in run_jobs(jobs(), Place(tmp_path)):
        told.append(outcome.job.name)
    assert told == ["a", "b", "c"]


def test_ctrl_c_here_is_no_outcome(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs([Raises("a", KeyboardInterrupt)], Place(tmp_path)))


def test_a_full_disk_hides_no_cause(tmp_path: Path) -> None:
    (tmp_path / ".failed").write_text("a file where the folder should be")
    (outcome,) = run_jobs([Raises("a")], Place(tmp_path))
    assert outcome.error == "ZeroDivisionError: nothing can be divided by [0]"


def test_remaining_time_is_of_what_was_computed(tmp_path: Path) -> None:
    pause = 0.05
    jobs = [Steps(name, 2, pause) for name in "abcde"]
    list(run_jobs(jobs[:2], Place(tmp_path)))
    heard = Plans()
    list(run_jobs([*jobs, Unfit("f")], Place(tmp_path), screen=heard))
    assert [plan.done for plan in heard.plans] == [0, 1, 2, 3, 4, 5, 5]
    assert [plan.failed for plan in heard.plans] == [0] * 6 + [1]
    assert {plan.total for plan in heard.plans} == {6}
    assert [plan.running for plan in heard.plans] == [(name,) for name in "abcdef"] + [()]
    remaining = [plan.remaining for plan in heard.plans]
    assert remaining[:3] == [None] * 3  # a and b were there
    assert remaining[3] is not None
    assert remaining[3] >= 3 * 2 * pause - 0.01  # d, e, f
    assert remaining[-1] == 0


def test_of_an_endless_plan_the_total_can_be_told(tmp_path: Path) -> None:
    heard = Plans()
    list(run_jobs((Steps(name) for name in "ab"), Place(tmp_path), screen=heard))
    assert {(plan.total, plan.remaining) for plan in heard.plans} == {(None, None)}
    list(run_jobs((Steps(name) for name in "ab"), Place(tmp_path), screen=heard, total=2))
    assert heard.plans[-1].total == 2


# In processes


def test_workers_run_all_jobs_side_by_side(tmp_path: Path) -> None:
    names = [Where(f"where {number}") for number in range(4)]
    jobs: list[Job] = [Raises("b"), Unfit("c"), Untravelled("d"), *names, Steps("e")]
    heard = Plans()
    before = os.environ.get("OMP_NUM_THREADS")
    found = by_name(run_jobs(jobs, Place(tmp_path), crew_of(2, threads=2), heard))
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert set(found) == {job.name for job in jobs}
    assert found["b"].error.startswith("ZeroDivisionError: nothing can be divided by [0] (trace")
    assert found["c"].error == "weight = 7: must lie in 0..1"
    assert "pickle" in found["d"].error
    assert found["e"].result == [1, 2, 3]
    where = [found[job.name].result for job in names]
    processes = {one["process"] for one in where}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {(one["threads"], one["told"]) for one in where} == {(2, "2")}
    assert max(len(plan.running) for plan in heard.plans) == 2
    assert (heard.plans[-1].done, heard.plans[-1].failed) == (5, 3)
    assert not any(map(psutil.pid_exists, processes))


def test_a_job_whose_process_dies_again_and_again_fails_alone(tmp_path: Path) -> None:
    killer = Steps("b", DEATHS + 1, dies_after=tuple(range(1, DEATHS + 1)))
    found = by_name(run_jobs([DiesAtOnce("a"), killer], Place(tmp_path), crew_of(2, threads=1)))
    assert f"its process died {DEATHS} times without getting further" in found["a"].error
    assert (tmp_path / "a.begun").read_text() == "x" * DEATHS
    # As often, but each time it got further:
    assert found["b"][1:3] == (list(range(1, DEATHS + 2)), "")
    assert len({process for _, process in written(tmp_path / "b.steps")}) == DEATHS + 1


def test_leaving_early_ends_the_workers(tmp_path: Path) -> None:
    for outcome in run_jobs(
        [Steps("short"), Steps("long", 1000, 1.0)], Place(tmp_path), crew_of(2, threads=1)
    ):
        assert outcome.job.name == "short"
        wait_for(lambda: written(tmp_path / "long.steps"))
        break
    ((_, process), *_) = written(tmp_path / "long.steps")
    wait_for(lambda: not psutil.pid_exists(process))
    assert len(written(tmp_path / "long.steps")) < 100


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_main_process_takes_its_workers_along_and_goes_on(
    tmp_path: Path, end: signal.Signals
) -> None:
    def start() -> subprocess.Popen:
        code = (
            "import signal, sys, tiny_jobs; from pathlib import Path\n"
            "from trompe.many import Place, crew_of, run_jobs\n"
            # A shell's background job ignores Ctrl-C, and so would its children.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "jobs = [tiny_jobs.Steps(name, 6, waits_after=2) for name in 'abc']\n"
            "for outcome in run_jobs(jobs, Place(Path(sys.argv[1])), crew_of(2, threads=1)):\n"
            "    assert outcome.result == [1, 2, 3, 4, 5, 6], outcome\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )

    main = start()
    wait_for(lambda: all(len(written(tmp_path / f"{name}.steps")) == 2 for name in "ab"))
    main.send_signal(end)
    assert main.wait(120) in (-end, 130)
    processes = {process for name in "ab" for _, process in written(tmp_path / f"{name}.steps")}
    assert len(processes) == 2
    wait_for(lambda: not any(map(psutil.pid_exists, processes)))
    assert not (tmp_path / "c.steps").exists()
    (tmp_path / "go").touch()
    again = start()
    assert again.wait(300) == 0, again.communicate()[1]
    for name in "abc":
        assert [step for step, _ in written(tmp_path / f"{name}.steps")] == [1, 2, 3, 4, 5, 6]


def environment() -> dict[str, str]:
    """Processes find the package and the jobs of the tests where this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


RUNS, KILLS_EACH = 10, 2


def test_twenty_kills_change_no_bit_of_ten_runs(tmp_path: Path) -> None:
    """At random moments one of two workers is killed; each run has to bear two such deaths."""
    calm, wild = Place(tmp_path / "calm", "cpu"), Place(tmp_path / "wild", "cpu")
    undisturbed = by_name(run_jobs(attacks(RUNS), calm, Crew(threads=1)))
    assert [outcome.error for outcome in undisturbed.values()] == [""] * RUNS
    length = sorted(outcome.seconds for outcome in undisturbed.values())[RUNS // 2]
    wild.root.mkdir()
    killed: list[str] = []
    over = threading.Event()

    def kill() -> None:
        dice = random.Random(0)
        while len(killed) < RUNS * KILLS_EACH and not over.wait(0.01):
            begun = {int(file.stem): file for file in sorted(wild.root.glob("*.begun"))}
            jobs = {process: file.read_text() for process, file in begun.items()}
            alive = [process for process in jobs if killed.count(jobs[process]) < KILLS_EACH]
            if alive:
                process = dice.choice(alive)
                time.sleep(dice.uniform(0, 1.2 * length))
                os.kill(process, signal.SIGKILL)
                begun[process].unlink()
                killed.append(jobs[process])
                (wild.root / f"{jobs[process]}.killed").write_text("x" * killed.count(killed[-1]))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        jobs = [Marked(job, KILLS_EACH) for job in attacks(RUNS)]
        disturbed = by_name(run_jobs(jobs, wild, crew_of(2, threads=1)))
    finally:
        over.set()
        killer.join()
    assert len(killed) == RUNS * KILLS_EACH
    assert [outcome.error for outcome in disturbed.values()] == [""] * RUNS
    for name, outcome in undisturbed.items():
        one, other = Path(outcome.result), Path(disturbed[name].result)
        assert one.name == other.name
        for file in ("model.safetensors", "evidence.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), (name, file)


@pytest.mark.parametrize(
    ("device", "seat", "expected"),
    [
        ("auto", 0, "cuda:0"),
        ("auto", 4, "cuda:1"),
        ("cuda", 2, "cuda:2"),
        ("cuda:1", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
    ],
)
def test_workers_take_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, device: str, seat: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_gpu(device, seat) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_gpu(device, seat) == device


def test_a_crew_that_cannot_be_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^workers = 0: must be at least 1$"):
        crew_of(0)
    with pytest.raises(InputError, match=r"^threads = 0: must be at least 1$"):
        crew_of(2, threads=0)
    with pytest.raises(InputError, match="as many workers as were started there"):
        crew_of(2, "tcp://localhost:8786")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(
        InputError, match=r"^scheduler tcp://a:1: needs Dask; pip install 'trompe\[cluster\]'$"
    ):
        crew_of(scheduler="tcp://a:1")


# On a Dask cluster


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{port}", "tcp://127.0.0.1", "nonsense://x"])
def test_a_scheduler_that_does_not_answer_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    address = address.format(port=free_port())
    monkeypatch.setattr(cluster, "ANSWERS_WITHIN", 0.3)
    before = set(threading.enumerate())
    with pytest.raises(InputError, match=f"^scheduler {address}: does not answer") as kept:
        list(run_jobs([Steps("a")], Place(tmp_path), crew_of(scheduler=address)))
    assert not (tmp_path / "a.steps").exists()
    # Its client is no garbage that ends its thread while the next one starts its own.
    assert kept.tb is not None
    assert not [t for t in set(threading.enumerate()) - before if t.name == "IO loop"]


class Dask:
    """A scheduler and workers, started by hand."""

    def __init__(self, port: int) -> None:
        self.port, self.address = port, f"tcp://127.0.0.1:{port}"
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", str(port))
        self.workers: list[subprocess.Popen] = []

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words, "--no-dashboard"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start_worker(self, *words: str) -> None:
        self.workers.append(self.start("worker", self.address, "--nthreads", "1", *words))

    def restart_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port))

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.kill()
            process.wait()


@pytest.fixture
def dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dask]:
    # A port of the system's choice: another process may take it, but hardly in this moment.
    monkeypatch.setattr(cluster, "ANSWERS_WITHIN", 120.0)  # this machine may be slow
    one = Dask(free_port())
    yield one
    one.stop()


def test_a_cluster_survives_its_workers(tmp_path: Path, dask: Dask) -> None:
    dask.start_worker("--nworkers", "2")
    jobs: list[Job] = [
        Steps("a", dies_after=(2,)),
        DiesAtOnce("b"),
        Raises("c"),
        Unfit("d"),
        Steps("e"),
        AttackJob({**ATTACK, "seed": 0}),
    ]
    place = Place(tmp_path, "cpu")
    found = by_name(run_jobs(jobs, place, crew_of(scheduler=dask.address)))
    assert found["a"][1:3] == ([1, 2, 3], "")
    assert len({process for _, process in written(tmp_path / "a.steps")}) == 2
    assert "workers that ran it died, one after the other" in found["b"].error
    # Dask gives up after four deaths; some may have been of a worker on which it only waited.
    assert 4 <= len((tmp_path / "b.begun").read_text()) <= cluster.VERDICTS * 4
    assert found["c"].error.startswith("ZeroDivisionError: nothing can be divided by [0] (trace")
    assert found["d"].error == "weight = 7: must lie in 0..1"
    assert found["e"].error == ""
    assert (Path(found["tiny-s0"].result) / "numbers.json").exists()


def test_a_result_that_was_lost_and_cannot_be_had_again_is_told(
    tmp_path: Path, dask: Dask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Futures of Dask's own executor never end then (distributed 2026.8.0)."""
    monkeypatch.setattr(cluster, "VERDICTS", 1)
    dask.start_worker()
    place, jobs = Place(tmp_path), [DiesWithItsResult("a")]
    found: list[Outcome] = []
    plan = threading.Thread(
        target=lambda: found.extend(run_jobs(jobs, place, crew_of(scheduler=dask.address))),
        daemon=True,
    )
    plan.start()
    plan.join(180)
    assert not plan.is_alive()
    assert "workers that ran it died, one after the other" in found[0].error


def test_a_plan_survives_a_restart_of_the_scheduler(tmp_path: Path, dask: Dask) -> None:
    dask.start_worker()
    outcomes: list[Outcome] = []

    def consume() -> None:
        jobs = [Steps("a", 2), Steps("b", 30, 0.2), Steps("c", 2)]
        outcomes.extend(run_jobs(jobs, Place(tmp_path), crew_of(scheduler=dask.address)))

    plan = threading.Thread(target=consume, daemon=True)
    plan.start()
    wait_for(lambda: written(tmp_path / "b.steps"))
    dask.restart_scheduler()
    dask.start_worker()  # workers end with their scheduler
    plan.join(300)
    assert not plan.is_alive()
    assert [outcome.job.name for outcome in outcomes] == ["a", "b", "c"]
    assert [outcome.error for outcome in outcomes] == [""] * 3
    assert {step for step, _ in written(tmp_path / "b.steps")} == {*range(1, 31)}


def test_a_scheduler_that_is_gone_for_good_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dask: Dask
) -> None:
    dask.start_worker()
    plan = run_jobs(
        [Steps("a", 1), Steps("b", 1000, 0.2)], Place(tmp_path), crew_of(scheduler=dask.address)
    )
    assert next(plan).job.name == "a"
    monkeypatch.setattr(cluster, "BACK_WITHIN", 0.0)
    monkeypatch.setattr(cluster, "ANSWERS_WITHIN", 0.3)
    threading.Timer(1.0, dask.scheduler.kill).start()
    with pytest.raises(TrompeError, match=f"^scheduler {dask.address}: has not answered for 0"):
        next(plan)
