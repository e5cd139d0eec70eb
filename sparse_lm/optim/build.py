"""The optimizer: clip, precondition, decay, scale by the schedule.

The same chain for every optimizer, so that `weight_decay` and `learning_rate` mean the same in all of them: a decayed
parameter shrinks by learning_rate(count) * weight_decay of itself per update. (optax's own `adafactor` adds the decay
after the learning rate, so that there the same number would decay orders of magnitude faster.)

Arithmetic is float32 whatever the parameters are, and so is the state, but for a first moment that may be bfloat16. A
second moment may not: with beta2 = 0.999 it changes by less per update than bfloat16 can tell apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_lm.optim.adafactor import scale_by_adafactor
from sparse_lm.optim.adam import scale_by_adam
from sparse_lm.optim.config import OptimConfig
from sparse_lm.optim.groups import decay_mask
from sparse_lm.optim.schedules import schedule
from sparse_lm.sharding import lead_like


class Keeping(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` takes `finite`: where that is False, the state stays as it was."""


def build_optimizer(config: OptimConfig, steps: int) -> Keeping:
    """The gradient transformation that `config` describes, for a training of `steps` updates.

    `update` needs the parameters as its third argument; their names tell which of them decay (see `groups`). Works
    under explicit sharding: the state is laid out like the parameters that it belongs to.

    `update` and `init` raise `ValueError` on a parameter whose name does not say its axes.
    """
    precondition = {
        "adamw": lambda: scale_by_adam(config.beta1, config.beta2, config.eps, config.state_dtype),
        "lion": lambda: keeping(optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=config.state_dtype)),
        "sgd": lambda: keeping(optax.trace(config.beta1, accumulator_dtype=config.state_dtype)),
        "adafactor": lambda: keeping(scale_by_adafactor()),
    }[config.name]()
    chain = [
        *([] if config.clip is None else [_clip(config.clip)]),
        precondition,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        keeping(optax.scale_by_learning_rate(schedule(config, steps))),
    ]
    return _in_float32(optax.chain(*chain))


def keeping(inner: optax.GradientTransformation) -> Keeping:
    """Any optimizer as one that takes `finite`; the new state is laid out like the old one."""
    if isinstance(inner, Keeping):
        return inner

    def update(updates: Any, state: Any, params: Any = None, *, finite: jax.Array | bool = True, **_: Any):
        updates, new = inner.update(updates, state, params)
        kept = jax.tree.map(lambda x, old: jnp.where(finite, lead_like(x, old, x.ndim), old), new, state)
        return updates, kept

    return Keeping(inner.init, update)


def apply(
    optimizer: optax.GradientTransformation,
    grads: Any,
    state: optax.OptState,
    params: Any,
    finite: jax.Array | bool = True,
) -> tuple[Any, optax.OptState]:
    """One update: `(new params, new state)`. The sum is made in float32 and then rounded to each parameter's type.

    Where `finite` is False the state is the old one, and the parameters are nothing to be used.
    """
    updates, state = keeping(optimizer).update(grads, state, params, finite=finite)
    return optax.apply_updates(params, updates), state


def _clip(most: float) -> optax.GradientTransformation:
    """Gradients times a factor that leaves their norm at `most` or below it.

    A division by the norm, as optax has it, is computed apart by XLA for CPU: all gradients are written once more.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _in_float32(inner: optax.GradientTransformationExtraArgs) -> Keeping:
    """`inner` on float32 copies of gradients and parameters, hence with float32 updates and, unless asked, state."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        return inner.update(cast(updates), state, None if params is None else cast(params), **extra)

    return Keeping(lambda params: inner.init(cast(params)), update)
