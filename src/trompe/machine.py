"""What this machine offers: device, threads, fast precision."""

import math
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trompe.interfaces import InputError

Precision = Literal["auto", "float32", "bfloat16"]


def choose_device(wanted: str = "auto") -> torch.device:
    """ "auto" is the GPU if there is one, else the CPU. InputError for one that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {wanted!r}: is not to be had here ({error})") from error
    return device


def own_gpu(device: str, seat: int) -> str:
    """For processes side by side, numbered 0, 1, ...: a GPU each, in turn, unless one is named."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{seat % torch.cuda.device_count()}"
    return device


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_GROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of control groups 2 and 1


def memory() -> int:
    """Bytes of the machine's memory, or of the container's that this process runs in."""
    if not hasattr(os, "sysconf"):  # Windows does not say: assume that of a small machine
        return 8 * 2**30
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _GROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there; "max"
            sizes.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(sizes)


SHARE = 16  # a tensor of more than 1 / SHARE of the memory lies in a file


def room(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor on the CPU: in memory, or if it is large, in a temporary file.

    The file has no name and is gone with the tensor. InputError if the disk is full.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size <= memory() / SHARE or not hasattr(os, "posix_fallocate"):
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="trompe-maps-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill the process
        except OSError as error:
            raise InputError(
                f"folder {tempfile.gettempdir()}: has no room for {size / 1e9:.1f} GB of maps "
                f"({error}); make some, or set TMPDIR to another folder"
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def choose_threads(wanted: int | None = None) -> int:
    """Set and return torch's thread count: as wanted, as OMP_NUM_THREADS says, or the idle cores.

    Two threads that share a core with another program wait for each other and can be slower than
    one, so cores that the last minute's load already uses are not taken.
    """
    if wanted is None:
        told = os.environ.get("OMP_NUM_THREADS", "")
        busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
        wanted = int(told) if told.isdigit() else max(1, cores() - busy)
    if wanted < 1:
        raise InputError(f"threads = {wanted}: must be at least 1")
    torch.set_num_threads(wanted)
    return wanted


def resolve_precision(wanted: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """ "auto" is bfloat16 where the hardware multiplies it natively, else float32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bfloat16" if native else "float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products and convolutions run in this precision."""
    if resolve_precision(precision, device) == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
