"""The schedule of a pipeline, against one written down by hand, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.mesh import axis_index
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.models.pipeline import Microbatches, Stage, pipelined, pipelined_segment
from sparse_lm.models.reports import DepthStats, Reports
from sparse_lm.moe.config import MoEConfig
from sparse_lm.sharding import DEFAULT

STAGES, NUMBER = 4, 8
# Which microbatch (from 1) each stage works on in each turn; 0 is the bubble.
SCHEDULE = [
    [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0],
    [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0],
    [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
]


class Tracked(Stage):
    """A stage whose layers append its number to what a microbatch has been through, and report the microbatch."""

    def _group(self, carry, one, live):
        report = DepthStats(**{field.name: one.tokens[0, 0][None] for field in dataclasses.fields(DepthStats)})
        return (carry[0] * 10 + axis_index("stage") + 1, None), Reports(depth=report)


def test_every_microbatch_passes_all_stages_in_order_and_comes_back_to_where_it_began(mesh_of):
    names = jnp.arange(1, NUMBER + 1)[:, None, None]
    inputs = Microbatches(names, names, names, names, None)

    def body(waiting, inputs):
        (ended, _), reports = Tracked(None, inputs, None, 0, None)._through((waiting, None))  # type: ignore[arg-type]
        assert reports.depth is not None
        return ended, reports.depth.chosen.T

    with jax.set_mesh(mesh_of(stage=STAGES)):
        ended, worked_on = jax.jit(lambda x: DEFAULT.per_stage(body, *x))((names, inputs))
    np.testing.assert_array_equal(ended.ravel(), [name * 10**4 + 1234 for name in range(1, NUMBER + 1)])
    np.testing.assert_array_equal(worked_on, SCHEDULE)
    bubble = np.mean(np.asarray(SCHEDULE) == 0)
    assert bubble == (STAGES - 1) / (NUMBER + STAGES - 1)


def test_the_segment_with_most_layers_is_cut():
    moe = MoEConfig(num_experts=2, top_k=1, every=1, first_dense=3)
    assert pipelined_segment(ModelConfig(num_layers=4), 4) == 0
    assert pipelined_segment(ModelConfig(num_layers=11, moe=moe), 4) == 1
    assert pipelined_segment(ModelConfig(num_layers=8, moe=MoEConfig(num_experts=2, top_k=1, every=2)), 4) == 0


@pytest.mark.parametrize(
    ("layers", "first_dense", "stages", "words"),
    [(6, 0, 4, "6 units of 1 equal layers each, 0 layers aside"), (12, 3, 4, "9 units .* choose 11 layers")],
)
def test_layers_that_stages_do_not_divide_are_refused(layers, first_dense, stages, words):
    moe = MoEConfig(num_experts=2, top_k=1, every=1, first_dense=first_dense)
    with pytest.raises(ConfigError, match=rf"config.model.num_layers={layers}: .*{words}"):
        pipelined_segment(ModelConfig(num_layers=layers, moe=moe), stages)


def test_on_a_mesh_with_stages_a_model_runs_microbatches_only(mesh_of):
    config = ModelConfig(vocab_size=4, num_layers=2, d_model=8)
    tokens = jnp.zeros((2, 4), jnp.int32)
    with jax.set_mesh(mesh_of(stage=2)):
        model = jax.eval_shape(lambda key: Decoder(key, config, DEFAULT), jax.random.key(0))
        with pytest.raises(ConfigError, match=r"config.mesh.stage=2: .* use mesh.stage=1"):
            jax.eval_shape(lambda model: model(tokens, tokens, tokens), model)
        rows = jnp.zeros((3, 2, 4), jnp.int32)
        odd = Microbatches(rows, rows, rows, rows, None)
        with pytest.raises(ConfigError, match=r"config.train.accumulate=3: must be a multiple of mesh.stage=2"):
            jax.eval_shape(lambda model: pipelined(model, odd, lambda model, x, labels: x), model)
