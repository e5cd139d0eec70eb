"""Colours: lightness rises steadily (readable in grey), the middle is neutral; images decode to what went in."""

import base64
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.telemetry.colors import MISSING_LEVEL, SERIES, ColorScale, data_uri, depth_color, png


def channels(color):
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def lightness(color):
    """Relative luminance (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lightness_rises_with_the_ratio():
    scale = ColorScale(4)
    shades = [lightness(scale.color(ratio)) for ratio in np.geomspace(0.25, 4, 60)]
    assert all(later > earlier for earlier, later in itertools.pairwise(shades))
    assert shades[0] < 0.03 and shades[-1] > 0.7


def test_an_even_load_is_grey():
    r, g, b = channels(ColorScale(4).color(1.0))
    assert max(r, g, b) - min(r, g, b) < 0.03


@pytest.mark.parametrize(
    ("ratio", "share"), [(0, 0), (0.1, 0), (0.25, 0), (0.5, 0.25), (1, 0.5), (2, 0.75), (4, 1), (64, 1)]
)
def test_shares_are_logarithmic_and_clipped(ratio, share):
    assert ColorScale(4).share(ratio) == pytest.approx(share)


@given(st.floats(0, 100), st.sampled_from([2.0, 4.0, 8.0]))
def test_levels_agree_with_shares(ratio, most):
    scale = ColorScale(most)
    assert abs(int(scale.levels(np.array([ratio]))[0]) - 254 * scale.share(ratio)) <= 0.5001


def test_a_missing_ratio_has_a_level_and_a_colour_of_its_own():
    scale = ColorScale()
    levels = scale.levels(np.array([[np.nan, 0.0], [1.0, 9.0]]))
    assert levels.dtype == np.uint8
    assert levels.tolist() == [[MISSING_LEVEL, 0], [127, 254]]
    palette = scale.palette()
    assert len(palette) == 3 * 256
    assert palette[-3:] == b"\xff\xff\xff"
    assert palette[:3].hex() == scale.color(0)[1:]
    assert palette[3 * 127 : 3 * 128].hex() == scale.color(1.0)[1:]


def test_layers_are_coloured_from_dark_to_light():
    shades = [lightness(depth_color(layer, 12)) for layer in range(12)]
    assert shades == sorted(shades)
    assert len({depth_color(layer, 12) for layer in range(12)}) == 12
    assert depth_color(0, 1) == depth_color(0, 5)


def test_lines_stand_out_from_a_white_page():
    # 3:1 is WCAG's contrast for graphics; sky blue and orange are near 2.2, hence not among the first.
    contrasts = [1.05 / (lightness(color) + 0.05) for color in SERIES]
    assert min(contrasts) > 2
    assert min(contrasts[:3]) > 3
    assert len(set(SERIES)) == len(SERIES)


def chunks(image):
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(image):
        (length,) = struct.unpack(">I", image[at : at + 4])
        kind, data = image[at + 4 : at + 8], image[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", image[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + data)
        found[kind] = data
        at += 12 + length
    return found


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_an_image_decodes_to_its_levels(height, width, seed):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    palette = ColorScale().palette()
    found = chunks(png(levels, palette))
    assert list(found) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", found[b"IHDR"]) == (width, height, 8, 3, 0, 0, 0)
    assert found[b"PLTE"] == palette
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (lines[:, 0] == 0).all()
    assert (lines[:, 1:] == levels).all()


def test_a_data_uri_holds_the_bytes():
    head, body = data_uri(b"abc\xff").split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == b"abc\xff"
