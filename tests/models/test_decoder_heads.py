"""Whole models with each option of the heads: a cache filled in parts gives what one pass over the row gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_models import MODELS

from sparse_lm.models.decoder import build_decoder
from sparse_lm.sharding import DEFAULT

LENGTH = 7
TOKENS_BL = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, LENGTH)), jnp.int32)
SEGMENTS_BL = jnp.asarray([[0] + [1] * 6, [1] * 7], jnp.int32)  # padding in front, as prompts have it
POSITIONS_BL = jnp.asarray([[0, 0, 1, 2, 3, 4, 5], [*range(7)]], jnp.int32)


@jax.jit
def whole(model):
    return model(TOKENS_BL, SEGMENTS_BL, POSITIONS_BL)[0]


@jax.jit
def in_parts(model):
    cache, parts = model.empty_cache(2, LENGTH), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        place, part = jnp.asarray(start), slice(start, stop)
        logits, cache = model.extend(TOKENS_BL[:, part], SEGMENTS_BL, POSITIONS_BL[:, part], place, cache)
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_filled_in_parts_gives_the_whole(name):
    model = build_decoder(jax.random.key(0), MODELS[name], DEFAULT)
    real = np.asarray(SEGMENTS_BL) > 0
    expected = np.asarray(whole(model))
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(np.asarray(in_parts(model))[real], expected[real], rtol=1e-4, atol=1e-4)


def test_the_chunked_form_gives_the_same_model():
    config = MODELS["gpt_oss"]
    model = build_decoder(jax.random.key(0), config, DEFAULT)
    blocks = build_decoder(jax.random.key(0), config.replace(heads__implementation="chunked", heads__block=2), DEFAULT)
    np.testing.assert_allclose(whole(blocks), whole(model), rtol=1e-4, atol=1e-5)


def test_windows_reach_the_layers():
    # With one layer and a window of one place a token sees itself alone.
    config = MODELS["gpt_oss"].replace(num_layers=1, heads__windows=(1,))
    model = build_decoder(jax.random.key(0), config, DEFAULT)
    other = model(TOKENS_BL.at[:, 2].add(1) % 11, SEGMENTS_BL, POSITIONS_BL)[0]
    np.testing.assert_allclose(np.asarray(other)[:, 3:], np.asarray(whole(model))[:, 3:], rtol=1e-5, atol=1e-6)
    assert not np.allclose(np.asarray(other)[:, 2], np.asarray(whole(model))[:, 2], atol=1e-3)
