"""Small layers of attention with experts, and their inputs, for the tests of both forms."""

from __future__ import annotations

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.moe.attention import AttentionExperts, AttentionInputs, AttentionShape, ExpertAttention
from sparse_lm.nn.attend import row_sight
from sparse_lm.sharding import DEFAULT

WIDTH = 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])  # two documents in a row; padding at the end of one
POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
X = np.random.default_rng(0).normal(size=(*SEGMENTS.shape, WIDTH))
REAL = SEGMENTS > 0


def inputs() -> AttentionInputs:
    segments = jnp.asarray(SEGMENTS)
    ids = jnp.asarray(np.arange(SEGMENTS.size).reshape(SEGMENTS.shape))
    return AttentionInputs(jnp.asarray(POSITIONS), row_sight(segments), segments > 0, ids)


def build(config: AttentionExperts, heads: int, kv_heads: int, dropout: float = 0.0) -> ExpertAttention:
    shape = AttentionShape(WIDTH, heads, kv_heads, 4, oracle.ROPE_BASE, dropout)
    config.check_shape(shape)
    return config.build(jax.random.key(1), shape, DEFAULT)


def call(layer: ExpertAttention, x=X, key=None):
    return jax.jit(lambda layer, x, key: layer(x, inputs(), key))(layer, jnp.asarray(x, jnp.float32), key)


def weights_of(layer: ExpertAttention) -> dict[str, np.ndarray]:
    """The parameters in float64 by name; those of the routers with the name of the router in front, if it has two."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    named = {}
    for path, leaf in flat:
        prefix = str(path[0]).removesuffix("scores") if str(path[0]).endswith("_scores") else ""
        named[prefix + str(path[-1])] = np.asarray(leaf[...], np.float64)
    return named


def assert_gradients(layer: ExpertAttention, reference, step: float = 1e-6):
    """Slopes of sum(y * target) along random directions: the package's gradients against differences of the oracle."""
    rng = np.random.default_rng(3)
    target = rng.normal(size=X.shape) * REAL[..., None]
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters, x):
        return jnp.sum(nnx.merge(graph, parameters, rest)(x, inputs())[0] * target)

    d_parameters, d_x = jax.jit(jax.grad(loss, (0, 1)))(parameters, jnp.asarray(X, jnp.float32))
    found = {**weights_of(nnx.merge(graph, d_parameters, rest)), "x": np.asarray(d_x, np.float64)}
    weights = weights_of(layer)
    assert found.keys() == {*weights, "x"}
    for name, gradient in found.items():
        direction = np.abs(rng.normal(size=gradient.shape)) * np.sign(gradient)  # no slope is small by cancellation

        def value(sign, name=name, direction=direction):
            moved = {**weights, "x": X}
            moved[name] = moved[name] + sign * step * direction
            return np.sum(reference(moved, moved["x"])[0] * target)

        slope = (value(1) - value(-1)) / (2 * step)
        expected = np.sum(gradient * direction)
        assert np.abs(gradient).max() > 1e-4, name
        np.testing.assert_allclose(expected, slope, rtol=2e-3, atol=1e-5, err_msg=name)
