"""A hash of what lies in a data folder: changed data make another run, moved ones the same."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def hash_of_files(root: Path, sized: Iterable[Path], whole: Iterable[Path] = ()) -> str:
    """sha256 over each file's path below `root`, and its size in bytes or all of its bytes.

    sized: images; to read them all would take minutes. whole: lists, in which a changed digit
    matters. Their order does not count, nor when a file was written, nor where `root` is.
    """
    digest = hashlib.sha256()
    for file in sorted(sized):
        size = file.stat().st_size if file.exists() else "missing"
        digest.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
    for file in sorted(whole):
        of_bytes = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()} {of_bytes}\n".encode())
    return digest.hexdigest()
