"""Cutting a batch into microbatches changes neither which rows are seen nor the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.batch import Batch
from sparse_lm.data.loader import TrainLoader, build_dataset
from sparse_lm.experiment import resolved
from sparse_lm.models.decoder import build_decoder
from sparse_lm.moe.config import BalanceConfig
from sparse_lm.objectives.microbatches import microbatches
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.accumulate import loss_and_gradients

CONFIG = tiny.experiment(model__dropout=0.0)
DATASET = build_dataset(CONFIG.data, CONFIG.seed)
MODEL = resolved(CONFIG, DATASET.vocab_size).model
DOMAINS = len(DATASET.domains)


def uneven() -> Batch:
    """Rows with very different numbers of targets, so that a mean of means would be another number."""
    host = TrainLoader(DATASET, 8, 0).batch_at(0)
    keep = np.arange(8)[:, None] * 2 + 1 > np.arange(17)[None, :]
    cut = Batch(host.tokens_BL, host.segments_BL * keep, host.positions_BL, host.targets_BL, host.domains_BL)
    return jax.tree.map(jnp.asarray, cut)


def outcome(number: int, **balance):
    assert MODEL.moe is not None
    moe = MODEL.moe.replace(balance=BalanceConfig(load=0.1, z=0.01, **balance))
    model = build_decoder(jax.random.key(0), MODEL.replace(moe=moe), DEFAULT)
    function = jax.jit(loss_and_gradients, static_argnums=(3, 4))
    return jax.device_get(function(model, uneven(), jax.random.key(1), number, DOMAINS))


@pytest.mark.parametrize("scope", ["sequence", "group", "global"])
@pytest.mark.parametrize("number", [2, 8])
def test_the_loss_and_gradients_are_those_of_the_whole_batch(number, scope):
    total, parts, gradients = outcome(1, scope=scope)
    cut_total, cut_parts, cut_gradients = outcome(number, scope=scope)
    assert cut_total == pytest.approx(total, rel=1e-5)
    for name in ("loss", "load_balance_N", "z_N", "domain_loss", "domain_targets"):
        np.testing.assert_allclose(getattr(cut_parts, name), getattr(parts, name), rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(cut_parts.stats.router.load_UE.sum(axis=1), parts.stats.router.load_UE.sum(axis=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), cut_gradients, gradients)


def test_a_mean_of_means_would_be_another_number():
    batch = uneven()
    parts = outcome(1)[1]
    targets = [int((microbatches(batch, 2, DEFAULT).segments_BL[m] > 0).sum()) for m in range(2)]
    assert targets[0] != targets[1]
    assert parts.loss == pytest.approx(parts.domain_loss.sum() / parts.domain_targets.sum(), rel=1e-5)
