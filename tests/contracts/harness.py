"""Runs a sparse layer of the package once per (case, dispatcher, mesh) and the oracle once per case."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax import nnx

from sparse_lm.moe.balance import load_balance, z_loss
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.routers.base import RouterState
from sparse_lm.moe.stats import unaccounted
from sparse_lm.moe.types import LayerStats
from sparse_lm.sharding import DEFAULT

BATCH, LENGTH, WIDTH = 16, 8, 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run: everything that the contracts compare, on the host."""

    y_BLD: np.ndarray
    loss: float
    load_balance: float
    z: float
    stats: LayerStats
    unaccounted: int
    d_weights: dict[str, np.ndarray]
    d_x: np.ndarray


def deviation(got: Any, expected: Any) -> float:
    """Largest difference as a share of the largest expected value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(got))
    return float(np.max(np.abs(got - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30))


def on_mesh(mesh: jax.sharding.Mesh | None):
    """A context in which the mesh is set, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and a mask with padding at the end of rows, in the middle of one, and a row of nothing else."""
    x_BLD = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    mask_BL = np.ones((BATCH, LENGTH), bool)
    mask_BL[3, 5:] = mask_BL[7, 2:4] = mask_BL[10] = mask_BL[15, 1:] = False
    return x_BLD, mask_BL


def token_ids() -> np.ndarray:
    """Token ids, of which some are frequent."""
    return (np.random.default_rng(4).integers(0, 24, (BATCH, LENGTH)) * 3 // 2).astype(np.int32)


def previous_ids() -> np.ndarray:
    """The id before each token, -1 where there is none: rows are documents, and padding ends one."""
    ids_BL, (_, mask_BL) = token_ids(), inputs()
    previous_BL = np.full_like(ids_BL, -1)
    previous_BL[:, 1:] = np.where(mask_BL[:, 1:] & mask_BL[:, :-1], ids_BL[:, :-1], -1)
    return previous_BL


def carried(case: cases.Case) -> np.ndarray:
    """Logits of a layer before."""
    shape = (BATCH, LENGTH, case.moe.num_choices)
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def build(case: cases.Case) -> MoE:
    """The layer with the same weights whatever the dispatcher, and with the state that the case asks for."""
    assert case.moe.d_expert is not None
    layer = MoE(jax.random.key(1), WIDTH, case.moe.d_expert, case.activation, case.moe, DEFAULT)

    def random_bias(path, leaf):  # they start at 0, where a wrong one would not show
        name = jax.tree_util.keystr(path)
        return jax.random.normal(jax.random.key(3), leaf.shape) if "bias" in name or "pathway" in name else leaf

    nnx.update(layer, jax.tree_util.tree_map_with_path(random_bias, nnx.state(layer, nnx.Param)))
    for name, value in case.state:
        variable = getattr(layer.router, name)
        assert isinstance(variable, RouterState)
        variable[...] = jnp.asarray(value, jnp.float32)
    return layer


def named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by the last part of their names, such as up_EDF."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    result = {name.rsplit("/", 1)[-1]: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
    assert len(result) == len(leaves)
    return result


def run(case: cases.Case, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32) -> Outcome:
    """The layer's output, loss, gradients and statistics, from one compiled program."""
    x, mask = inputs()
    with on_mesh(mesh):
        graph, parameters, rest = nnx.split(DEFAULT.shard_parameters(build(case)), nnx.Param, ...)
        x_BLD = DEFAULT.constrain(jnp.asarray(x, dtype), "BLD")
        rows = (mask, token_ids(), previous_ids())
        mask_BL, ids_BL, previous_BL = (DEFAULT.constrain(jnp.asarray(value), "BL") for value in rows)
        carried_BLE = DEFAULT.constrain(jnp.asarray(carried(case)), "BLE") if case.moe.router.pathway else None

        def loss(parameters, x_BLD, mask_BL, key):
            key = key if case.training else None
            y_BLD, stats = nnx.merge(graph, parameters, rest)(
                x_BLD, mask_BL, key, ids_BL, previous_BL, carried_BLE=carried_BLE
            )
            router = jax.tree.map(lambda leaf: leaf[None], stats.router)
            tokens = jnp.sum(stats.router.tokens_U)
            whole = jnp.sum(router.load_UE, axis=1) if case.moe.balance.scope == "global" else None
            weights = getattr(case.moe.losses, "expert_weights", None)
            balance, z = load_balance(router, tokens, whole, weights)[0], z_loss(router, tokens)[0]
            total = jnp.sum(jnp.square(y_BLD.astype(jnp.float32)))
            total = total + oracle.LOAD_WEIGHT * balance + oracle.Z_WEIGHT * z
            total = total + jnp.sum(stats.router.penalty_U) / jnp.maximum(tokens, 1)
            width = stats.dispatch.served.shape[-1] - 1  # of the decision, which need not be top_k
            return total, (y_BLD, balance, z, stats, unaccounted(stats, width))

        function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (total, aux), (d_weights, d_x) = function(parameters, x_BLD, mask_BL, jax.random.key(2))
        y_BLD, balance, z, stats, lost = jax.tree.map(np.asarray, aux)
    return Outcome(y_BLD, float(total), float(balance), float(z), stats, int(lost), named(d_weights), np.asarray(d_x))


@functools.cache
def expected(name: str, dtype: Any = jnp.float32) -> tuple[oracle.Answer, float, dict[str, np.ndarray], np.ndarray]:
    """The oracle's answer, and its loss and gradients by differentiation. dtype: what its input is rounded to."""
    problem = problem_of(name, dtype)
    answer = oracle.layer(problem)
    loss, d_weights, d_x = oracle.gradients(problem, answer)
    return answer, loss, dict(d_weights), d_x


def problem_of(name: str, dtype: Any = jnp.float32) -> oracle.Problem:
    """A router case as the oracle sees it, its input rounded as that of a layer of this type."""
    case = cases.ROUTER_CASES[name]
    x_BLD, mask_BL = inputs()
    x_BLD = np.asarray(jnp.asarray(x_BLD, dtype))
    weights, state = (
        {key: value.astype(np.float64) for key, value in named(nnx.state(build(case), kind)).items()}
        for kind in (nnx.Param, RouterState)
    )
    rows = (x_BLD.astype(np.float64), mask_BL, token_ids(), previous_ids(), carried(case).astype(np.float64))
    return oracle.Problem(case.moe, case.activation, case.training, weights, *rows, state)


def compare(got: Outcome, name: str, dtype: Any = jnp.float32) -> dict[str, float]:
    """Deviation from the oracle, by quantity; raises where a count differs. dtype: of the layer's input."""
    answer, loss, d_weights, d_x = expected(name, dtype)
    router, dispatch = got.stats.router, got.stats.dispatch
    for field in ("tokens", "padding", "declined"):
        np.testing.assert_array_equal(getattr(router, f"{field}_U"), [getattr(unit, field) for unit in answer.units])
    np.testing.assert_array_equal(router.load_UE, [unit.load_E for unit in answer.units])
    assert int(dispatch.kept) == answer.kept_TK.sum()
    lost_TK = answer.used_TK & ~answer.kept_TK
    assert int(dispatch.dropped) == lost_TK.sum()
    by_expert = np.bincount(answer.candidate_TK[lost_TK], minlength=len(dispatch.dropped_E))
    np.testing.assert_array_equal(dispatch.dropped_E, by_expert)
    served = [int(((answer.kept_TK.sum(1) == k) & inputs()[1].reshape(-1)).sum()) for k in range(len(dispatch.served))]
    np.testing.assert_array_equal(dispatch.served, served)
    assert got.d_weights.keys() == d_weights.keys()
    return {
        "y": deviation(got.y_BLD, answer.y_BLD),
        "loss": deviation(got.loss, loss),
        "load_balance": deviation(got.load_balance, answer.load_balance),
        "z_loss": deviation(got.z, answer.z),
        "importance": deviation(router.importance_UE, [unit.importance_E for unit in answer.units]),
        "z": deviation(router.z_U, [unit.z for unit in answer.units]),
        "entropy": deviation(router.entropy_U, [unit.entropy for unit in answer.units]),
        "d_x": deviation(got.d_x, d_x),
        **{f"d_{key}": deviation(got.d_weights[key], value) for key, value in d_weights.items()},
    }
