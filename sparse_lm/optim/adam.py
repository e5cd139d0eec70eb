"""Adam's moments, each read and written once per update.

`optax.scale_by_adam` says the same, but leaves it to the compiler to see that the new moments are needed twice: in the
state and for the parameters. XLA for CPU computes them twice, from copies of the old ones.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from sparse_lm.mesh import platform


def scale_by_adam(beta1: float, beta2: float, eps: float, state_dtype: str) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015, algorithm 1) before learning rate and decay; the state is optax's.

    state_dtype: of the first moment as it is stored; arithmetic and the second moment are float32. `update` takes
    `finite`: where it is False the state stays as it was.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return cast(optax.ScaleByAdamState, optax.scale_by_adam(mu_dtype=state_dtype).init(params))

    def update(updates: Any, state: Any, params: Any = None, *, finite: jax.Array | bool = True, **_: Any):
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        unbiased1, unbiased2 = 1 - beta1**count, 1 - beta2**count

        def of_leaf(gradient, mean, square):
            mean = mean.astype(jnp.float32)
            mean = jnp.where(finite, beta1 * mean + (1 - beta1) * gradient, mean)
            square = jnp.where(finite, beta2 * square + (1 - beta2) * jnp.square(gradient), square)
            if platform() == "cpu":
                mean, square = jax.lax.optimization_barrier((mean, square))
            return (mean / unbiased1) / (jnp.sqrt(square / unbiased2) + eps), mean.astype(state_dtype), square

        gradients, tree = jax.tree.flatten(updates)
        of_leaves = map(of_leaf, gradients, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu))
        steps, means, squares = (tree.unflatten(leaves) for leaves in zip(*of_leaves, strict=True))
        return steps, optax.ScaleByAdamState(count, means, squares)

    return optax.GradientTransformationExtraArgs(init, update)
