"""Seats for jobs on a Dask cluster that somebody else started (docs/cluster.md).

`distributed` is an optional dependency: pip install 'trompe[cluster]'.

Dask's own futures are waited for, not those of its `Client.get_executor`: if a result is lost with
its worker, and its work is then given up, the executor's future never ends (distributed 2026.8.0:
an exception of `Future._result` is lost in `_cascade_future`).
"""

import contextlib
import importlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from trompe.interfaces import InputError, TrompeError
from trompe.screen import Screen

ANSWERS_WITHIN = 10.0  # seconds: a scheduler that is asked for the first time
BACK_WITHIN = 300.0  # seconds: one that has answered before, after a restart
# Dask blames a worker's death on work that only waited there, too: it is believed the second time,
# when of all that it has blamed before only this one is at work.
VERDICTS = 2
GPU = {"GPU": 1}  # what a worker with a GPU offers: dask worker --resources GPU=1


def require_dask(address: str) -> Any:
    """The package `distributed`; InputError if it is not installed."""
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise InputError(
            f"scheduler {address}: needs Dask; pip install 'trompe[cluster]'"
        ) from error


class Unreachable(TrompeError):
    """A scheduler that answered once does not come back."""


class Cluster:
    """The workers of the scheduler at `address`. Leaving the `with` withdraws what is not done.

    A worker that dies is Dask's affair: it gives the work to another. If the scheduler is started
    again, work that it has forgotten is handed in again. gpus: only workers that offer a GPU.
    Raises InputError if there is no scheduler.
    """

    def __init__(self, address: str, gpus: bool, screen: Screen) -> None:
        self._dask, self._address, self._gpus = require_dask(address), address, gpus
        self._connecting, self._left = threading.Lock(), False
        self._suspects = threading.Lock()
        self._futures = set[Any]()
        try:
            self._client = self._connect(ANSWERS_WITHIN)
        except (OSError, ValueError) as error:
            raise InputError(
                f"scheduler {address}: does not answer ({error}); start one with dask scheduler, "
                "or correct the address (tcp://HOST:PORT)"
            ) from error
        self._screen, self._count = screen, self._workers()
        if not self._count:
            offer = " that offers GPU=1" if gpus else ""
            screen.note(f"scheduler {address} has no worker{offer} yet; waiting for one")

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._left = True
        for future in list(self._futures):
            future.cancel()
        self._client.close(timeout=ANSWERS_WITHIN)

    def count(self) -> int:
        """As many as there are workers now; before the first has come, one work may wait."""
        if self._client.status == "running":
            with contextlib.suppress(OSError):  # the scheduler has just gone; `run` waits for it
                self._count = self._workers()
        return max(1, self._count)

    def _workers(self) -> int:
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return sum(not self._gpus or bool(w["resources"].get("GPU")) for w in workers)

    def run(self, work: Callable[..., Any]) -> Any:
        """work(), called by a worker. Raises Unreachable if the scheduler is gone for good."""
        for _ in range(1, VERDICTS):
            with contextlib.suppress(self._dask.KilledWorker):
                return self._result(work)
        with self._suspects:  # without the others, one of which may be who kills
            try:
                return self._result(work)
            except self._dask.KilledWorker as error:
                raise TrompeError(
                    "the workers that ran it died, one after the other: killed, or out of "
                    "memory; the same command goes on with it"
                ) from error

    def _result(self, work: Callable[..., Any]) -> Any:
        """Of work that is handed in again whenever the scheduler was gone. Or KilledWorker."""
        while True:
            resources = GPU if self._gpus else None
            future = self._connected().submit(work, pure=False, resources=resources)
            self._futures.add(future)
            if self._left:  # since it was handed in
                future.cancel()
            try:
                return future.result()
            except CancelledError:  # the scheduler has gone
                if self._left:
                    raise TrompeError("interrupted") from None
            finally:
                self._futures.discard(future)

    def _connect(self, seconds: float) -> Any:
        """A client of the scheduler; one that gets no answer is closed, and its thread ended.

        Left to the garbage collector it would be closed whenever that comes by: if the next client
        is about to start its thread then, it waits for itself (distributed 2026.8.0, LoopRunner).
        """
        client = self._dask.Client.__new__(self._dask.Client)
        try:
            client.__init__(self._address, timeout=seconds, set_as_default=False)
        except BaseException:
            client.close()
            client._loop_runner.stop()  # close leaves it to itself where it has ended already
            raise
        return client

    def _connected(self) -> Any:
        """The client, when its scheduler is there again."""
        with self._connecting:
            if self._client.status == "running":
                return self._client
            self._screen.note(f"scheduler {self._address} is gone; waiting for it")
            give_up = time.monotonic() + BACK_WITHIN
            while self._client.status != "running":
                if self._left:
                    raise TrompeError("interrupted")
                late = time.monotonic() > give_up
                if self._client.status == "connecting" and not late:
                    time.sleep(0.1)  # it tries by itself for a while
                    continue
                try:
                    self._client = self._connect(ANSWERS_WITHIN)
                except OSError as error:
                    if late:
                        raise Unreachable(
                            f"scheduler {self._address}: has not answered for "
                            f"{BACK_WITHIN / 60:.0f} minutes ({error}); what is done is kept: the "
                            "same command goes on"
                        ) from error
            return self._client
