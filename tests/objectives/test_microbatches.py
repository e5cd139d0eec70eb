"""Cutting a batch into microbatches moves no row to another device, and keeps rows of a routing group together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.batch import Batch
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.objectives.microbatches import microbatches, microbatches_of
from sparse_lm.sharding import DEFAULT, put


def test_microbatch_m_has_the_rows_m_and_every_number_th_after():
    rows = jnp.broadcast_to(jnp.arange(6)[:, None], (6, 3))
    cut = microbatches(Batch(rows, rows, rows, rows, rows), 2, DEFAULT)
    assert cut.tokens_BL.shape == (2, 3, 3)
    assert cut.tokens_BL[:, :, 0].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_no_row_changes_its_device(mesh_of):
    mesh = mesh_of(data=2)
    rows = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None], (8, 3))
    with jax.set_mesh(mesh):
        placed = put(mesh, DEFAULT, rows, "B.")
        cut = jax.jit(lambda b: microbatches(b, 2, DEFAULT))(Batch(placed, placed, placed, placed, placed)).tokens_BL
    before = {shard.device: set(np.unique(shard.data)) for shard in placed.addressable_shards}
    after = {shard.device: set(np.unique(shard.data)) for shard in cut.addressable_shards}
    assert after == before
    assert sorted(map(sorted, after.values())) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(("size", "expected"), [(3, [[0, 2], [1, 3]]), (6, [[0, 1], [2, 3]])])
def test_rows_of_a_routing_group_of_the_model_stay_together(size, expected):
    """Rows of three tokens that are routed; a group of six is two rows."""
    moe = MoEConfig(num_experts=2, top_k=1, group_size=size)
    config = ModelConfig(vocab_size=4, num_layers=2, d_model=8, moe=moe)
    model = jax.eval_shape(lambda key: Decoder(key, config, DEFAULT), jax.random.key(0))
    rows = jnp.broadcast_to(jnp.arange(4)[:, None], (4, 4))
    assert microbatches_of(model, Batch(rows, rows, rows, rows, rows), 2).tokens_BL[:, :, 0].tolist() == expected
