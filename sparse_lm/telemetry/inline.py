"""Pages and figures within a notebook: the same HTML that is written to files, as the output of a cell."""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path

from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.page import cards, page

PAGE_HEIGHT = 640  # pixels; what is longer scrolls within
FIGURES_HEIGHT = 500  # one row of figures with their words, at the width that a figure grows to


@dataclasses.dataclass(frozen=True)
class Inline:
    """A whole HTML document as the last value of a cell. Jupyter and Colab ask it for its markup.

    It stands in a frame of its own, so that neither its style nor its scripts meet those of the notebook.
    height: of the frame, in pixels.
    """

    document: str
    height: int

    def _repr_html_(self) -> str:
        frame = f'width="100%" height="{self.height}" style="border: 0; background: #fff" sandbox="allow-scripts"'
        return f'<iframe srcdoc="{escape(self.document)}" {frame}></iframe>'

    def __repr__(self) -> str:
        return f"Inline(document of {len(self.document):,} characters, height={self.height})"


def inline_page(path: str | Path, height: int = PAGE_HEIGHT) -> Inline:
    """A page that has been written to a file, such as the report of a run, a study or an analysis.

    Raises `FileNotFoundError` when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; write the page first, or correct the path")
    return Inline(path.read_text(encoding="utf-8"), height)


def inline_figures(*figures: Figure, height: int = FIGURES_HEIGHT) -> Inline:
    """Figures side by side, as many as the width allows. Raises `ValueError` without any."""
    if not figures:
        raise ValueError("there is no figure to show; pass one or more")
    return Inline(page(", ".join(figure.heading for figure in figures), cards(figures)), height)
