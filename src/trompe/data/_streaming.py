"""Images that stay on disk: read whenever they are asked for, ahead of need by other processes."""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import cloudpickle
import numpy as np
import torch
from loky import BrokenProcessPool, get_reusable_executor
from torch import Tensor

from trompe.data import _decoding
from trompe.data._decoding import Examined, Stamp, decode_unchanged, examine, serve
from trompe.interfaces import InputError
from trompe.machine import cores

AHEAD = 2  # parts that wait, read, for each process that reads
IDLE_SECONDS = 300  # after which a reading process ends; the next need starts it again
_EXAMINED_TOGETHER = 64

# Readers get the functions themselves instead of importing trompe, which would import torch: 40 MB
# and a fraction of a second for each of them instead of 300 MB and several seconds.
cloudpickle.register_pickle_by_value(_decoding)


@dataclass(frozen=True)
class ImageFiles:
    """Image files as uint8 (n, 3, size, size): a StoredImages.

    files: names of all; stamps: int64 (all, 2), of each what `examine` found; index: int64 (n,),
    which of them these images are. readers: how many processes read ahead in `in_turn`, see
    `reading_processes`; they change no pixel. All of it takes about 200 bytes an image, whatever
    its size.

    Files that are removed or changed later are an InputError when they are asked for; those that
    are added play no part.
    """

    files: Sequence[str]
    stamps: Tensor
    index: Tensor
    size: int
    crop: bool = False
    readers: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    @property
    def digest(self) -> str:
        """Of the files' names and stamps, and of how they are brought to size."""
        digest = hashlib.sha256(f"{self.size} {self.crop}".encode())
        for i in self.index.tolist():
            digest.update(os.fsencode(self.files[i]) + b"\0")
        digest.update(self.stamps[self.index].numpy().tobytes())
        return digest.hexdigest()

    def subset(self, index: Tensor) -> "ImageFiles":
        return replace(self, index=self.index[index])

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return _whole(decode_unchanged(*self._asked(index)))

    def in_turn(self, parts: Iterable[Tensor | slice]) -> Iterator[Tensor]:
        asked = (self._asked(part) for part in parts)
        yield from map(_whole, in_turn(decode_unchanged, asked, self.readers))

    def _asked(self, index: Tensor | slice) -> tuple[list[str], list[Stamp], int, bool]:
        rows = self.index[index]
        names = [self.files[i] for i in rows.tolist()]
        stamps = [Stamp(*stamp) for stamp in self.stamps[rows].tolist()]
        return names, stamps, self.size, self.crop


def _whole(images: np.ndarray | str) -> Tensor:
    if isinstance(images, str):
        raise InputError(images)
    return torch.from_numpy(images)


def examined(
    files: Sequence[str], size: int, crop: bool, readers: int | None, keep_going: bool
) -> tuple[Tensor, list[str]]:
    """Of each file its stamp, int64 (n, 2), and what is wrong with it; see `examine`.

    Up to the first that is unreadable if not `keep_going`. No pixel is kept.
    """
    starts = range(0, len(files), _EXAMINED_TOGETHER)
    asked = ((files[i : i + _EXAMINED_TOGETHER], size, crop) for i in starts)
    stamps, problems = torch.full((len(files), 2), -1, dtype=torch.int64), []
    found: Iterator[Examined] = chain.from_iterable(in_turn(examine, asked, readers))
    for i, one in enumerate(found):
        stamps[i] = torch.tensor(one.stamp)
        problems.append(one.problem)
        if one.problem and not keep_going:
            break
    return stamps, problems


def in_turn(
    function: Callable[..., Any], asked: Iterable[tuple[Any, ...]], readers: int | None
) -> Iterator[Any]:
    """function(*arguments) for all of `asked` in turn, so many processes working ahead.

    No more than a few answers wait at any time, so that a slow consumer fills no memory.
    """
    count = reading_processes(readers)
    if count == 0:
        for arguments in asked:
            yield function(*arguments)
        return
    waiting: deque[Future[Any]] = deque()
    try:
        for arguments in asked:
            # One pool for all sets; asked for anew, as its idle processes end. Loky's, because it
            # does not run a user's script again in each process, as the standard library's would.
            pool = get_reusable_executor(
                count, timeout=IDLE_SECONDS, initializer=serve, initargs=(os.getpid(),)
            )
            waiting.append(pool.submit(function, *arguments))
            if len(waiting) > AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "reading images: a reading process was killed, perhaps because memory ran out; set "
            "data.readers to fewer (0: none), and start again"
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def reading_processes(wanted: int | None) -> int:
    """As wanted; by default half of the cores, at most 8 and no more than torch has threads here,

    as other runs may share the machine. 0 where processes may not be started: in a process that is
    itself a daemon, as those of Dask's workers are.
    """
    if multiprocessing.current_process().daemon:
        return 0
    if wanted is None:
        return max(1, min(8, cores() // 2, torch.get_num_threads()))
    return wanted
