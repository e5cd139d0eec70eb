"""Tables of colours with names on both sides, in the style of `sparse_lm.telemetry.svg`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from sparse_lm.telemetry.colors import ColorScale, data_uri, png
from sparse_lm.telemetry.svg import CHAR, INK, MARGIN, MUTED, Size, num, root, text

MOST_CELLS = 3000  # as elements of their own, each with its value; more become one picture
_ROW, _LONGEST = 15, 20
COLORS = ColorScale(4.0)


@dataclasses.dataclass(frozen=True)
class Signed:
    """Colours for values from -most to most, neutral at 0; beyond is clipped. Stands in for a scale of ratios."""

    most: float

    def ratios(self, values: np.ndarray) -> np.ndarray:
        """The ratio whose colour in `COLORS` a value has; NaN stays."""
        return COLORS.most ** (values / (self.most or 1.0))


def cell_map(
    ratios: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    words: Callable[[int, int], str],
) -> str:
    """A cell for each row and column, coloured by `COLORS`; NaN is left white. words: what a cell says when pointed at.

    Raises `ValueError` when the names do not match the cells, or there are none.
    """
    if ratios.shape != (len(rows), len(columns)) or 0 in ratios.shape:
        raise ValueError(f"map {title!r}: cells {ratios.shape} for {len(rows)} rows and {len(columns)} columns")
    shown_rows, shown = ([_short(name) for name in names] for names in (rows, columns))
    left, width = 14 + CHAR * max(map(len, shown_rows)), 480
    cell_w = (width - MARGIN - left) / len(columns)
    tilted = max(map(len, shown)) * CHAR > cell_w - 4
    step = max(1, math.ceil(12 / cell_w)) if tilted else 1
    cell_h = _ROW if len(rows) <= 40 else max(4.0, 600 / len(rows))
    row_step = max(1, math.ceil(11 / cell_h))
    # Tilted names rise by the sine of their angle, and may lean over the right edge of the last column.
    head = 12 + (CHAR * max(map(len, shown)) * math.sin(math.pi / 3) if tilted else 8)
    size = Size(width, math.ceil(head + 4 + cell_h * len(rows) + 6))
    top = head + 4
    body = []
    for j in range(0, len(columns), step):
        x = left + cell_w * (j + 0.5)
        turn = f' transform="rotate(-60 {num(x + 3)} {num(top - 4)})"' if tilted else ""
        body.append(text(x + 3 if tilted else x, top - 4, shown[j], "start" if tilted else "middle", INK, turn))
    for i in range(0, len(rows), row_step):
        body.append(text(left - 6, top + cell_h * (i + 0.5) + 4, shown_rows[i], "end", MUTED))
    body.append(_cells(ratios, (left, top, cell_w, cell_h), words))
    return root(size, title, "".join(body))


def _cells(ratios: np.ndarray, place: tuple[float, float, float, float], words: Callable[[int, int], str]) -> str:
    left, top, width, height = place
    if ratios.size > MOST_CELLS:
        return (
            f'<image x="{num(left)}" y="{num(top)}" width="{num(width * ratios.shape[1])}" '
            f'height="{num(height * ratios.shape[0])}" preserveAspectRatio="none" style="image-rendering:pixelated" '
            f'href="{data_uri(png(COLORS.levels(ratios), COLORS.palette()))}"/>'
        )
    gap_x, gap_y = (1.0 if side > 6 else 0.0 for side in (width, height))
    parts = []
    for i, j in np.ndindex(*ratios.shape):
        if not np.isnan(ratios[i, j]):
            parts.append(
                f'<rect x="{num(left + j * width)}" y="{num(top + i * height)}" width="{width - gap_x:.2f}" '
                f'height="{height - gap_y:.2f}" fill="{COLORS.color(float(ratios[i, j]))}">'
                f"<title>{escape(words(i, j))}</title></rect>"
            )
    return "".join(parts)


def signed_legend(scale: Signed, label: str) -> str:
    """The colours of a signed scale with the values at the ends, between and in the middle."""
    left, right = 8.0, 360 - float(MARGIN)
    strip = data_uri(png(np.arange(255, dtype=np.uint8)[None], COLORS.palette()))
    body = [
        text(left, 11, label, fill=INK),
        f'<image x="{num(left)}" y="17" width="{num(right - left)}" height="11" preserveAspectRatio="none" '
        f'href="{strip}"/>',
    ]
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        sign = "≤ " if share == -1 else "≥ " if share == 1 else ""
        anchor = "start" if share == -1 else "end" if share == 1 else "middle"
        value = f"{share * scale.most:+.2g}" if share else "0"
        body.append(text(left + (0.5 + share / 2) * (right - left), 41, sign + value, anchor))
    return root(Size(360, 46), label, "".join(body))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
