"""Every option of the projections by hand, latent attention against its formula, and what a cache holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.nn.attend import row_sight
from sparse_lm.nn.attention import Attention
from sparse_lm.nn.cache import KeyValues, LatentKeys
from sparse_lm.nn.config import HeadsConfig, LatentConfig
from sparse_lm.nn.heads import AttentionShape
from sparse_lm.nn.latent import LatentAttention
from sparse_lm.nn.rope_scaling import Yarn
from sparse_lm.sharding import DEFAULT

WIDTH, HEADS, KV_HEADS, HEAD, LENGTH = 6, 4, 2, 4, 5
X_BLD = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
POSITIONS_BL = jnp.arange(LENGTH)[None]
SIGHT = row_sight(jnp.ones((1, LENGTH), jnp.int32))


def build(**options) -> Attention:
    return Attention(
        jax.random.key(0), AttentionShape(WIDTH, HEADS, KV_HEADS, HEAD, options=HeadsConfig(**options)), DEFAULT
    )


def softmax_attention(query, key, value, scale, sinks=None) -> np.ndarray:
    """Causal, one row; [L, H, I] and [L, J, I] in float64."""
    mixed = np.zeros((*query.shape[:2], value.shape[-1]))
    for t, h in np.ndindex(*query.shape[:2]):
        j = h // (query.shape[1] // key.shape[1])
        weights = np.exp(key[: t + 1, j] @ query[t, h] * scale)
        mixed[t, h] = weights @ value[: t + 1, j] / (weights.sum() + (0 if sinks is None else np.exp(sinks[h])))
    return mixed


def array(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def projections(layer: Attention) -> list[np.ndarray]:
    x = np.asarray(X_BLD[0], np.float64)
    return [np.einsum("ld,dhi->lhi", x, array(w)) for w in (layer.query_DHI, layer.key_DJI, layer.value_DJI)]


def root_mean_square(x, axes) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + 1e-6)


def check(layer: Attention, query, key, value, sinks=None, bias: float | np.ndarray = 0.0):
    found = layer(X_BLD, POSITIONS_BL, SIGHT)[0][0]
    mixed = softmax_attention(query, key, value, HEAD**-0.5, sinks)
    np.testing.assert_allclose(
        found, np.einsum("lhi,hid->ld", mixed, array(layer.out_HID)) + bias, rtol=1e-4, atol=1e-5
    )


def test_biases_then_clipping():
    layer = build(qkv_bias=True, out_bias=True, clip_qkv=0.5)
    rng = np.random.default_rng(0)
    biases = [layer.query_bias_HI, layer.key_bias_JI, layer.value_bias_JI, layer.out_bias_D]
    for bias in biases:
        assert bias is not None
        bias[...] = jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
    pairs = zip(projections(layer), biases[:3], strict=True)
    check(layer, *(np.clip(x + array(bias), -0.5, 0.5) for x, bias in pairs), bias=array(layer.out_bias_D))


@pytest.mark.parametrize(("kind", "axes"), [("head", -1), ("model", (-2, -1))])
def test_norms_of_queries_and_keys(kind, axes):
    layer = build(qk_norm=kind)
    names = ("query_norm_I", "key_norm_I") if kind == "head" else ("query_norm_HI", "key_norm_JI")
    scales, rng = [getattr(layer, name) for name in names], np.random.default_rng(0)
    for scale in scales:
        scale[...] = jnp.asarray(rng.uniform(0.5, 2, size=scale.shape), jnp.float32)
    query, key, value = projections(layer)
    query, key = (root_mean_square(x, axes) * array(s) for x, s in zip((query, key), scales, strict=True))
    check(layer, query, key, value)


def test_l2_norms_are_in_rotated_layers_only():
    check(build(qk_norm="l2"), *projections(build()))
    options, positions = HeadsConfig(qk_norm="l2"), jnp.zeros_like(POSITIONS_BL)  # at place 0 nothing turns
    rotated = Attention(
        jax.random.key(0), AttentionShape(WIDTH, HEADS, KV_HEADS, HEAD, 100.0, options=options), DEFAULT
    )
    query, key, value = projections(rotated)
    mixed = softmax_attention(root_mean_square(query, -1), root_mean_square(key, -1), value, HEAD**-0.5)
    expected = np.einsum("lhi,hid->ld", mixed, array(rotated.out_HID))
    np.testing.assert_allclose(rotated(X_BLD, positions, SIGHT)[0][0], expected, rtol=1e-4, atol=1e-5)


def test_sinks_take_weight():
    layer = build(sinks=True)
    assert layer.sinks_H is not None
    layer.sinks_H[...] = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    check(layer, *projections(layer), sinks=array(layer.sinks_H))


def latent_layer(query_rank: int | None, **options) -> LatentAttention:
    latent = LatentConfig(kv_rank=5, query_rank=query_rank, rope_dim=2, value_dim=3)
    shape = AttentionShape(WIDTH, HEADS, HEADS, HEAD, 100.0, options=HeadsConfig(latent=latent, **options))
    return LatentAttention(jax.random.key(0), shape, DEFAULT)


def turned(x: np.ndarray) -> np.ndarray:
    """[L, ..., 2] turned by one radian per position."""
    angle = np.arange(LENGTH).reshape(-1, *(1,) * (x.ndim - 2))
    first, second = x[..., 0], x[..., 1]
    rotated = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    return np.stack(rotated, axis=-1)


@pytest.mark.parametrize("query_rank", [None, 7])
def test_latent_attention_is_its_formula(query_rank):
    layer = latent_layer(query_rank)
    x = np.asarray(X_BLD[0], np.float64)
    if query_rank is None:
        query = np.einsum("ld,dhi->lhi", x, array(layer.query_DHI))
    else:
        assert layer.query_down_DQ is not None
        query = np.einsum(
            "lq,qhi->lhi", root_mean_square(x @ array(layer.query_down_DQ), -1), array(layer.query_up_QHI)
        )
    latent, shared = root_mean_square(x @ array(layer.latent_DP), -1), turned(x @ array(layer.rope_key_DA))
    key = np.einsum("lp,phi->lhi", latent, array(layer.key_up_PHI))
    key = np.concatenate([key, np.repeat(shared[:, None], HEADS, 1)], -1)
    query = np.concatenate([query[..., :HEAD], turned(query[..., HEAD:])], -1)
    mixed = softmax_attention(query, key, np.einsum("lp,phw->lhw", latent, array(layer.value_up_PHW)), 6**-0.5)
    expected = np.einsum("lhw,hwd->ld", mixed, array(layer.out_HWD))
    np.testing.assert_allclose(layer(X_BLD, POSITIONS_BL, SIGHT)[0][0], expected, rtol=1e-4, atol=1e-5)


def test_scores_of_latent_attention_are_scaled_by_the_whole_width():
    assert latent_layer(None).shape.softmax.scale == pytest.approx(6**-0.5)
    yarn = Yarn(factor=40, mscale=1.0, mscale_all_dim=1.0)
    stretched = latent_layer(None, rope_scaling=yarn).shape.softmax.scale
    assert stretched == pytest.approx(6**-0.5 * yarn.score_factor)


def test_a_cache_holds_what_there_is():
    plain = AttentionShape(WIDTH, HEADS, KV_HEADS, HEAD).empty_cache((3, 2, 8), jnp.bfloat16, DEFAULT)
    assert isinstance(plain, KeyValues)
    assert plain.key_BTJI.shape == plain.value_BTJI.shape == (3, 2, 8, KV_HEADS, HEAD)
    latent = latent_layer(None).shape.empty_cache((3, 2, 8), jnp.bfloat16, DEFAULT)
    assert isinstance(latent, LatentKeys)
    assert (latent.latent_BTP.shape, latent.rope_key_BTA.shape) == ((3, 2, 8, 5), (3, 2, 8, 2))
    assert latent.latent_BTP.dtype == jnp.bfloat16


def test_write_of_latents_touches_only_its_place():
    empty = LatentKeys(jnp.zeros((1, 4, 1)), jnp.zeros((1, 4, 1)))
    new = empty.write(jnp.ones((1, 2, 1)), 2 * jnp.ones((1, 2, 1)), jnp.asarray(1))
    np.testing.assert_array_equal(new.latent_BTP[0, :, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(new.rope_key_BTA[0, :, 0], [0, 2, 2, 0])
