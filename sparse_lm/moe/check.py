"""Whether a router keeps what the rest of the package relies on: for those who write one, before they train it.

print(check_router(MoEConfig(num_experts=8, top_k=2, router=Mine())))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.layer import MoE, rows_together
from sparse_lm.moe.stats import unaccounted
from sparse_lm.moe.types import LayerStats, Replay
from sparse_lm.sharding import DEFAULT

D_MODEL, D_EXPERT, LENGTH, VOCABULARY = 16, 8, 16, 64
TOLERANCE = 1e-4  # of the largest value: sums in another order, in float32


@dataclasses.dataclass(frozen=True)
class Check:
    """One property: whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


@dataclasses.dataclass(frozen=True)
class RouterChecks:
    """All properties of a router of this kind; as text a line for each."""

    kind: str
    checks: tuple[Check, ...]

    @property
    def hold(self) -> bool:
        """Whether every one does."""
        return all(check.holds for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{'ok' if c.holds else 'FAILS':5}  {c.name:{width}}  {c.found}" for c in self.checks]
        return "\n".join([f"router {self.kind}", *lines])


@dataclasses.dataclass(frozen=True)
class _Inputs:
    x_BLD: jax.Array
    mask_BL: jax.Array
    ids_BL: jax.Array

    def with_another_end(self) -> _Inputs:
        """With other tokens in the second half of the first row."""
        half = self.mask_BL.shape[1] // 2
        x_BLD = self.x_BLD.at[0, half:].set(1 - 3 * self.x_BLD[0, half:])
        return _Inputs(x_BLD, self.mask_BL, self.ids_BL.at[0, half:].set(VOCABULARY - 1 - self.ids_BL[0, half:]))


@dataclasses.dataclass(frozen=True)
class _Outcome:
    y_BLD: np.ndarray
    stats: LayerStats


def check_router(config: MoEConfig, seed: int = 0) -> RouterChecks:
    """Runs a small sparse layer with fresh weights, in training and in evaluation, with every dispatcher that fits.

    Experts exist, and a token has each of them once; gates are finite; probabilities sum to 1; no assignment is lost
    and padding has none; all dispatchers agree; what the configuration calls causal sees no later token; the weights
    get a gradient. On one device, with random tokens: `tests/contracts` does more, on meshes and against an oracle.
    """
    by_position = config.grouping == "position"
    length = LENGTH if by_position else max(LENGTH, config.group_size or 0)
    inputs = _inputs(max(4, 2 * rows_together(config, length)), length, seed)
    layers = {name: _layer(_with(config, name), seed) for name in dispatchers(config)}
    first = next(iter(layers))
    checks: list[Check] = []
    for mode, key in (("training", jax.random.key(seed)), ("evaluation", None)):
        outcomes = {name: _run(layer, inputs, key) for name, layer in layers.items()}
        other = _run(layers[first], inputs.with_another_end(), key)
        found = (
            _choices(outcomes[first].stats, config),
            _probabilities(outcomes[first].stats),
            _accounts(outcomes),
            _agreement(outcomes),
            _causality(outcomes[first], other, config),
        )
        checks += [dataclasses.replace(check, name=f"{check.name}, {mode}") for check in found]
    return RouterChecks(config.router.kind, (*checks, _gradient(layers[first], inputs, jax.random.key(seed))))


def dispatchers(config: MoEConfig) -> tuple[str, ...]:
    """The dispatchers that can carry out what such a layer decides."""
    return tuple(name for name in DISPATCHERS if _allowed(config, name))


def _with(config: MoEConfig, dispatcher: str) -> MoEConfig:
    unused = {name: getattr(MoEConfig, name) for name in ("exchange_chunks", "hot_copies", "exchange_room")}
    return config.replace(dispatcher=dispatcher, **unused)


def _allowed(config: MoEConfig, dispatcher: str) -> bool:
    try:
        _with(config, dispatcher)
    except ConfigError:  # the configuration stands, so it is the dispatcher that does not fit
        return False
    return True


def _inputs(rows: int, length: int, seed: int) -> _Inputs:
    values, ids = jax.random.split(jax.random.key(seed))
    # Padding at the end of the second row, and a third one of nothing else.
    mask_BL = np.ones((rows, length), bool)
    mask_BL[1, length // 2 :] = mask_BL[2] = False
    x_BLD = jax.random.normal(values, (rows, length, D_MODEL))
    return _Inputs(x_BLD, jnp.asarray(mask_BL), jax.random.randint(ids, (rows, length), 0, VOCABULARY))


def _layer(config: MoEConfig, seed: int) -> MoE:
    return MoE(jax.random.key(seed + 1), D_MODEL, config.d_expert or D_EXPERT, "gelu", config, DEFAULT)


def _run(layer: MoE, inputs: _Inputs, key: jax.Array | None) -> _Outcome:
    return _Outcome(*jax.device_get(_jitted(layer, inputs.x_BLD, inputs.mask_BL, inputs.ids_BL, key)))


@jax.jit
def _jitted(layer: MoE, x_BLD, mask_BL, ids_BL, key):
    return _apply(layer, x_BLD, mask_BL, ids_BL, key)


def _apply(layer: MoE, x_BLD, mask_BL, ids_BL, key):
    before_BL = jnp.pad(ids_BL, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    carried_BLE = jnp.zeros((*mask_BL.shape, layer.config.num_choices)) if layer.config.router.pathway else None
    return layer(x_BLD, mask_BL, key, ids_BL, before_BL, Replay(record=True), carried_BLE)


def _choices(stats: LayerStats, config: MoEConfig) -> Check:
    assert stats.decision is not None
    expert_GSK, gate_GSK = stats.decision.expert_GSK, stats.decision.gate_GSK
    sorted_GSK = np.sort(expert_GSK, axis=-1)
    twice = int(((sorted_GSK[..., 1:] == sorted_GSK[..., :-1]) & (sorted_GSK[..., 1:] >= 0)).sum())
    outside = int(((expert_GSK < -1) | (expert_GSK >= config.num_choices)).sum())
    infinite = int((~np.isfinite(gate_GSK)).sum())
    words = [f"{int((expert_GSK >= 0).sum())} choices among {config.num_choices} experts"]
    words += [f"{outside} outside -1 to {config.num_choices - 1}"] if outside else []
    words += [f"{twice} of an expert that the token had already"] if twice else []
    words += [f"{infinite} gates not finite"] if infinite else []
    return Check("experts and gates", not (twice or outside or infinite), "; ".join(words))


def _probabilities(stats: LayerStats) -> Check:
    off = np.abs(stats.router.importance_UE.sum(-1) / np.maximum(stats.router.tokens_U, 1) - 1)
    worst = float(np.max(np.where(stats.router.tokens_U > 0, off, 0.0)))
    return Check("probabilities sum to 1", worst < TOLERANCE, f"off by {worst:.1g} at most")


def _accounts(outcomes: Mapping[str, _Outcome]) -> Check:
    lost = {}
    for name, outcome in outcomes.items():
        # Of the decision, which may have another width than top_k.
        lost[name] = int(unaccounted(outcome.stats, outcome.stats.dispatch.served.shape[-1] - 1))
    dispatch = next(iter(outcomes.values())).stats.dispatch
    words = [f"{int(dispatch.kept)} kept, {int(dispatch.dropped)} dropped"]
    words += [f"{n:+} with {name} (does padding get experts?)" for name, n in lost.items() if n]
    return Check("every assignment accounted for", not any(lost.values()), "; ".join(words))


def _agreement(outcomes: Mapping[str, _Outcome]) -> Check:
    reference = outcomes["dense"] if "dense" in outcomes else next(iter(outcomes.values()))
    apart = {name: _deviation(outcome.y_BLD, reference.y_BLD) for name, outcome in outcomes.items()}
    worst = max(apart, key=lambda name: apart[name])
    words = f"{', '.join(outcomes)}; apart by {apart[worst]:.1g}"
    return Check("dispatchers agree", apart[worst] < TOLERANCE, words)


def _causality(outcome: _Outcome, other: _Outcome, config: MoEConfig) -> Check:
    half = outcome.y_BLD.shape[1] // 2
    change = _deviation(other.y_BLD[0, :half], outcome.y_BLD[0, :half])
    if not config.causal:
        return Check("no look at later tokens", True, f"not claimed; a later token changes {change:.1g}")
    return Check("no look at later tokens", change < TOLERANCE, f"a later token changes {change:.1g}")


def _gradient(layer: MoE, inputs: _Inputs, key: jax.Array) -> Check:
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def gradient(parameters):
        def loss(parameters):
            layer = nnx.merge(graph, parameters, rest)
            y_BLD = _apply(layer, inputs.x_BLD, inputs.mask_BL, inputs.ids_BL, key)[0]
            return jnp.sum(y_BLD * jnp.cos(jnp.arange(y_BLD.size, dtype=jnp.float32)).reshape(y_BLD.shape))

        return jax.grad(loss)(parameters)

    weights = jax.tree.leaves(nnx.to_pure_dict(gradient(parameters)).get("router", {}))
    largest = max((float(jnp.max(jnp.abs(leaf))) for leaf in weights), default=0.0)
    if not layer.config.router.learned:
        return Check("the task teaches the router", True, "not claimed: learned is False")
    words = f"largest gradient {largest:.1g}"
    words += "" if largest else "; where there is nothing to learn, set learned = False in its configuration"
    return Check("the task teaches the router", bool(np.isfinite(largest)) and largest > 0, words)


def _deviation(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest expected value; infinite where a number is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
