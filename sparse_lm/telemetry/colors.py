"""Colours that stay apart for the colour-blind and in grey, and heat maps as paletted PNG images."""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

# Okabe and Ito's palette for colour-blind readers (2008), yellow darkened for a white page.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#a89200")

# Rises steadily in lightness, blue to yellow through a neutral grey in the middle: the order survives in print and for
# every kind of colour vision (after cividis; Nunez, Anderton, Renslow 2018).
_DIVERGING = ("#00204d", "#1f3a6d", "#4b546c", "#7b7b78", "#a59c74", "#d2bf60", "#ffea46")
_DEPTH = ("#3b1c6e", "#31558b", "#21828c", "#33a877", "#93c83e")

MISSING_LEVEL = 255
_LEVELS = 254  # the highest level of a value that is there


def _blend(anchors: Sequence[str], share: float) -> tuple[int, int, int]:
    position = min(1.0, max(0.0, share)) * (len(anchors) - 1)
    left = min(int(position), len(anchors) - 2)
    ends = [[int(anchors[i][j : j + 2], 16) for j in (1, 3, 5)] for i in (left, left + 1)]
    r, g, b = (round(a + (c - a) * (position - left)) for a, c in zip(*ends, strict=True))
    return r, g, b


def depth_color(index: int, count: int) -> str:
    """The colour of layer `index` out of `count`: dark purple first, light green last."""
    return "#{:02x}{:02x}{:02x}".format(*_blend(_DEPTH, index / max(1, count - 1)))


@dataclasses.dataclass(frozen=True)
class ColorScale:
    """Colours for ratios from 1/`most` to `most`, logarithmic, with the neutral middle at 1; beyond is clipped."""

    most: float = 4.0

    def share(self, ratio: float) -> float:
        """Where on the scale a ratio lies: 0 at 1/most and below, 0.5 at 1, 1 at most and above."""
        if ratio <= 0:
            return 0.0
        return min(1.0, max(0.0, 0.5 + 0.5 * math.log(ratio) / math.log(self.most)))

    def color(self, ratio: float) -> str:
        """The colour of a ratio as #rrggbb."""
        return "#{:02x}{:02x}{:02x}".format(*_blend(_DIVERGING, self.share(ratio)))

    def levels(self, ratios: np.ndarray) -> np.ndarray:
        """Each ratio as a level from 0 to 254; NaN as `MISSING_LEVEL`. Any shape, uint8."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 0.5 + 0.5 * np.log(np.maximum(ratios, 1e-30)) / math.log(self.most)
        levels = np.round(np.clip(share, 0, 1) * _LEVELS)
        return np.where(np.isnan(ratios), MISSING_LEVEL, levels).astype(np.uint8)

    def palette(self) -> bytes:
        """RGB of the 256 levels; a missing value is white."""
        colors = [_blend(_DIVERGING, level / _LEVELS) for level in range(_LEVELS + 1)]
        return bytes(channel for color in [*colors, (255, 255, 255)] for channel in color)


def png(levels: np.ndarray, palette: bytes) -> bytes:
    """A paletted PNG image, one pixel a level. levels: uint8 [height, width]; palette: 3 bytes a level.

    A heat map of 32 experts and 200 samples is 6400 rectangles as SVG and a few kilobytes this way.
    """
    height, width = levels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), levels.astype(np.uint8)], axis=1)  # filter type 0
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def data_uri(image: bytes) -> str:
    """PNG bytes as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(image).decode()
