"""Writing files so that a kill at any moment leaves the old file or the new one, never half."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from trompe.interfaces import InputError

Row = dict[str, Any]
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as mkstemp calls them below


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `file`, which then takes its place.

    Raises InputError if the folder cannot be written or the disk is full; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, file)
    except Exception as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, TypeError | ValueError | LookupError | AttributeError):
            raise  # a mistake in `write`, not in the disk
        # torch and safetensors report a full disk with exceptions of their own.
        raise InputError(
            f"file {file}: cannot be written ({error}); nothing was changed; choose another "
            "folder or make room there"
        ) from error
    except BaseException:  # Ctrl-C
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def clear_temporaries(folder: Path, of: str = "") -> None:
    """Remove what `write_atomically` left in `folder` and below when it was killed.

    of: only those of files whose names begin so. Nobody else may be writing such files there.
    """
    for file in folder.rglob(f".{of}*"):
        if _TEMPORARY.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """Of the file's bytes, in hex digits. InputError if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"file {file}: cannot be read ({error.strerror}); correct the path") from (
            error
        )


def write_json(file: Path, value: Any) -> None:
    """`strict_json` of `value`, indented and with a final newline, atomically."""
    text = json.dumps(strict_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # Names of files need not be UTF-8.
    encoded = text.encode("utf-8", "backslashreplace")
    write_atomically(file, lambda temporary: temporary.write_bytes(encoded))


def strict_json(value: Any) -> Any:
    """The value with None for each number that JSON does not have: nan and the infinities.

    `real` reads it.
    """
    if isinstance(value, dict):
        return {key: strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unite_rows(file: Path, found: Sequence[Row], keys: Sequence[str], **beside: Any) -> list[Row]:
    """Writes the file's rows, those found now in the place of older ones, and returns them all.

    keys: what tells rows apart. New rows come last. beside: other entries of the file. Processes
    that do so at once wait for each other.
    """
    lock = file.parent / ".locks" / f"{file.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        old = read_json(file)["rows"] if file.exists() else []
        rows = {tuple(row[key] for key in keys): row for row in (*old, *found)}
        write_json(file, {**beside, "rows": list(rows.values())})
    return list(rows.values())


def put_between(text: str, name: str, block: str) -> str:
    """`text` with `block` between its lines <!-- name:begin --> and <!-- name:end -->."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{block}\n{end}{after}"


def real(value: float | None) -> float:
    """A number as a JSON file has it, where null stands for nan."""
    return math.nan if value is None else value


def read_json(file: Path) -> Any:
    """The parsed file; InputError if it is missing or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"file {file}: does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"file {file}: cannot be read as JSON ({error})") from error
