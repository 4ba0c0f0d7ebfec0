"""A study: the points of a search, each handed out once, to however many searches ask for one.

Optuna keeps it, in a file or a database; one trial is one attempt at a point. Optuna alone could
hand out a point of the grid twice when two processes ask at once, and would never hand out again
what a killed process had. So here

* the k-th trial that is no second attempt is the k-th point, whoever asked for it; Optuna numbers
  trials one after the other, so all searches agree on k. Trials beyond the last point are void;
* a search lets its heart beat in the study. When another one has seen no beat for a while, the
  points that the first had are handed out again: as second attempts, the first of which counts.
"""

import contextlib
import copy
import functools
import math
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import GridSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from trompe.interfaces import InputError

BEAT = 10.0  # seconds between two beats of a search's heart
_MISSED = 6  # beats, after which a search counts as dead
_GONE = "gone"  # the last beat of a search that ended in good order
# What is noted of a trial:
_SEARCH = "search"  # who has it
_AGAIN = "again"  # the number of the trial that it repeats
_ERROR = "error"  # why it failed
_FINAL = "final"  # it would fail again

State = Literal["complete", "pruned", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Search:
    """What is tried, in which order, and when it is given up: a table [search].

    parameters: an experiment's key ("attack.weight") -> a list of values, or for tpe a range:
    {low, high}, both whole or both real numbers, and log = true for one of orders of magnitude.
    sampler: "grid" tries all combinations, in random order; "tpe" (Bergstra et al. 2011) learns
    from what it tried. trials: at most so many points; tpe needs it.
    score: which of the numbers that the attack measures after an epoch; lower is better.
    pruning: a point is given up after an epoch if its score is not among the best share `keep` of
    those that finished points had after the same epoch (1/2: the median rule of Golovin et al.
    2017); the first `unpruned` points are all finished, for there is nothing to compare with.
    names: what tables and pictures call a parameter; by default the last part of its key.
    """

    parameters: Mapping[str, Any]
    sampler: Literal["grid", "tpe"] = "grid"
    trials: int | None = None
    score: str = "score"
    pruning: bool = True
    keep: float = 0.5
    unpruned: int = 5
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parameters:
            raise InputError("parameters: is empty; give at least one key and its values")
        for key, values in self.parameters.items():
            _distribution(key, values)
            if isinstance(values, Mapping) and self.sampler == "grid":
                raise InputError(
                    f"parameters.{key}: is a range, but a grid needs a list of values; give one, "
                    'or sampler = "tpe"'
                )
        if self.sampler == "tpe" and self.trials is None:
            raise InputError("trials: is missing; tpe needs the number of points to try")
        if self.trials is not None and self.trials < 1:
            raise InputError(f"trials = {self.trials}: must be at least 1")
        if not 0 < self.keep <= 1:
            raise InputError(f"keep = {self.keep}: must lie in (0, 1]")
        if self.unpruned < 1:
            raise InputError(f"unpruned = {self.unpruned}: must be at least 1")
        if unknown := set(self.names) - set(self.parameters):
            raise InputError(f"names.{min(unknown)}: is none of the parameters")

    @property
    def points(self) -> int:
        """How many are tried."""
        if self.sampler == "tpe":
            assert self.trials is not None
            return self.trials
        grid = math.prod(len(values) for values in self.parameters.values())
        return grid if self.trials is None else min(grid, self.trials)

    def name(self, key: str) -> str:
        """What tables and pictures call a parameter."""
        last = key.rpartition(".")[2]
        alone = sum(other.rpartition(".")[2] == last for other in self.parameters) == 1
        return self.names.get(key, last if alone else key)


def _distribution(key: str, values: Any) -> BaseDistribution:
    """What Optuna draws a parameter from. InputError for what is neither a list nor a range."""
    if isinstance(values, list | tuple) and values:
        if not all(
            value is None or isinstance(value, bool | int | float | str) for value in values
        ):
            raise InputError(f"parameters.{key}: holds more than numbers, words, true and false")
        return optuna.distributions.CategoricalDistribution(values)
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values):
        raise InputError(
            f"parameters.{key} = {values!r}: must be a list of values, or a range such as "
            "{ low = 1e-4, high = 1e-2, log = true }"
        )
    whole = all(isinstance(values[end], int) for end in ("low", "high"))
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"parameters.{key}: is no range ({error})") from error


@dataclass(frozen=True)
class Ticket:
    """With it a worker tells a study what a point's scores are; can be sent to other machines."""

    storage: str
    study: str
    trial: int
    search: Search

    def report(self, epoch: int, score: float) -> bool:
        """Is the point hopeless, now that its score after this epoch is known?"""
        with reaching(self.storage):
            study = optuna.load_study(
                study_name=self.study,
                storage=_opened(self.storage),
                sampler=RandomSampler(),  # it is not asked: the point is chosen
                pruner=_pruner(self.search),
            )
            trial = Trial(study, self.trial)
            # A finished trial has been given to another search: this attempt is void, but goes on.
            with contextlib.suppress(UpdateFinishedTrialError):
                if epoch not in study._storage.get_trial(self.trial).intermediate_values:
                    trial.report(score, epoch)
                return trial.should_prune()
            return False


class Study:
    """A study, as one of the searches that may share it sees it.

    storage: a file, or a database's URL. name: of the study therein, made if it is not there.
    seed: of the order of the points; all that share a study give the same.
    """

    def __init__(
        self, storage: str, name: str, search: Search, seed: int, beat: float = BEAT
    ) -> None:
        self.storage, self.name, self.search, self.seed = storage, name, search, seed
        self.beat, self.me = beat, f"search {uuid.uuid4().hex}"
        sampler = _Grid(search, seed) if search.sampler == "grid" else RandomSampler()
        with reaching(storage):
            self.study = optuna.create_study(
                storage=_opened(storage),
                sampler=sampler,
                pruner=_pruner(search),
                study_name=name,
                load_if_exists=True,
            )
        self.mine: dict[int, Trial] = {}  # under way, by number
        self.seen: dict[int, tuple[Any, float]] = {}  # others' trials: sign of life, since when

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Inside, the heart beats."""
        stop = threading.Event()

        def beating() -> None:
            count = 0
            while not stop.wait(self.beat):
                count += 1
                with contextlib.suppress(Exception):  # the main thread meets it, too, and says so
                    self.study.set_user_attr(self.me, count)

        self.study.set_user_attr(self.me, 0)
        heart = threading.Thread(target=beating, daemon=True)
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
            with contextlib.suppress(Exception):  # a database may be what failed
                self.study.set_user_attr(self.me, _GONE)

    def points(self) -> list[FrozenTrial]:
        """Per point, in the order in which they were handed out: the attempt that counts."""
        return _points(self.study)[: self.search.points]

    @property
    def done(self) -> bool:
        """Is there nothing left to do, here or in another search?"""
        points = self.points()
        return len(points) == self.search.points and not any(_open(trial) for trial in points)

    @property
    def left(self) -> bool:
        """Is there a point that nobody has?"""
        points = self.points()
        waiting = any(trial.state == TrialState.WAITING for trial in points)
        return waiting or len(points) < self.search.points

    def ask(self) -> Trial | None:
        """The next point, or None if all are taken; its settings are in `params`."""
        while self.left:
            trial = self.study.ask()
            trial.set_user_attr(_SEARCH, self.me)
            place = _place(self.study, trial.number)
            if place is None or place >= self.search.points:  # another one was quicker
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            if self.search.sampler == "tpe":  # not the same draws in each search
                seed = (1_000_003 * self.seed + place) % 2**32
                self.study.sampler = TPESampler(seed=seed, constant_liar=True)
            for key, values in self.search.parameters.items():
                _suggest(trial, key, values)
            self.mine[trial.number] = trial
            return trial
        return None

    def ticket(self, trial: Trial) -> Ticket:
        """For the worker that tries this point."""
        return Ticket(self.storage, self.name, trial._trial_id, self.search)

    def tell(
        self,
        number: int,
        score: float,
        notes: Mapping[str, Any],
        pruned: bool = False,
        error: str = "",
        final: bool = True,
    ) -> None:
        """What came of a trial. error: why it failed; final: it would fail again."""
        trial = self.mine.pop(number)
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        # If others took us for dead, the point is theirs.
        with contextlib.suppress(UpdateFinishedTrialError):
            for key, value in notes.items():
                trial.set_user_attr(key, value)
            if error:
                state = TrialState.FAIL
                trial.set_user_attr(_FINAL, final)
                trial.set_user_attr(_ERROR, error)
            value = score if state == TrialState.COMPLETE else None
            self.study.tell(trial, value, state, skip_if_finished=True)

    def take_back(self, failed: bool = False) -> None:
        """Hand out again what dead searches had; failed: and what might not fail again.

        A search counts as dead when several calls have seen no beat of it.
        """
        beats, now = self.study.user_attrs, time.monotonic()
        for trial in self.points():
            if trial.number in self.mine or trial.state == TrialState.WAITING:
                continue
            attributes = trial.user_attrs
            if _open(trial):
                beat = beats.get(attributes.get(_SEARCH, ""))
                sign = (trial.state, attributes.get(_SEARCH), beat)
                if self.seen.get(trial.number, (None,))[0] != sign:
                    self.seen[trial.number] = (sign, now)
                dead = now - self.seen[trial.number][1] > _MISSED * self.beat
                again = beat == _GONE or dead
            else:
                again = failed and trial.state == TrialState.FAIL and not attributes[_FINAL]
            if again:
                self._repeat(trial)

    def _repeat(self, trial: FrozenTrial) -> None:
        if trial.state == TrialState.RUNNING:
            try:
                self.study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, UpdateFinishedTrialError):  # it lives, or another took it back
                return
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={_AGAIN: trial.number},
                system_attrs=trial.system_attrs,
            )
        )


def state_of(trial: FrozenTrial) -> State:
    """In a word."""
    words: dict[TrialState, State] = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
    }
    return "running" if _open(trial) and trial.state == TrialState.FAIL else words[trial.state]


def error_of(trial: FrozenTrial) -> str:
    """Why it failed, "" if it did not."""
    return str(trial.user_attrs.get(_ERROR, ""))


def _open(trial: FrozenTrial) -> bool:
    """Is its outcome not known yet? One that was taken back fails without an error."""
    return not trial.state.is_finished() or (
        trial.state == TrialState.FAIL and _ERROR not in trial.user_attrs
    )


def _chains(study: optuna.Study) -> list[list[FrozenTrial]]:
    """Per point all attempts that count: of several repetitions of one trial, the first."""
    again: dict[int, FrozenTrial] = {}
    chains = []
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number):
        if _AGAIN in trial.user_attrs:
            again.setdefault(trial.user_attrs[_AGAIN], trial)
        else:
            chains.append([trial])
    for chain in chains:
        while chain[-1].number in again:
            chain.append(again[chain[-1].number])
    return chains


def _points(study: optuna.Study) -> list[FrozenTrial]:
    return [chain[-1] for chain in _chains(study)]


def _place(study: optuna.Study, number: int) -> int | None:
    """Of which point this trial is an attempt that counts, from 0; None of none."""
    for place, chain in enumerate(_chains(study)):
        if any(trial.number == number for trial in chain):
            return place
    return None


class _Grid(GridSampler):
    """Optuna's grid, with each point handed out once."""

    def __init__(self, search: Search, seed: int) -> None:
        super().__init__({key: list(values) for key, values in search.parameters.items()}, seed)
        self.points = search.points

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        place = _place(study, trial.number)
        if place is not None and place < self.points:
            trial = copy.copy(trial)
            trial.number = place  # the number of a trial chooses the point of the grid
            super().before_trial(study, trial)

    def after_trial(self, *_: Any, **__: Any) -> None:
        """Optuna would stop its own loop after the last point; here is none."""


def _suggest(trial: Trial, key: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        trial.suggest_categorical(key, values)
    elif isinstance(_distribution(key, values), optuna.distributions.IntDistribution):
        trial.suggest_int(key, **values)
    else:
        trial.suggest_float(key, **values)


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    if not search.pruning:
        return optuna.pruners.NopPruner()
    return optuna.pruners.PercentilePruner(100 * search.keep, search.unpruned, n_warmup_steps=1)


@functools.lru_cache(maxsize=4)  # one connection a process, not one a report
def _opened(storage: str) -> BaseStorage:
    """A file, or a database. InputError if it cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(storage))
        return _database(re.sub("^postgres(ql)?://", "postgresql+psycopg://", storage))
    except ImportError as error:
        raise InputError(
            f"storage {without_password(storage)}: needs a package that is not there "
            f"({error.__cause__ or error}); "
            "pip install 'trompe[cluster]'"
        ) from error
    except OSError as error:
        raise InputError(
            f"storage {storage}: cannot be written ({error.strerror}); choose another root"
        ) from error


def _database(url: str) -> RDBStorage:
    while True:
        try:
            return RDBStorage(url, {"pool_pre_ping": True})
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            if "exists" not in str(error):
                raise
            time.sleep(0.1)  # another search makes the same tables at this moment


@contextlib.contextmanager
def reaching(storage: str) -> Iterator[None]:
    """Inside, what is wrong with a database is an InputError."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        cause: Any = error.__cause__ or error
        reason = " ".join(str(getattr(cause, "orig", cause)).split())
        raise InputError(
            f"storage {without_password(storage)}: cannot be used ({reason}); correct its address, "
            "or start it; then the same command goes on"
        ) from error


def without_password(text: str) -> str:
    """The text without the passwords of the URLs in it."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
