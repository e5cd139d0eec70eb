"""Adafactor on every matrix by itself, with moments that are laid out over a mesh like the parameters they belong to.

A second moment of a matrix is kept as the means of its rows and of its columns. The names of these say which axes they
have, as those of parameters do (`up_EDF` has `row_ED` and `column_EF`), so that one table of rules cuts both.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_lm.optim.groups import letters, stacking_axes
from sparse_lm.sharding import lead_like

FACTOR_FROM = 128  # T5: second moments are factored where both sides of the matrix are at least this long


class AdafactorState(NamedTuple):
    """count: updates so far. moments: per parameter its second moments, by their names."""

    count: jax.Array
    moments: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor with the settings of T5 and Switch, before learning rate and decay.

    Decay of the second moments 1 - t^-0.8, update clipped at an RMS of 1, step relative to the RMS of the parameter,
    no momentum (Shazeer & Stern 2018, algorithm 4; Fedus et al. 2022, section 2.4).

    optax factors the two longest axes of an array and takes its RMS over all of it. For `up_EDF` stacked as
    [N, E, D, F] that would average second moments over experts as soon as E is longer than D, and would tie the step
    of a layer to the scale of the other layers. So the leading N and E axes are mapped over: scanned layers update
    exactly as separate ones do, and an expert as if it were alone.

    `update` and `init` raise `ValueError` on a parameter whose name does not say its axes.
    """

    def init(params: Any) -> AdafactorState:
        moments = jax.tree_util.tree_map_with_path(_zeros, params)
        return AdafactorState(jnp.zeros((), jnp.int32), moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        def update_leaf(path: tuple, param: jax.Array, grad: jax.Array, moments: dict) -> tuple[jax.Array, dict]:
            function, stacked = _update_one, stacking_axes(path, param.ndim)
            for _ in range(stacked):
                function = jax.vmap(function, in_axes=(0, 0, None, 0))
            names = sorted(moments, reverse=True)  # rows first; a dictionary forgets its order when it is compiled
            values = tuple(lead_like(moments[name], param, stacked) for name in names)
            new, values = function(grad, param, state.count, values)
            return new, dict(zip(names, values, strict=True))

        paths, tree = jax.tree_util.tree_flatten_with_path(params)
        grads, moments = tree.flatten_up_to(updates), tree.flatten_up_to(state.moments)
        pairs = [update_leaf(*path, *of_it) for path, *of_it in zip(paths, grads, moments, strict=True)]
        new = AdafactorState(
            jnp.asarray(optax.safe_increment(state.count)), tree.unflatten([after for _, after in pairs])
        )
        return tree.unflatten([step for step, _ in pairs]), new

    return optax.GradientTransformation(init, update)


def _zeros(path: tuple, param: jax.Array) -> dict[str, jax.Array]:
    stacked = stacking_axes(path, param.ndim)
    longest, second = _factored(param.shape[stacked:]) or (None, None)
    if longest is None or second is None:
        return {f"square_{letters(path)}": jnp.zeros_like(param, jnp.float32)}

    def without(axis: int) -> tuple[str, jax.Array]:
        axis += stacked
        place = axis - (param.ndim - len(letters(path)))  # the letters do not count a stack of layers
        # Of the shape and the layout that a sum over the axis has.
        like = jax.eval_shape(lambda x: jnp.sum(x, axis=axis), param)
        return letters(path)[:place] + letters(path)[place + 1 :], jnp.zeros_like(like, jnp.float32)

    (row_letters, row), (column_letters, column) = without(longest), without(second)
    return {f"row_{row_letters}": row, f"column_{column_letters}": column}


def _factored(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The longest axis and the one after it, if a parameter of this shape is factored; as optax chooses them."""
    order = np.argsort(shape)
    if len(shape) < 2 or shape[order[-2]] < FACTOR_FROM:
        return None
    return int(order[-1]), int(order[-2])


def _update_one(
    grad: jax.Array, param: jax.Array, count: jax.Array, moments: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The step of one matrix, and its moments (two if it is factored) after it."""
    scale = optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=FACTOR_FROM)
    rest = optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    unused = jnp.zeros((1,), jnp.float32)  # what optax keeps in place of moments that a parameter does not have
    factored = len(moments) == 2
    state = optax.FactoredState(count, *((*moments, unused) if factored else (unused, unused, *moments)))
    step, state = cast(tuple[Any, Any], scale.update(grad, state, param))  # trees of one array
    step = cast(jax.Array, rest.update(step, rest.init(param), param)[0])
    return step, (state.v_row, state.v_col) if factored else (state.v,)
