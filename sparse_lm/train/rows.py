"""From what a step reports to a row of metrics."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sparse_lm.evals.perplexity import Evaluation
from sparse_lm.models.reports import DepthStats
from sparse_lm.moe.balance import max_violation
from sparse_lm.moe.types import LayerStats
from sparse_lm.objectives.causal import RoutingParts
from sparse_lm.train.step import StepMetrics


def train_row(step: int, metrics: StepMetrics, layers: bool) -> dict[str, Any]:
    """The row of a training step (metrics already on the host). layers: with the arrays per layer and expert."""
    row: dict[str, Any] = {
        "step": step,
        "split": "train",
        "loss": float(metrics.parts.loss),
        "total_loss": float(metrics.total),
        "gradient_norm": float(metrics.gradient_norm),
        "nonfinite_steps": int(metrics.nonfinite),
    }
    if metrics.parts.depth is not None:
        row |= depth_row(metrics.parts.depth)
    arrays: dict[str, Any] = {}
    if metrics.parts.attention is not None:
        row |= attention_row(metrics.parts.attention)
        found = layer_arrays(metrics.parts.attention.stats)
        arrays = {f"attention_{name}": found[name] for name in ("load", "entropy", "gate_histogram")}
    stats = metrics.parts.stats
    if stats is None:
        row |= {"dropped_fraction": 0.0}
        return row | {"layers": arrays} if layers and arrays else row
    router, dispatch = jax.tree.map(lambda x: np.asarray(x, np.float64), (stats.router, stats.dispatch))
    load_NE = router.load_UE.sum(axis=1)
    tokens_N = router.tokens_U.sum(axis=1)
    row |= {
        "dropped_fraction": _ratio(dispatch.dropped.sum(), load_NE.sum()),
        "declined_fraction": _ratio(router.declined_U.sum(), router.declined_U.sum() + load_NE.sum()),
        "load_balance": float(np.mean(metrics.parts.load_balance_N)),
        "router_z": float(np.mean(metrics.parts.z_N)),
        "router_entropy": _ratio(router.entropy_U.sum(), tokens_N.sum()),
        "max_violation": float(np.mean(max_violation(load_NE.astype(np.int64)))),
        "gini": float(np.mean([gini(load_E) for load_E in load_NE])),
        "kept_gate_mass": _ratio(dispatch.kept_gate_mass.sum(), dispatch.gate_mass.sum()),
        "served": _rounded(dispatch.served.sum(axis=0) / max(1.0, dispatch.served.sum())),
    }
    return row | {"layers": layer_arrays(stats) | arrays} if layers else row


def attention_row(parts: RoutingParts) -> dict[str, Any]:
    """Of attention experts: losses, entropy and balance, means over layers; see the same names without `attention_`."""
    router = jax.tree.map(lambda x: np.asarray(x, np.float64), parts.stats.router)
    load_NE = router.load_UE.sum(axis=1)
    return {
        "attention_declined_fraction": _ratio(router.declined_U.sum(), router.declined_U.sum() + load_NE.sum()),
        "attention_load_balance": float(np.mean(parts.load_balance_N)),
        "attention_router_z": float(np.mean(parts.z_N)),
        "attention_router_entropy": _ratio(router.entropy_U.sum(), router.tokens_U.sum()),
        "attention_max_violation": float(np.mean(max_violation(load_NE.astype(np.int64)))),
    }


def depth_row(stats: DepthStats) -> dict[str, Any]:
    """Of the blocks that tokens may skip: share of the real tokens that passed, how often the predictor is right
    about who is chosen, and its cross-entropy in nats per token, each over all of them; the share per block as well.
    """
    processed_N, skipped_N, agreed_N, loss_N = (
        np.asarray(x, np.float64) for x in (stats.processed, stats.skipped, stats.agreed, stats.loss)
    )
    real_N = processed_N + skipped_N
    return {
        "depth_processed": _ratio(processed_N.sum(), real_N.sum()),
        "depth_accuracy": _ratio(agreed_N.sum(), real_N.sum()),
        "depth_loss": _ratio(loss_N.sum(), real_N.sum()),
        "depth_processed_by_layer": _rounded(processed_N / np.maximum(real_N, 1)),
    }


def layer_arrays(stats: LayerStats) -> dict[str, Any]:
    """Per sparse layer: share of the load per expert, drops (by place in the group, by expert), entropy, gates."""
    router, dispatch = jax.tree.map(lambda x: np.asarray(x, np.float64), (stats.router, stats.dispatch))
    load_NE = router.load_UE.sum(axis=1)
    total_N1 = np.maximum(load_NE.sum(axis=1, keepdims=True), 1)
    tokens_N = np.maximum(router.tokens_U.sum(axis=1), 1)
    routed = np.maximum(dispatch.routed_by_position.sum(axis=0), 1)
    return {
        "load": _rounded(load_NE / total_N1),
        "dropped": _rounded(dispatch.dropped / total_N1[:, 0]),
        "entropy": _rounded(router.entropy_U.sum(axis=1) / tokens_N),
        "gate_histogram": dispatch.gate_histogram.astype(int).tolist(),
        "dropped_by_position": _rounded(dispatch.dropped_by_position.sum(axis=0) / routed),
        "dropped_by_expert": _rounded(dispatch.dropped_E / np.maximum(load_NE, 1)),
    }


def validation_row(
    step: int, evaluation: Evaluation, bytes_per_target: float | None, entropy: float | None
) -> dict[str, Any]:
    """The row of an evaluation. entropy: the lowest possible loss, where it is known."""
    row = {
        "step": step,
        "split": "validation",
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte(bytes_per_target),
        "entropy_gap": None if entropy is None else evaluation.loss - entropy,
        "losses_by_domain": evaluation.by_domain,
        "targets": evaluation.targets,
        "dropped_fraction": evaluation.dropped_fraction,
        "max_violation": evaluation.max_violation,
    }
    return row if evaluation.depth is None else row | depth_row(evaluation.depth)


def gini(load_E: np.ndarray) -> float:
    """Gini coefficient of the load: 0 when all experts have the same, 1 - 1/E when one has all."""
    ordered = np.sort(load_E)
    ranks = np.arange(1, len(ordered) + 1)
    total = ordered.sum()
    if total == 0:
        return 0.0
    return float(2 * (ranks * ordered).sum() / (len(ordered) * total) - (len(ordered) + 1) / len(ordered))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _rounded(x: np.ndarray) -> list:
    return np.round(x, 5).tolist()
