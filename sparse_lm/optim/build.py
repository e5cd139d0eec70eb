"""The optimizer: clip, precondition, decay, scale by the schedule.

The same chain for every optimizer, so that `weight_decay` and `learning_rate` mean the same in all of them: a decayed
parameter shrinks by learning_rate(count) * weight_decay of itself per update. (optax's own `adafactor` adds the decay
after the learning rate, so that there the same number would decay orders of magnitude faster.)

State and arithmetic are float32 whatever the parameters are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_lm.optim.config import OptimConfig
from sparse_lm.optim.groups import decay_mask, stacking_axes
from sparse_lm.optim.schedules import schedule
from sparse_lm.sharding import lead_like

FACTOR_FROM = 128  # T5: second moments are factored where both sides of the matrix are at least this long


def build_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation that `config` describes, for a training of `steps` updates.

    `update` needs the parameters as its third argument; their names tell which of them decay (see `groups`). Works
    under explicit sharding: the state is laid out like the parameters that it belongs to.

    `update` and `init` raise `ValueError` on a parameter whose name does not say its axes.
    """
    precondition = {
        "adamw": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        "lion": lambda: optax.scale_by_lion(config.beta1, config.beta2),
        "adafactor": _adafactor,
    }[config.name]()
    chain = [
        *([] if config.clip is None else [optax.clip_by_global_norm(config.clip)]),
        precondition,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule(config, steps)),
    ]
    return _in_float32(optax.chain(*chain))


def apply(
    optimizer: optax.GradientTransformation, grads: Any, state: optax.OptState, params: Any
) -> tuple[Any, optax.OptState]:
    """One update: `(new params, new state)`. The sum is made in float32 and then rounded to each parameter's type."""
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 copies of gradients and parameters, hence with float32 state and updates."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        return inner.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)


def _adafactor() -> optax.GradientTransformation:
    """Adafactor with the settings of T5 and Switch, on every matrix by itself.

    Decay of the second moments 1 - t^-0.8, update clipped at an RMS of 1, step relative to the RMS of the parameter,
    no momentum (Shazeer & Stern 2018, algorithm 4; Fedus et al. 2022, section 2.4). `beta1`, `beta2` and `eps` are
    not used.

    optax factors the two longest axes of an array and takes its RMS over all of it. For `up_EDF` stacked as
    [N, E, D, F] that would average second moments over experts as soon as E is longer than D, and would tie the step
    of a layer to the scale of the other layers. So the leading N and E axes are mapped over: scanned layers update
    exactly as separate ones do, and an expert as if it were alone.
    """
    one = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=FACTOR_FROM),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    # The count of updates is one number, however many matrices there are.
    state_axes = (optax.FactoredState(count=None, v_row=0, v_col=0, v=0), None, None)  # type: ignore[arg-type]

    def init(params: Any) -> Any:
        def init_leaf(path: tuple, param: jax.Array) -> optax.OptState:
            function = one.init
            for _ in range(stacking_axes(path, param.ndim)):
                function = jax.vmap(function, out_axes=state_axes)
            return function(param)

        return jax.tree_util.tree_map_with_path(init_leaf, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def update_leaf(path: tuple, param: jax.Array, grad: jax.Array, leaf_state: Any) -> tuple[Any, Any]:
            function, stacked = one.update, stacking_axes(path, param.ndim)
            for _ in range(stacked):
                function = jax.vmap(function, in_axes=(0, state_axes, 0), out_axes=(0, state_axes))
            leaf_state = jax.tree.map(lambda x: lead_like(x, param, stacked), leaf_state)
            return function(grad, leaf_state, param)

        paths, tree = jax.tree_util.tree_flatten_with_path(params)
        pairs = [
            update_leaf(path, param, grad, leaf_state)
            for (path, param), grad, leaf_state in zip(
                paths, tree.flatten_up_to(updates), tree.flatten_up_to(state), strict=True
            )
        ]
        return tree.unflatten([new for new, _ in pairs]), tree.unflatten([new for _, new in pairs])

    return optax.GradientTransformation(init, update)
