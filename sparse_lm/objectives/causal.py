"""Next-token prediction with the router losses beside it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from sparse_lm.batch import Batch
from sparse_lm.models.decoder import Decoder
from sparse_lm.models.pipeline import Microbatches, pipelined
from sparse_lm.models.reports import DepthStats, Reports
from sparse_lm.moe.balance import router_losses, weighted
from sparse_lm.moe.config import BalanceConfig, HeterogeneousBalance
from sparse_lm.moe.types import LayerStats, RouterStats, pytree_dataclass
from sparse_lm.objectives.chunked_loss import chunked_losses

Apply = Callable[..., tuple[jax.Array, Reports]]


@pytree_dataclass
class Totals:
    """What sums are divided by, and loads of the whole batch: known before the first microbatch's gradient.

    targets: predicted tokens. tokens: real tokens. load_NE: see `moe.balance.load_balance`, or None. routed_N: tokens
    that each sparse layer routes, where tokens may skip layers; None is what the statistics say. attention_NE: as
    load_NE, of attention experts.
    """

    targets: Scalar
    tokens: Scalar
    load_NE: Int[Array, "N E"] | None = None
    routed_N: Float[Array, "N"] | None = None
    attention_NE: Int[Array, "N E"] | None = None


@pytree_dataclass
class RoutingParts:
    """What attention experts add: the losses of every layer, unweighted, and the statistics, summed over units."""

    load_balance_N: Float[Array, "N"]
    z_N: Float[Array, "N"]
    stats: LayerStats


@pytree_dataclass
class LossParts:
    """Sums that add up over microbatches, except the losses, which are this microbatch's shares of the batch's.

    loss: cross-entropy in nats per target. load_balance_N, z_N: per sparse layer, unweighted (size 0 when dense).
    domain_loss, domain_targets: summed nats and number of targets per domain of the data.
    stats: routing statistics, summed over units; None in a dense model. depth: None where no token skips a layer.
    attention: None where attention has no experts.
    """

    loss: Scalar
    load_balance_N: Float[Array, "N"]
    z_N: Float[Array, "N"]
    domain_loss: Float[Array, "domains"]
    domain_targets: Float[Array, "domains"]
    stats: LayerStats | None
    depth: DepthStats | None = None
    attention: RoutingParts | None = None


def count(batch: Batch) -> Totals:
    """The totals of a batch."""
    return Totals(
        jnp.sum(predicted(batch)).astype(jnp.float32), jnp.sum(batch.segments_BL[:, :-1] > 0).astype(jnp.float32)
    )


def predicted(batch: Batch) -> Int[Array, "*M B L"]:
    """1 where the token after counts in the loss: marked as a target, real, and of the same document."""
    segments = batch.segments_BL
    same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    return batch.targets_BL[..., 1:] * same


def token_losses(logits_BLV: Float[Array, "B L V"], labels_BL: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """-log softmax(logits)[label] in nats, also when V is cut over devices: no gather along V."""
    picked = jnp.where(jnp.arange(logits_BLV.shape[-1]) == labels_BL[..., None], logits_BLV, 0.0)
    return jax.nn.logsumexp(logits_BLV, axis=-1) - jnp.sum(picked, axis=-1)


def causal_loss(
    apply: Apply,
    batch: Batch,
    key: jax.Array | None,
    totals: Totals,
    balance: BalanceConfig | None,
    num_domains: int,
    depth_weight: float = 0.0,
    attention_balance: BalanceConfig | None = None,
) -> tuple[Scalar, LossParts]:
    """This microbatch's share of the loss of the batch, and its parts; or that of several, in a pipeline.

    apply: (tokens, segments, positions, key) -> (logits, reports); of a `Decoder` with `loss_chunk`, the loss is made
    without its logits. batch, key: where the mesh has stages, M microbatches [M, B, L] of a `Decoder` and the key of
    each, see `models.pipeline`. balance: None in a dense model. attention_balance: None where attention has no experts.
    The loss is cross-entropy + sum over sparse layers of (each loss of `moe.balance.router_losses` with its
    weight in `balance` + the router's own penalty) + depth_weight * sum over wrapped layers of the predictor's
    cross-entropy per token; attention experts add theirs with the weights of attention_balance.
    """
    nats_BL, reports = _nats(apply, batch, key)
    weight_BL = predicted(batch).astype(jnp.float32)
    nats_BL = nats_BL * weight_BL
    in_domain = batch.domains_BL[..., 1:, None] == jnp.arange(num_domains)
    every_token = tuple(range(nats_BL.ndim))
    loss = jnp.sum(nats_BL) / jnp.maximum(totals.targets, 1)
    balance_N = z_N = jnp.zeros((0,), jnp.float32)
    stats, depth, total = reports.feed_forward, reports.depth, loss
    if depth is not None:
        total = total + depth_weight * jnp.sum(depth.loss) / jnp.maximum(totals.tokens, 1)
    if stats is not None and balance is not None:
        tokens = totals.tokens if depth is None else _routed(stats.router, totals)
        added, routing = _routing_losses(stats, balance, tokens, totals.load_NE)
        total, balance_N, z_N, stats = total + added, routing.load_balance_N, routing.z_N, routing.stats
    attention = None
    if reports.attention is not None and attention_balance is not None:
        added, attention = _routing_losses(reports.attention, attention_balance, totals.tokens, totals.attention_NE)
        total = total + added
    parts = LossParts(
        loss=loss,
        load_balance_N=balance_N,
        z_N=z_N,
        domain_loss=jnp.sum(nats_BL[..., None] * in_domain, axis=every_token),
        domain_targets=jnp.sum(weight_BL[..., None] * in_domain, axis=every_token),
        stats=stats,
        depth=depth,
        attention=attention,
    )
    return total, parts


def _nats(apply: Apply, batch: Batch, key: jax.Array | None) -> tuple[Float[Array, "*M B L"], Reports]:
    """The loss of every token, whether it counts or not, and the reports."""
    tokens, segments, positions = (x[..., :-1] for x in (batch.tokens_BL, batch.segments_BL, batch.positions_BL))
    labels = batch.tokens_BL[..., 1:]
    if labels.ndim == 3:
        assert isinstance(apply, Decoder)
        # Chunks keep no logits anyway; whole ones would be kept of all microbatches of a stage.
        readout = _readout if apply.config.loss_chunk else jax.checkpoint(_readout)
        return pipelined(apply, Microbatches(tokens, segments, positions, labels, key), readout)
    if isinstance(apply, Decoder):
        x_BLD, reports = apply.hidden(tokens, segments, positions, key)
        return _readout(apply, x_BLD, labels), reports
    logits_BLV, reports = apply(tokens, segments, positions, key)
    return token_losses(logits_BLV, labels), reports


def _readout(model: Decoder, x_BLD: Float[Array, "B L D"], labels_BL: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """The loss of every token of what the head reads."""
    if model.config.loss_chunk is None:
        return token_losses(model.head.decode(x_BLD), labels_BL)
    return chunked_losses(x_BLD, model.head.matrix(x_BLD.dtype), labels_BL, model.config.loss_chunk, model.rules)


def _routing_losses(
    stats: LayerStats, balance: BalanceConfig, tokens: jax.Array, whole_NE: jax.Array | None
) -> tuple[Scalar, RoutingParts]:
    """The weighted sum of the router losses over layers, and what it is made of. tokens: of the whole batch, or [N]."""
    router = stats.router
    if balance.scope == "global":
        whole_NE = jnp.sum(router.load_UE, axis=1) if whole_NE is None else whole_NE
    expert_weights = balance.expert_weights if isinstance(balance, HeterogeneousBalance) else None
    losses = router_losses(router, tokens, whole_NE if balance.scope == "global" else None, expert_weights)
    penalty = jnp.sum(jnp.sum(router.penalty_U, axis=1) / jnp.maximum(tokens, 1))
    summed = {name: jnp.sum(value, axis=1, keepdims=True) for name, value in vars(router).items()}
    parts = RoutingParts(losses["load"], losses["z"], LayerStats(type(router)(**summed), stats.dispatch))
    return weighted(losses, balance.weights) + penalty, parts


def _routed(router: RouterStats, totals: Totals) -> jax.Array:
    """Per sparse layer, how many tokens of the whole batch it routes; in evaluation only its statistics know."""
    return jnp.sum(router.tokens_U, axis=1).astype(jnp.float32) if totals.routed_N is None else totals.routed_N
