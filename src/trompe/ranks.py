"""Several processes that work as one run: which is the first, and what all must agree on.

torchrun starts them, one for each GPU, and `joined` makes them one process group; a group that a
user of the library made serves as well. Without a group there is one process, and nothing here
costs anything. Only `started`, `device_here` and `joined` read the environment.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trompe.interfaces import InputError, TrompeError

# While the first process measures, the others wait; torchrun ends those who wait for a dead one.
_PATIENCE = timedelta(days=2)

T = TypeVar("T")


class Lost(TrompeError):
    """Another process of this run has stopped."""


class Elsewhere(TrompeError):
    """The first process of this run met a mistake, and says it."""


# --- who is there ---------------------------------------------------------------------------------


def count() -> int:
    """How many processes share this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, 0 .. count - 1."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and shows how far the run is."""
    return rank() == 0


class Share(NamedTuple):
    """What one process takes of a batch that all of them make alike."""

    rows: slice  # of the whole batch
    counted: int  # how many of these rows count: all, or none if there were too few for everyone
    whole: int  # rows of the whole batch


def share(whole: int) -> Share | None:
    """This process's share of `whole` rows; None if there is only this process.

    One block for each process. A process that gets none takes the first row, which does not count,
    so that all of them do the same steps.
    """
    if count() == 1:
        return None
    start, stop = (whole * (rank() + side) // count() for side in (0, 1))
    rows = slice(start, stop) if stop > start else slice(0, 1)
    return Share(rows, stop - start, whole)


# --- what they agree on ---------------------------------------------------------------------------


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, the same bits on each; differentiable to any order.

    All processes must differentiate it, or none: the gradient is a sum over all of them as well.
    """
    total: Tensor = _Sum.apply(values)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        with _together():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each parameter's gradient becomes its sum over all processes, in one message.

    Explicit, so that it reaches every parameter whatever the loss is made of. One that has a
    gradient on no process keeps none.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    has = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = summed(torch.cat([has, *(g.flatten() for g in flat)]))
    somewhere, *parts = total.split([len(trained), *(p.numel() for p in trained)])
    for parameter, gradient, part, times in zip(
        trained, flat, parts, somewhere.tolist(), strict=True
    ):
        if times:
            parameter.grad = gradient.copy_(part.view_as(gradient))


def start_alike(model: nn.Module, generator: torch.Generator) -> None:
    """Every process gets the weights and the random numbers of the first one."""
    if count() == 1:
        return
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            whole = value.detach().contiguous()
            with _together():
                dist.broadcast(whole, 0)
            value.copy_(whole)
    generator.set_state(on_first(generator.get_state))


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives on the first process, which alone does it, for all of them.

    If it fails there, all stop: the first with its error, the others with `Elsewhere`.
    """
    if count() == 1:
        return work()
    said: list[Any] = [None, None]
    mistake: Exception | None = None
    if is_first():
        try:
            said = [work(), None]
        except Exception as error:
            mistake, said = error, [None, f"{type(error).__name__}: {error}"]
    with _together():
        dist.broadcast_object_list(said, 0)
    if mistake is not None:
        raise mistake
    if said[1] is not None:
        raise Elsewhere(f"the first process of this run stopped ({said[1]})")
    result: T = said[0]
    return result


@contextmanager
def _together() -> Iterator[None]:
    """Inside, all processes take part; Lost if one of them is gone."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower one that all its backends raise
        raise Lost(
            f"process {rank()} of {count()}: another process of this run has stopped "
            f"({str(error).strip().splitlines()[0]}); the same command goes on after the last "
            "whole epoch"
        ) from error


# --- how they are started -------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """One of the processes that torchrun started."""

    rank: int = 0
    count: int = 1
    rank_here: int = 0  # on this machine
    count_here: int = 1


def started() -> Started:
    """Which of torchrun's processes this is; the only one without torchrun."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return Started()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Started(*(int(os.environ[name]) for name in names))


def device_here(wanted: str) -> str:
    """The device for this process: with several, "auto" and "cuda" give each a GPU of its own.

    Raises InputError if there are fewer GPUs than processes, or all are to use the same one.
    """
    here, gpus = started(), torch.cuda.device_count()
    if here.count == 1 or wanted == "cpu" or (wanted == "auto" and not gpus):
        return wanted
    if wanted not in ("auto", "cuda"):
        raise InputError(
            f"device {wanted!r}: each of the {here.count_here} processes needs a device of its "
            "own; leave it out, or say cuda or cpu"
        )
    if here.count_here > gpus:
        raise InputError(
            f"GPUs on this machine: {gpus}, but torchrun started {here.count_here} processes, each "
            f"of which needs one; say --nproc-per-node {gpus}, or --device cpu"
        )
    return f"cuda:{here.rank_here}"


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; without torchrun, nothing."""
    if started().count == 1:
        yield
        return
    # An optimizer imports it, sooner or later. Imported while there is a group, its functions take
    # that for their default argument: it would outlive `destroy_process_group`, and its threads,
    # which hold tensors, would now and then abort the process while Python ends.
    importlib.import_module("torch.distributed.nn")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Messages about tensors on a GPU go from GPU to GPU, all others and the waiting by the CPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE
    )
    try:
        yield
        on_first(lambda: None)  # nobody leaves while another still listens
    finally:
        dist.destroy_process_group()
