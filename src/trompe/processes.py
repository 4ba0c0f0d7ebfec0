"""Seats for jobs in processes of this machine.

Each seat has a pool of one process. In a pool of several, the death of one process ends the others
too, and nobody can say whose job it was.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from trompe.interfaces import EpochRecord, TrompeError
from trompe.machine import choose_threads, cores
from trompe.screen import Silent

DEATHS = 4  # of one job's process, none of which kept an epoch more than the one before
_spawn = multiprocessing.get_context("spawn")  # forked, a process could use no GPU


class Processes:
    """As many processes as `count`, each with so many CPU threads (None: its share of the cores).

    A process that dies is replaced, and its work done again. Leaving the `with` ends them all, and
    so does the death of this process.
    """

    def __init__(self, count: int, threads: int | None = None) -> None:
        told = os.environ.get("OMP_NUM_THREADS", "")
        share = int(told) if told.isdigit() else cores() // count
        self._seats = [_Seat(number, threads or max(1, share)) for number in range(count)]
        self._free = queue.SimpleQueue[_Seat]()
        for seat in self._seats:
            self._free.put(seat)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for seat in self._seats:
            seat.leave()
        for _ in self._seats:
            self._free.get().close()  # when nobody waits for its work any more

    def count(self) -> int:
        return len(self._seats)

    def run(self, work: Callable[..., Any]) -> Any:
        """work(screen, seat's number), called in a process. TrompeError if that dies too often."""
        seat = self._free.get()
        try:
            return seat.run(work)
        finally:
            self._free.put(seat)


class _Seat:
    """One process after the other, each of which takes the place of a dead one."""

    def __init__(self, number: int, threads: int) -> None:
        self._number, self._threads = number, threads
        self._kept = _spawn.RawValue("Q")  # whole epochs that the process told of
        self._pool: ProcessPoolExecutor | None = None
        self._line: Connection | None = None  # the process ends when this is closed
        self._left, self._opening = False, threading.Lock()

    def run(self, work: Callable[..., Any]) -> Any:
        deaths = 0
        while deaths < DEATHS:
            self._kept.value = 0
            try:
                return self._submit(work).result()
            except BrokenProcessPool:
                self.close()
                if self._left:
                    break
                deaths = 1 if self._kept.value else deaths + 1
        if self._left:
            raise TrompeError("interrupted")
        raise TrompeError(
            f"its process died {deaths} times without getting further: it was killed, or memory "
            "ran out (fewer --workers need less)"
        )

    def _submit(self, work: Callable[..., Any]) -> Any:
        with self._opening:
            if self._left:
                raise BrokenProcessPool
            if self._pool is None:
                self._line, theirs = _spawn.Pipe()
                words = (self._number, self._threads, theirs, self._kept)
                self._pool = ProcessPoolExecutor(1, _spawn, _begin, words)
            with _environment("OMP_NUM_THREADS", str(self._threads)):
                return self._pool.submit(_at_seat, work)

    def leave(self) -> None:
        """End the process, whatever it does, and begin no other."""
        with self._opening:
            self._left = True
            if self._line is not None:
                self._line.close()

    def close(self) -> None:
        """End the process and wait until it has."""
        with self._opening:
            pool, line, self._pool, self._line = self._pool, self._line, None, None
        if line is not None:
            line.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


_setting = threading.Lock()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Inside, new processes find this variable: libraries read it before they run anything."""
    with _setting:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


# From here on: in the process.

_number = 0
_counter: Any = None


def _begin(number: int, threads: int, line: Connection, kept: Any) -> None:
    global _number, _counter
    _number, _counter = number, kept
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent closes the line
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    choose_threads(threads)


def _end_with(line: Connection) -> None:
    """When the parent closes its end, or dies, this process has nobody to work for."""
    with contextlib.suppress(EOFError, OSError):
        line.recv()
    os._exit(1)


def _at_seat(work: Callable[..., Any]) -> Any:
    return work(_Counting(), _number)


class _Counting(Silent):
    """Counts epochs: what is kept of a job even if its process dies."""

    def epoch(self, record: EpochRecord) -> None:
        _counter.value += 1
