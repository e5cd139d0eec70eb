"""Masks from the description of who sees whom, by hand and against the sentence that defines them."""

from __future__ import annotations

import attend_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.nn.attend import continued_sight, row_sight

SEGMENTS_BL = jnp.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
POSITIONS_BL = jnp.asarray([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_mask_by_hand():
    mask = np.asarray(row_sight(SEGMENTS_BL).mask()).astype(int)
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    second = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0] * 5, [0] * 5]
    np.testing.assert_array_equal(mask, [first, second])


def test_a_window_and_a_chunk_by_hand():
    segments, positions = jnp.ones((1, 5), int), jnp.arange(5)[None]
    window = row_sight(segments).within(2, None, positions)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(window.mask()[0].astype(int), expected)
    chunk = row_sight(segments).within(None, 3, positions)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(chunk.mask()[0].astype(int), expected)
    assert (window.reach, chunk.reach, row_sight(segments).reach) == (2, 3, None)
    assert row_sight(segments).within(4, 3, positions).reach == 3


def test_chunks_are_counted_in_the_document():
    # The second document of the first row begins at place 2: its chunk of two ends at place 3, not at place 2.
    mask = row_sight(SEGMENTS_BL).within(None, 2, POSITIONS_BL).mask()[0].astype(int)
    np.testing.assert_array_equal(mask[2:], [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])


@pytest.mark.parametrize("start", [2, jnp.asarray(2)])
@pytest.mark.parametrize("limits", [(None, None), (2, None), (None, 2)])
def test_a_continued_row_is_a_part_of_the_whole(start, limits: tuple[int | None, int | None]):
    whole = row_sight(SEGMENTS_BL).within(*limits, POSITIONS_BL).mask()
    part = continued_sight(SEGMENTS_BL[:, 2:4], SEGMENTS_BL, start).within(*limits, POSITIONS_BL[:, 2:4])
    np.testing.assert_array_equal(part.mask(), whole[:, 2:4])
    assert part.layout == "cache"


def test_hidden_keys_are_seen_by_none():
    hidden = jnp.asarray([[True, False, False, False, False], [False] * 5])
    mask = row_sight(SEGMENTS_BL).hiding(hidden).mask()
    assert not mask[0, :, 0].any()
    np.testing.assert_array_equal(mask[:, :, 1:], row_sight(SEGMENTS_BL).mask()[:, :, 1:])


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 3),
    st.none() | st.integers(1, 7),
    st.none() | st.integers(1, 7),
)
def test_masks_are_what_the_sentence_says(documents, padding, window, chunk):
    segments = np.repeat([*range(1, len(documents) + 1), 0], [*documents, padding])[None]
    positions = np.concatenate([np.arange(size) for size in [*documents, padding]])[None]
    mask = row_sight(jnp.asarray(segments)).within(window, chunk, jnp.asarray(positions)).mask()[0]
    features = oracle.Features(window=window, chunk=chunk)
    length = segments.shape[1]
    expected = [[oracle.sees(features, 0, t, s, segments, positions) for s in range(length)] for t in range(length)]
    np.testing.assert_array_equal(mask, expected)
