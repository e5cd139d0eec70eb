"""The model of a run comes back from its directory: which step, on which mesh, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError, to_dict
from sparse_lm.data.config import DataConfig, FactsConfig, GrammarConfig
from sparse_lm.data.loader import build_dataset
from sparse_lm.data.tokenizers import ByteTokenizer
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.optim.build import build_optimizer
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import CheckpointError
from sparse_lm.train.restore import load_model, tokenizer_of
from sparse_lm.train.state import TrainState, create_state

MODEL = ModelConfig(
    vocab_size=264, num_layers=2, d_model=8, num_heads=2, d_ff=16, moe=MoEConfig(num_experts=4, top_k=2)
)
EXPERIMENT = Experiment(model=MODEL, checkpoint=CheckpointConfig(every=1, keep=9, asynchronous=False))
LOSSES = {1: 3.0, 2: 1.5, 3: 2.0}  # step 3 is the newest, step 2 the best


def make_state(seed) -> TrainState:
    optimizer = build_optimizer(EXPERIMENT.optim, EXPERIMENT.train.steps)
    return jax.jit(lambda key: create_state(key, MODEL, optimizer, DEFAULT))(jax.random.key(seed))


def write_run(workdir, losses):
    """A run whose checkpoint of step n holds the model of seed n."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"config": to_dict(EXPERIMENT), "data": {"fingerprint": "0"}}))
    with Checkpoints(workdir / "checkpoints", EXPERIMENT.checkpoint) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), {}, loss=loss)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a", LOSSES)


def assert_model_of(model, seed):
    expected = make_state(seed).model
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model), jax.device_get(expected))


@pytest.mark.parametrize(
    ("arguments", "step"), [({}, 3), ({"best": True}, 2), ({"step": 1}, 1), ({"step": 2}, 2)], ids=str
)
def test_the_step_that_was_asked_for(workdir, arguments, step):
    model, experiment, tokenizer, found = load_model(workdir, **arguments)
    assert found == step
    assert experiment == EXPERIMENT and model.config == MODEL
    assert tokenizer == ByteTokenizer()
    assert_model_of(model, step)


def test_the_model_runs(workdir):
    model = load_model(str(workdir)).model
    tokens = jnp.asarray(ByteTokenizer().encode("def f"))[None]
    logits, reports = model(tokens, jnp.ones_like(tokens), jnp.arange(5)[None])
    assert logits.shape == (1, 5, 264) and reports.feed_forward is not None


def test_on_a_mesh(workdir, mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2, expert=2)):
        model = load_model(workdir).model
        layer = model.stack.units[0].blocks[1].feed_forward
        assert isinstance(layer, MoE)
        up_EDF = layer.experts.up_EDF[...]
        assert up_EDF.shape == (1, 4, 8, 8)
        assert up_EDF.addressable_shards[0].data.shape == (1, 2, 4, 8)
    assert_model_of(model, 3)


def test_nothing_in_the_directory_changes(workdir):
    def listing():
        return {path.relative_to(workdir): path.stat().st_mtime_ns for path in workdir.rglob("*")}

    before = listing()
    load_model(workdir)
    assert listing() == before


def test_a_directory_without_a_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"workdir=.*config\.json.*check the path"):
            load_model(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="workdir="):
        load_model(tmp_path)


def test_a_run_without_checkpoints(tmp_path):
    workdir = write_run(tmp_path / "b", {})
    with pytest.raises(CheckpointError, match="no committed step"):
        load_model(workdir)
    with pytest.raises(CheckpointError, match="validation loss"):
        load_model(workdir, best=True)
    (workdir / "checkpoints").rmdir()
    with pytest.raises(CheckpointError, match="no such directory"):
        load_model(workdir)


def test_best_needs_a_validation_loss(tmp_path):
    workdir = write_run(tmp_path / "c", {4: None})
    assert load_model(workdir).step == 4
    with pytest.raises(CheckpointError, match="no step there has a validation loss"):
        load_model(workdir, best=True)


def test_a_step_that_is_not_there(workdir):
    with pytest.raises(CheckpointError, match=r"step 7.*\[1, 2, 3\]"):
        load_model(workdir, step=7)


def test_step_and_best_contradict_each_other(workdir):
    with pytest.raises(ConfigError, match="step=2: and best"):
        load_model(workdir, step=2, best=True)


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(
            source="grammar",
            length=16,
            grammar=GrammarConfig(num_symbols=7, num_domains=2, document_length=16, num_documents=32),
        ),
        DataConfig(source="facts", length=6, facts=FactsConfig(num_a=3, num_b=4, num_values=5)),
        DataConfig(length=32, max_bytes=50_000),
    ],
    ids=lambda config: config.source,
)
def test_the_tokenizer_is_that_of_the_dataset(config):
    assert tokenizer_of(config) == build_dataset(config).tokenizer
