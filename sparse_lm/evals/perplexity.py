"""Loss on held-out rows, over all and by domain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sparse_lm.batch import Batch
from sparse_lm.mesh import manual_axis_size
from sparse_lm.models.decoder import Decoder
from sparse_lm.models.reports import DepthStats
from sparse_lm.moe.balance import max_violation
from sparse_lm.objectives.causal import LossParts, causal_loss, count
from sparse_lm.objectives.microbatches import microbatches_of


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss: nats per target. by_domain: the same for each domain that has targets. targets: how many.

    dropped_fraction: of the routed assignments; max_violation: see `moe.balance`, mean over layers; None when dense.
    depth: of the blocks that tokens may skip, if there are any.
    """

    loss: float
    by_domain: dict[str, float]
    targets: int
    dropped_fraction: float | None
    max_violation: float | None
    depth: DepthStats | None = None

    def bits_per_byte(self, bytes_per_target: float | None) -> float | None:
        """The loss in bits per byte of text, or None for data that is no text."""
        return None if bytes_per_target is None else self.loss / math.log(2) / bytes_per_target


Evaluate = Callable[[Decoder, Sequence[Batch]], Evaluation]


def make_evaluate(domains: tuple[str, ...], number: int = 1) -> Evaluate:
    """An evaluation of a model on batches that lie on its mesh; compiled on the first batch.

    number: microbatches that a batch is cut into where the mesh has stages; elsewhere it stays whole.
    """

    @jax.jit
    def parts(model: Decoder, batch: Batch) -> LossParts:
        moe, attention = (part.losses if part else None for part in (model.config.moe, model.config.attention))
        totals = count(batch)
        if manual_axis_size("stage") > 1:
            batch = microbatches_of(model, batch, number)
        found = causal_loss(model, batch, None, totals, moe, len(domains), attention_balance=attention)[1]
        return jax.tree.map(model.rules.whole, found)  # any process can read what every device holds

    def evaluate(model: Decoder, batches: Sequence[Batch]) -> Evaluation:
        each = [jax.device_get(parts(model, batch)) for batch in batches]
        nats = np.stack([p.domain_loss for p in each]).sum(axis=0, dtype=np.float64)
        targets = np.stack([p.domain_targets for p in each]).sum(axis=0, dtype=np.float64)
        dropped = violation = None
        if each[0].stats is not None:
            stats = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *[p.stats for p in each])
            dropped = float(stats.dispatch.dropped.sum() / max(1.0, stats.router.load_UE.sum()))
            load_NE = stats.router.load_UE.sum(axis=1).astype(np.int64)
            violation = float(np.mean(max_violation(load_NE)))
        by_domain = {name: float(nats[i] / targets[i]) for i, name in enumerate(domains) if targets[i] > 0}
        depth = jax.tree.map(lambda *x: np.sum(x, axis=0), *[p.depth for p in each])  # None stays None
        return Evaluation(
            float(nats.sum() / max(1.0, targets.sum())), by_domain, int(targets.sum()), dropped, violation, depth
        )

    return evaluate
