"""The papers' experiments: in an installed package beside this file, in a checkout at its root.

A paper is a folder: TOML files, tables.py with its `PAPER` (see replicating.py), causes.toml.
"""

from pathlib import Path

_BESIDE = Path(__file__).parent
_CHECKOUT = _BESIDE.parents[2] / "experiments"
FOLDER = _BESIDE if any(_BESIDE.glob("*/tables.py")) else _CHECKOUT
__path__ = [str(FOLDER)]  # so that processes elsewhere can import a paper's tables by name


def names() -> list[str]:
    """The papers that there are."""
    return sorted(file.parent.name for file in FOLDER.glob("*/tables.py"))
