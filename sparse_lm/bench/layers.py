"""The MoE layer against the dense layer of the same useful FLOPs, forward and backward, on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.bench.harness import Comparison, Options, paired
from sparse_lm.config import ConfigError
from sparse_lm.mesh import make_mesh
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.nn.mlp import Mlp
from sparse_lm.sharding import DEFAULT
from sparse_lm.telemetry.peak import matmul_peak

CAPACITY_FACTOR = 1.25
REPEATS, QUICK_REPEATS = 7, 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens: in one call, in groups of `group`. d_ff: of the dense layer; an expert has d_ff / top_k."""

    tokens: int = 4096
    group: int = 512
    d_model: int = 512
    d_ff: int = 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """One sparse layer."""

    num_experts: int
    top_k: int
    dispatcher: str


QUICK = Sizes(tokens=512, group=128, d_model=64, d_ff=256)
SHAPES = ((8, 2), (32, 2), (64, 1))
# The oracle does num_experts / top_k times the work: beyond 8 experts there is nothing to learn from its time.
CASES = tuple(
    Case(experts, top_k, dispatcher)
    for experts, top_k in SHAPES
    for dispatcher in ("gather", "dropless", "einsum", "dense")
    if dispatcher != "dense" or experts == 8
)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A layer ready to be timed. xla_flops: what the compiler counts in one call, None where it does not."""

    call: Callable[[], object]
    xla_flops: float | None


def moe_layer(options: Options) -> list[Comparison]:
    """One row for each of `CASES`. Raises `ConfigError` when the tokens are not whole groups.

    The routers are as initialised, so that loads are nearly even. The time includes the gradients of the parameters
    and of the input, and neither a router loss nor an optimizer.
    """
    sizes = QUICK if options.quick else Sizes()
    if options.tokens is not None:
        sizes = dataclasses.replace(sizes, tokens=options.tokens)
    if sizes.tokens < 1 or sizes.tokens % sizes.group:
        raise ConfigError("tokens", sizes.tokens, f"must be a positive multiple of the group size {sizes.group}")
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    peak = matmul_peak(options.dtype)
    with jax.set_mesh(make_mesh({}, jax.local_devices()[:1])):
        dense = time_dense(sizes, options.dtype, options.activation)
        rows = [compare(case, sizes, options, (dense, peak), repeats) for case in CASES]
    peak = max(peak, matmul_peak(options.dtype))
    return [dataclasses.replace(row, peak=peak) for row in rows]


def compare(case: Case, sizes: Sizes, options: Options, against: tuple[Timed, float], repeats: int) -> Comparison:
    """Times one case. against: the dense layer, and the peak in FLOP/s. Call under a mesh of one device."""
    dense, peak = against
    sparse = time_sparse(case, sizes, options.dtype, options.activation)
    # The compiler counts the body of a loop once, so that it has no figure for loops over blocks.
    counted = sparse.xla_flops is not None and dense.xla_flops and case.dispatcher != "dropless"
    work = sparse.xla_flops / dense.xla_flops if counted else None  # type: ignore[operator]
    return Comparison(
        case=f"E={case.num_experts} k={case.top_k} {case.dispatcher}",
        against="dense",
        paired=paired(sparse.call, dense.call, repeats),
        tokens=sizes.tokens,
        flops=useful_flops(sizes, case.num_experts),
        flops_against=useful_flops(sizes),
        peak=peak,
        work=work,
    )


def useful_flops(sizes: Sizes, num_experts: int = 0) -> int:
    """FLOPs of forward and backward that a token needs: two matrices D x F, and the router's D x E."""
    return 6 * sizes.tokens * sizes.d_model * (2 * sizes.d_ff + num_experts)


def time_dense(sizes: Sizes, dtype: str, activation: str) -> Timed:
    """The dense layer, compiled. activation: not a gated one, which would have three matrices."""
    layer = Mlp(jax.random.key(0), sizes.d_model, sizes.d_ff, activation, DEFAULT)
    return _timed(layer, lambda layer, x_BLD, _: layer(x_BLD), sizes, dtype)


def time_sparse(case: Case, sizes: Sizes, dtype: str, activation: str) -> Timed:
    """The sparse layer, compiled, with the capacity of training.

    Raises `ConfigError` when top_k does not divide d_ff.
    """
    if sizes.d_ff % case.top_k:
        raise ConfigError("d_ff", sizes.d_ff, f"must be a multiple of top_k={case.top_k} for equal FLOPs")
    config = MoEConfig(
        num_experts=case.num_experts,
        top_k=case.top_k,
        dispatcher=case.dispatcher,  # type: ignore[arg-type]
        capacity_factor=None if case.dispatcher == "dropless" else CAPACITY_FACTOR,
        capacity_factor_eval=None,
    )
    layer = MoE(jax.random.key(0), sizes.d_model, sizes.d_ff // case.top_k, activation, config, DEFAULT)
    mask_BL = jnp.ones((sizes.tokens // sizes.group, sizes.group), bool)
    return _timed(layer, lambda layer, x_BLD, key: layer(x_BLD, mask_BL, key)[0], sizes, dtype)


def _timed(layer: nnx.Module, apply: Callable, sizes: Sizes, dtype: str) -> Timed:
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    shape = (sizes.tokens // sizes.group, sizes.group, sizes.d_model)
    x_key, dy_key, key = jax.random.split(jax.random.key(1), 3)
    x_BLD, dy_BLD = (DEFAULT.constrain(jax.random.normal(k, shape, dtype), "BLD") for k in (x_key, dy_key))
    parameters = DEFAULT.shard_parameters(parameters)

    def both_ways(parameters, x_BLD, dy_BLD, key):
        y_BLD, pull = jax.vjp(lambda p, x: apply(nnx.merge(graph, p, rest), x, key), parameters, x_BLD)
        return y_BLD, pull(dy_BLD)

    arguments = (parameters, x_BLD, dy_BLD, key)
    lowered = jax.jit(both_ways).lower(*arguments)
    compiled = lowered.compile()
    cost = lowered.cost_analysis() or {}  # before the compiler replaces products by calls into libraries
    return Timed(lambda: jax.block_until_ready(compiled(*arguments)), cost.get("flops"))
