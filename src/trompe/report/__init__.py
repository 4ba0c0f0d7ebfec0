"""One self-contained HTML page about one or several runs. Reads run folders, runs no model."""

from trompe.report.render import render

__all__ = ["render"]
