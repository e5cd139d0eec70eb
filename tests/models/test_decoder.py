"""The whole decoder: logits, positions, tied embeddings, dtype, placement, and continuing with a cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder, build_decoder, previous_tokens
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.routers.hash import Hash, bigrams, hashed_experts
from sparse_lm.sharding import DEFAULT

TOKENS_BL = jnp.asarray([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
SEGMENTS_BL = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])
POSITIONS_BL = jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
DROPLESS = MoEConfig(num_experts=4, top_k=2, every=2, capacity_factor=None, capacity_factor_eval=None)
run = jax.jit(lambda model, *inputs: model(*inputs))


def build(**options: Any) -> Decoder:
    options = {"num_layers": 3, "d_model": 8, "num_heads": 4, "num_kv_heads": 2, "d_ff": 8, "moe": DROPLESS, **options}
    return build_decoder(jax.random.key(0), ModelConfig(vocab_size=11, max_length=8, **options), DEFAULT)


def logits_of(model: Decoder, tokens=TOKENS_BL, positions=POSITIONS_BL, key=None):
    return np.asarray(run(model, tokens, SEGMENTS_BL, positions, key)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32(dtype):
    logits, reports = run(build(dtype=dtype), TOKENS_BL, SEGMENTS_BL, POSITIONS_BL)
    stats = reports.feed_forward
    assert logits.shape == (2, 6, 11)
    assert logits.dtype == jnp.float32
    assert stats.router.load_UE.shape == (1, 2, 4)
    assert stats.router.importance_UE.dtype == jnp.float32


def test_bfloat16_is_close_to_float32_and_its_parameters_are_float32():
    full, half = build(), build(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits_of(half), logits_of(full), atol=0.1)


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
def test_positions_matter_unless_there_are_none(position):
    model = build(position=position, moe=None)
    assert (model.positions is not None) == (position == "learned")
    same = np.allclose(logits_of(model), logits_of(model, positions=2 * POSITIONS_BL), atol=1e-5)
    assert same == (position == "none")


def test_embeddings_are_tied_or_not():
    tied, apart = build(), build(tie_embeddings=False)
    assert tied.unembedding is None
    assert apart.unembedding is not None
    assert not np.array_equal(apart.unembedding.table_VD[...], apart.embedding.table_VD[...])
    apart.unembedding.table_VD[...] = apart.embedding.table_VD[...]
    np.testing.assert_allclose(logits_of(tied), logits_of(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_last_norm_only_where_the_layers_do_not_end_in_one(norm_position):
    model = build(norm_position=norm_position)
    assert (model.norm is not None) == (norm_position == "pre")
    assert np.all(np.isfinite(logits_of(model)))


def test_dropout_draws_from_the_key():
    model = build(dropout=0.3)
    one, again, other = (logits_of(model, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(logits_of(model), logits_of(build()))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("parts", [(6,), (2, 4), (1, 1, 1, 1, 1, 1)])
def test_continuing_with_a_cache_equals_the_whole(parts, scan_layers):
    model = build(scan_layers=scan_layers)
    whole, cache = logits_of(model), model.empty_cache(2, 6)
    extend = jax.jit(lambda model, *inputs: model.extend(*inputs))
    start = 0
    for length in parts:
        part = slice(start, start + length)
        logits, cache = extend(model, TOKENS_BL[:, part], SEGMENTS_BL, POSITIONS_BL[:, part], jnp.asarray(start), cache)
        np.testing.assert_allclose(logits, whole[:, part], rtol=1e-4, atol=1e-5)
        start += length


def test_the_token_before_by_hand():
    tokens_BL = jnp.array([[5, 6, 7, 8, 9, 9], [0, 3, 3, 4, 0, 2]])
    segments_BL = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 0, 3]])
    expected = [[-1, 5, -1, 7, 8, -1], [-1, -1, -1, 3, -1, -1]]
    np.testing.assert_array_equal(previous_tokens(tokens_BL, segments_BL), expected)


BIGRAM = MoEConfig(num_experts=8, top_k=2, every=1, router=Hash(mode="bigram"), capacity_factor_eval=None)


@functools.cache
def bigram_logits(scan_layers: bool = True):
    """Logits of a model that routes by bigrams, and the model."""
    model = build(moe=BIGRAM, scan_layers=scan_layers)
    return logits_of(model), model


def test_routing_by_bigrams_sees_the_token_before_and_no_other():
    """The loads of the first layer are those of hashed pairs, documents apart."""
    _, model = bigram_logits()

    def loads(tokens_BL, segments_BL=SEGMENTS_BL):
        reports = jax.jit(lambda *inputs: model(*inputs)[1])(jnp.asarray(tokens_BL), segments_BL, POSITIONS_BL)
        return np.asarray(reports.feed_forward.router.load_UE[0]).reshape(-1, 8).sum(0)

    tokens_BL = np.array(TOKENS_BL)
    previous_BL = np.asarray(previous_tokens(TOKENS_BL, SEGMENTS_BL))
    ids_BL = bigrams(jnp.asarray(previous_BL), TOKENS_BL)
    seed = model.stack.units[0].blocks[0].feed_forward.router.seed[...][0]  # type: ignore[union-attr]
    real_BL1 = np.asarray(SEGMENTS_BL > 0)[..., None]
    expert_BLK = np.where(real_BL1, hashed_experts(ids_BL, seed, 8, 2), 8)
    np.testing.assert_array_equal(loads(tokens_BL), np.bincount(expert_BLK.ravel(), minlength=9)[:8])


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("parts", [(6,), (2, 4), (1, 1, 1, 1, 1, 1)])
def test_bigrams_reach_back_over_the_start_of_what_continues_a_cache(parts, scan_layers):
    whole, model = bigram_logits(scan_layers)
    extend = jax.jit(lambda model, *inputs: model.extend(*inputs))
    cache, start = model.empty_cache(2, 6), 0
    for length in parts:
        part = slice(start, start + length)
        logits, cache = extend(model, TOKENS_BL[:, part], SEGMENTS_BL, POSITIONS_BL[:, part], jnp.asarray(start), cache)
        np.testing.assert_allclose(logits, whole[:, part], rtol=1e-4, atol=1e-5)
        start += length
    np.testing.assert_array_equal(cache.tokens_BT, TOKENS_BL)
    if parts == (2, 4):  # without what the cache remembers, the first of the four is hashed alone, and differs
        forgetful = dataclasses.replace(cache, tokens_BT=jnp.zeros_like(cache.tokens_BT))
        logits, _ = extend(model, TOKENS_BL[:, 2:], SEGMENTS_BL, POSITIONS_BL[:, 2:], jnp.asarray(2), forgetful)
        assert np.abs(logits - whole[:, 2:]).max() > 1e-3


def test_bigrams_on_a_mesh_are_the_same(mesh_of):
    whole, _ = bigram_logits()
    with jax.set_mesh(mesh_of(data=2, expert=2)):
        model = build(moe=BIGRAM)
        rows = [DEFAULT.constrain(jnp.tile(x, (2, 1)), "B.") for x in (TOKENS_BL, SEGMENTS_BL, POSITIONS_BL)]
        logits, _ = jax.jit(lambda model, *inputs: model(*inputs))(model, *rows)
        cache, found = model.empty_cache(4, 6), []
        for start in (0, 3):
            part = [x[:, start : start + 3] for x in rows]
            step, cache = jax.jit(lambda model, *inputs: model.extend(*inputs))(
                model, part[0], rows[1], part[2], jnp.asarray(start), cache
            )
            found.append(np.asarray(step))
    np.testing.assert_allclose(logits, np.tile(whole, (2, 1, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(found, axis=1), np.tile(whole, (2, 1, 1)), rtol=1e-4, atol=1e-5)


def test_the_cache_has_the_compute_type_and_room_for_every_layer():
    cache = build(dtype="bfloat16").empty_cache(3, 5)
    assert cache.tokens_BT.shape == (3, 5)
    leaves = jax.tree.leaves(cache.layers)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert {leaf.shape[1:] for leaf in leaves} == {(3, 5, 2, 2)}
    assert sum(leaf.shape[0] for leaf in leaves) == 2 * 3  # keys and values of three layers


def test_weights_are_made_where_the_rules_put_them(mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, model=2)):
        model = build_decoder(
            jax.random.key(0),
            ModelConfig(vocab_size=12, num_layers=2, d_model=8, num_heads=4, d_ff=8, moe=DROPLESS),
            DEFAULT,
        )
        sparse = model.stack.units[0].blocks[1].feed_forward
        assert isinstance(sparse, MoE)
        experts = sparse.experts
        assert experts.up_EDF.shape == (1, 4, 8, 4)
        assert experts.up_EDF[...].addressable_shards[0].data.shape == (1, 2, 4, 2)
        assert model.embedding.table_VD[...].addressable_shards[0].data.shape == (6, 4)
