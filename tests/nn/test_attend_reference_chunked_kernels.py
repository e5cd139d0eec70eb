"""Every implementation of attention with every feature, against a loop in float64; what is held and what is skipped."""

from __future__ import annotations

import functools

import attend_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_oracle import FEATURES, Features

from sparse_lm.config import ConfigError
from sparse_lm.nn.attend import Implementation, Softmax, attend, continued_sight, row_sight
from sparse_lm.nn.attend.chunked import chunked, visited
from sparse_lm.nn.attend.kernels import cudnn, splash, splash_block
from sparse_lm.nn.attend.reference import reference
from sparse_lm.sharding import DEFAULT

NAMES = ("query", "key", "value", "sinks")
TARGET = np.random.default_rng(7).normal(size=(oracle.BATCH, oracle.LENGTH, oracle.HEADS, oracle.VALUE_WIDTH))


def loss(given, features: Features, implementation: str, block: int = 4, target=TARGET):
    """sum(y * target) and y, of the package, in the dtype of what is given."""
    sight = row_sight(jnp.asarray(oracle.SEGMENTS)).within(
        features.window, features.chunk, jnp.asarray(oracle.POSITIONS)
    )
    softmax = Softmax(implementation, features.scale, features.soft_cap, block=block)  # type: ignore[arg-type]
    query, key, value, sinks = (given[name] for name in NAMES)
    mixed = attend(query, key, value, sight, softmax, DEFAULT, sinks if features.sinks else None)
    return jnp.sum(mixed * jnp.asarray(target, mixed.dtype)), mixed


run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2, 3))


@functools.cache
def both(name: str, implementation: str, block: int = 4):
    """(value, result), gradients in float64."""
    with jax.enable_x64(True):
        given = {k: jnp.asarray(v) for k, v in oracle.operands(FEATURES[name].kv_heads).items()}
        return jax.tree.map(np.asarray, run(given, FEATURES[name], implementation, block))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", FEATURES)
def test_equals_the_loop(name, implementation):
    (_, mixed), _ = both(name, implementation)
    expected = oracle.attention(oracle.operands(FEATURES[name].kv_heads), FEATURES[name])
    np.testing.assert_allclose(mixed, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_the_slopes_of_the_loop(name, implementation):
    _, found = both(name, implementation)
    given, rng, step = oracle.operands(FEATURES[name].kv_heads), np.random.default_rng(3), 1e-6
    for key in NAMES if FEATURES[name].sinks else NAMES[:3]:
        direction = np.abs(rng.normal(size=given[key].shape)) * np.sign(found[key])  # nothing cancels in the slope

        def value(sign, key=key, direction=direction):
            return np.sum(
                oracle.attention({**given, key: given[key] + sign * step * direction}, FEATURES[name]) * TARGET
            )

        slope = (value(1) - value(-1)) / (2 * step)
        np.testing.assert_allclose(np.sum(found[key] * direction), slope, rtol=1e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("block", [1, 5, 11, 64])
def test_blocks_do_not_matter(block):
    found, expected = (jax.tree.leaves(both("all", *how)) for how in (("chunked", block), ("reference",)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bfloat16_is_near_the_loop(implementation):
    given = {k: jnp.asarray(v, jnp.bfloat16) for k, v in oracle.operands(2).items()}
    rounded = {k: np.asarray(v, np.float64) for k, v in given.items()}
    (_, mixed), grads = run(given, FEATURES["all"], implementation, 4)
    assert mixed.dtype == jnp.bfloat16 and all(grad.dtype == jnp.bfloat16 for grad in grads.values())
    np.testing.assert_allclose(
        np.asarray(mixed, np.float64), oracle.attention(rounded, FEATURES["all"]), rtol=0.02, atol=0.02
    )
    exact = both("all", "reference")[1]
    for name, grad in grads.items():
        np.testing.assert_allclose(np.asarray(grad, np.float64), exact[name], rtol=0.1, atol=0.1, err_msg=name)


@pytest.mark.parametrize("limits", [(None, None), (3, None), (None, 3)])
def test_queries_that_continue_a_cache(limits: tuple[int | None, int | None]):
    given = {k: jnp.asarray(v, jnp.float32) for k, v in oracle.operands(2).items()}
    segments, positions = jnp.asarray(oracle.SEGMENTS), jnp.asarray(oracle.POSITIONS)
    expected = oracle.attention(oracle.operands(2), Features(*limits))[:, 3:8]

    def part(implementation, start):
        sight = continued_sight(segments[:, 3:8], segments, start).within(*limits, positions[:, 3:8])
        softmax = Softmax(implementation, block=4)
        return attend(given["query"][:, 3:8], given["key"], given["value"], sight, softmax, DEFAULT)

    for implementation in ("reference", "chunked"):
        mixed = jax.jit(part, static_argnums=0)(implementation, jnp.asarray(3))
        np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)


def test_pairs_that_nothing_sees_are_not_visited():
    sight = row_sight(jnp.ones((1, 12), jnp.int32))
    place = jnp.arange(12)[None]
    assert visited((0, 4, 8), 12, (4, 4), sight) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    # A query at place 4 sees places 1 to 4 with a window of four, which needs the block before; with one it does not.
    near = visited((0, 4, 8), 12, (4, 4), sight.within(4, None, place))
    assert near == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    assert visited((0, 4, 8), 12, (4, 4), sight.within(1, None, place)) == [(0, 0), (1, 1), (2, 2)]
    cache = continued_sight(jnp.ones((1, 2), jnp.int32), jnp.ones((1, 12), jnp.int32), 0)
    assert visited((0,), 12, (2, 4), cache) == [(0, 0), (0, 1), (0, 2)]


def held(implementation: Implementation, length: int) -> set[int]:
    """Sizes of the arrays in the compiled program of a gradient, in elements."""
    operand = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)

    def value(query, key, value, segments):
        return jnp.sum(attend(query, key, value, row_sight(segments), Softmax(implementation, block=16), DEFAULT) ** 2)

    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    text = jax.jit(jax.grad(value, (0, 1, 2))).lower(operand, operand, operand, segments).compile().as_text()
    assert text is not None
    shapes = [part.split("]")[0] for part in text.split("[")[1:]]
    return {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes if shape.replace(",", "").isdigit()}


def test_nothing_as_large_as_length_times_length_is_held():
    length = 128
    assert max(held("reference", length)) >= 2 * length * length
    assert max(held("chunked", length)) < length * length


def on_long_rows(body, features: Features, widths: int = 16, dtype=jnp.float32, batch: int = 1):
    """Result and gradients of `body(operands, sight, scoring)` on packed rows of 256 tokens."""
    rng, length = np.random.default_rng(0), 256
    segments = np.repeat([1, 2, 0], [100, 120, 36])[None].repeat(batch, 0).astype(np.int32)
    positions = np.concatenate([np.arange(100), np.arange(156)])[None].repeat(batch, 0).astype(np.int32)
    shapes = [(batch, length, 2, widths), (batch, length, 1, widths), (batch, length, 1, widths), (2,)]
    operands = tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    target = rng.normal(size=shapes[0])

    def value(operands):
        sight = row_sight(jnp.asarray(segments)).within(features.window, features.chunk, jnp.asarray(positions))
        given = (*operands[:3], operands[3] if features.sinks else None)
        mixed = body(given, sight, (features.scale or 0.25, features.soft_cap))
        return jnp.sum(mixed * target), mixed

    return jax.jit(jax.grad(value, has_aux=True))(operands)


LONG = {
    "all": Features(window=70, chunk=90, sinks=True, soft_cap=2.0),
    "causal": Features(),
    "window": Features(window=50, scale=0.4),
    "chunk": Features(chunk=60),
    "sinks": Features(sinks=True, soft_cap=3.0),
}


@pytest.mark.parametrize("name", ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in [*LONG][1:])])
def test_splash_interpreted_equals_the_reference(name):
    found = on_long_rows(lambda *given: splash(given[0], given[1], given[2], 128, True), LONG[name])
    expected = on_long_rows(lambda *given: reference(given[0], given[1], given[2], DEFAULT), LONG[name])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_splash_needs_a_length_of_whole_blocks():
    assert [splash_block(length, 512) for length in (128, 384, 1024, 1280, 100)] == [128, 384, 512, 256, None]
    query, key, value, sinks = (jnp.asarray(oracle.operands(2)[name]) for name in NAMES)
    with pytest.raises(ConfigError, match=r"data.length=11.*multiple of 128"):
        splash((query, key, value, sinks), row_sight(jnp.asarray(oracle.SEGMENTS)), (1, None), 4)


@pytest.mark.parametrize(("window", "packed"), [(50, False), (None, True)])
def test_cudnn_is_asked_for_what_attention_is_and_only_without_documents(window, packed, monkeypatch):
    """With the library's own XLA form in place of cuDNN's, which no CPU has."""
    real, asked = jax.nn.dot_product_attention, []

    def stand_in(*operands, implementation, **options):
        asked.append(implementation)
        # What tells the ways apart: only this one adds something.
        return real(*operands, implementation="xla", **options) + 1

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)

    def body(way):
        def run(operands, sight, scoring):
            if not packed:
                one_BL = jnp.minimum(sight.query_segments_BL, 1)
                sight = row_sight(one_BL).within(window, None, one_BL)
            return way(operands, sight, scoring, 64)

        return run

    found_grads, found = on_long_rows(body(cudnn), Features(window=window))
    grads, expected = on_long_rows(body(chunked), Features(window=window))
    real_L = np.arange(256) < 220
    np.testing.assert_allclose(
        found[0], expected[0] + (0 if packed else 1) * real_L[:, None, None], rtol=1e-4, atol=2e-5
    )
    for one, other in zip(found_grads, grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    assert asked[0] == "cudnn"
