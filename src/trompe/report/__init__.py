"""An HTML page about one or several runs, or a figure. Reads run folders, runs no model."""

from trompe.report.gallery_picture import draw_gallery
from trompe.report.render import render

__all__ = ["draw_gallery", "render"]
