"""The train step: one compiled program from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Scalar

from sparse_lm.batch import Batch
from sparse_lm.moe.types import pytree_dataclass
from sparse_lm.objectives.causal import LossParts
from sparse_lm.optim.build import apply
from sparse_lm.train.accumulate import loss_and_gradients
from sparse_lm.train.state import TrainState

Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, "StepMetrics"]]


@pytree_dataclass
class StepMetrics:
    """What a step reports, still on the devices.

    total: cross-entropy and router losses as they were minimised. finite: False when the step changed nothing.
    nonfinite, nonfinite_in_a_row: see `TrainState`. gradient_norm: before clipping.
    """

    total: Scalar
    parts: LossParts
    gradient_norm: Scalar
    finite: Scalar
    nonfinite: Scalar
    nonfinite_in_a_row: Scalar


def make_train_step(
    optimizer: optax.GradientTransformation, accumulate: int, num_domains: int, in_flight: int | None = None
) -> Step:
    """The step, compiled on its first call; the state is donated. accumulate, in_flight: see `loss_and_gradients`.

    The noise of a step (dropout, jitter) comes from the key and the step's number. A step whose loss or gradient is
    not finite leaves model and optimizer as they were, and is counted.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(key, state.step)
        total, parts, gradients = loss_and_gradients(state.model, batch, key, accumulate, num_domains, in_flight)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        graph, parameters, rest = nnx.split(state.model, nnx.Param, ...)
        rules = state.model.rules
        # Under ZeRO the update is made on the shards of the optimizer state, and then gathered.
        shards = rules.for_state.shard_parameters((gradients, parameters))
        updated, optimizer_state = apply(optimizer, shards[0], state.optimizer, shards[1], finite)

        def keep(new, old):
            return jnp.where(finite, new, old)

        model = nnx.merge(graph, updated, rest)
        if parts.stats is not None:
            model.stack = model.stack.with_updated_routers(parts.stats.router)
        if parts.attention is not None:
            model.stack = model.stack.with_updated_attention(parts.attention.stats)
        model = jax.tree.map(keep, rules.shard_parameters(model), state.model)
        skipped = 1 - finite.astype(jnp.int32)
        nonfinite, in_a_row = state.nonfinite + skipped, (state.nonfinite_in_a_row + 1) * skipped
        new = TrainState(state.step + 1, model, optimizer_state, nonfinite, in_a_row)
        metrics = StepMetrics(total, parts, norm, finite, nonfinite, in_a_row)
        return new, jax.tree.map(rules.whole, metrics)  # any process can read what every device holds

    return jax.jit(step, donate_argnums=0)
