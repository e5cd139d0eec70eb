"""When the routers of a run became what they are: every kept checkpoint against the one that is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sparse_lm.batch import Batch
from sparse_lm.evals.routing import record, saturation
from sparse_lm.moe.types import TokenChoice
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import CheckpointError
from sparse_lm.train.restore import load_model
from sparse_lm.train.run import CHECKPOINTS_NAME


@dataclasses.dataclass(frozen=True, eq=False)
class Saturation:
    """share_XN: see `evals.routing.saturation`, by checkpoint and layer. chance: what unrelated routers would share."""

    steps: tuple[int, ...]
    share_XN: Float[np.ndarray, "X N"]
    chance: float


def saturation_over(
    workdir: Path, step: int, batches: Sequence[Batch], decisions: Sequence[TokenChoice], chance: float
) -> Saturation:
    """Router saturation of every kept checkpoint against the decisions of the one of `step` on these batches.

    A checkpoint that a running training removes meanwhile is left out.
    """
    with Checkpoints(workdir / CHECKPOINTS_NAME, CheckpointConfig(), read_only=True) as checkpoints:
        steps = checkpoints.steps()
    # The weights of a layer are its tokens that have an expert, which the mean over batches leaves out.
    weights = np.array([_with_expert(decision) for decision in decisions], float)
    found: dict[int, np.ndarray] = {}
    for other in steps:
        if other == step:
            found[other] = np.ones(weights.shape[1])
            continue
        try:
            model = load_model(workdir, other).model
        except CheckpointError as error:
            if error.kind != "absent":
                raise
            continue
        pairs = zip(batches, decisions, strict=True)
        shares = [saturation(record(model, jax.tree.map(jnp.asarray, batch)), later) for batch, later in pairs]
        found[other] = (np.stack(shares) * weights).sum(0) / np.maximum(weights.sum(0), 1)
    return Saturation(tuple(found), np.stack(list(found.values())), chance)


def _with_expert(decision: TokenChoice) -> np.ndarray:
    return (np.asarray(decision.expert_GSK) >= 0).any(-1).sum((1, 2))
