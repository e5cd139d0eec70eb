"""Adam's moments against optax's, and how often the compiled update goes through them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm.optim.adam import scale_by_adam
from sparse_lm.optim.build import apply, build_optimizer
from sparse_lm.optim.config import OptimConfig

SHAPE = (256, 384)


def normal(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=SHAPE), jnp.float32) for name in ("up_DF", "gate_DF")}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_it_is_optax_adam(state_dtype):
    """The same state, in whose structure checkpoints are stored, and the same steps.

    With a bfloat16 moment optax rounds a product besides the moment itself.
    """
    ours, theirs = (
        scale_by_adam(0.9, 0.95, 1e-8, state_dtype),
        optax.scale_by_adam(0.9, 0.95, 1e-8, mu_dtype=state_dtype),
    )
    states = [one.init(normal(0)) for one in (ours, theirs)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    tolerance = {"float32": {"rtol": 2e-5, "atol": 1e-7}, "bfloat16": {"rtol": 2**-6, "atol": 2**-6}}[state_dtype]
    for seed in range(3):
        gradients = normal(seed, scale=10.0**-seed)
        (got, states[0]), (expected, states[1]) = (
            jax.jit(one.update)(gradients, state) for one, state in zip((ours, theirs), states, strict=True)
        )
        for a, b in zip(*map(jax.tree.leaves, ((got, states[0]), (expected, states[1]))), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), **tolerance)


def test_a_bfloat16_moment_is_only_stored_so():
    """What is computed with it is not rounded on the way."""
    adam, gradients = scale_by_adam(0.9, 0.95, 1e-8, "bfloat16"), [normal(seed) for seed in (1, 2)]
    _, state = jax.jit(adam.update)(gradients[0], adam.init(normal(0)))
    steps, after = jax.jit(adam.update)(gradients[1], state)
    for name, step in steps.items():
        mean, square, gradient = (
            np.asarray(x[name].astype(jnp.float32), np.float64) for x in (state.mu, state.nu, gradients[1])
        )
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        expected = mean / (1 - 0.9**2) / (np.sqrt(square / (1 - 0.95**2)) + 1e-8)
        np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-6)
        stored = np.asarray(after.mu[name] == jnp.asarray(mean, jnp.float32).astype(jnp.bfloat16))
        assert stored.mean() > 0.999  # but for ties


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_what_is_not_finite_leaves_the_state(name):
    optimizer, parameters = build_optimizer(OptimConfig(name=name, warmup_steps=2), 10), normal(0)
    update = jax.jit(lambda gradients, state, finite: apply(optimizer, gradients, state, parameters, finite)[1])
    state = update(normal(1), optimizer.init(parameters), True)
    lost = update(jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), normal(2)), state, False)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, lost)), strict=True))
    kept = update(normal(2), state, True)
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, kept)), strict=True))


def test_a_donated_state_is_updated_in_place():
    """No copy of the old moments, in which XLA for CPU would compute the new ones a second time."""
    optimizer, parameters = build_optimizer(OptimConfig(), 10), normal(0)

    def step(parameters, state, gradients):
        finite = jnp.isfinite(optax.tree.norm(gradients))
        new, state = apply(optimizer, gradients, state, parameters, finite)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, parameters), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(parameters, optimizer.init(parameters), normal(1)).compile()
    size = f"f32[{SHAPE[0]},{SHAPE[1]}]"
    lines = [line for line in compiled.as_text().splitlines() if f"= {size}" in line]
    assert not [line for line in lines if " copy(" in line]
    entry = compiled.as_text().split("ENTRY")[1].splitlines()
    assert sum(f"= {size}" in line and " fusion(" in line for line in entry) == 3 * len(parameters)
