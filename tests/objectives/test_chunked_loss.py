"""Cross-entropy by chunks against that of whole logits: values, gradients, meshes, and what the program holds."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.data.loader import TrainLoader, build_dataset
from sparse_lm.evals.perplexity import make_evaluate
from sparse_lm.experiment import resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.models.decoder import build_decoder
from sparse_lm.objectives.causal import token_losses
from sparse_lm.objectives.chunked_loss import chunked_losses
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.accumulate import loss_and_gradients

BATCH, LENGTH, WIDTH, VOCAB = 8, 14, 16, 40
X_BLD = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
TABLE_VD = jax.random.normal(jax.random.key(1), (VOCAB, WIDTH))
LABEL_BL = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, VOCAB)
WEIGHT_BL = jax.random.uniform(jax.random.key(3), (BATCH, LENGTH)) * (jnp.arange(LENGTH) < LENGTH - 2)


def whole(x_BLD, table_VD, label_BL, weight_BL):
    logits_BLV = DEFAULT.einsum("BLD,VD->BLV", x_BLD, DEFAULT.gather(table_VD, "VD"), dtype=jnp.float32)
    nats_BL = token_losses(logits_BLV, label_BL)
    return jnp.sum(nats_BL * weight_BL) / BATCH, nats_BL


def by_chunks(chunk):
    def loss(x_BLD, table_VD, label_BL, weight_BL):
        nats_BL = chunked_losses(x_BLD, DEFAULT.gather(table_VD, "VD"), label_BL, chunk, DEFAULT)
        return jnp.sum(nats_BL * weight_BL) / BATCH, nats_BL

    return loss


def compiled(loss, *inputs):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*inputs).compile()


def assert_close(got, expected, tolerance=1e-6):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(scope="module")
def expected():
    inputs = (X_BLD, TABLE_VD, LABEL_BL, WEIGHT_BL)
    return jax.device_get(compiled(whole, *inputs)(*inputs))


@pytest.mark.parametrize("chunk", [1, 7, 26, BATCH * LENGTH, 1000], ids="{} tokens".format)
def test_losses_and_gradients_are_those_of_whole_logits(chunk, expected):
    """Of all sizes, those that leave a part of a chunk among them; the weights are any, and 0 for the last places."""
    inputs = (X_BLD, TABLE_VD, LABEL_BL, WEIGHT_BL)
    got = compiled(by_chunks(chunk), *inputs)(*inputs)
    assert_close(got, expected)
    np.testing.assert_array_equal(got[1][0][:, LENGTH - 2 :], 0)


def test_against_numpy_in_float64_by_hand():
    table, x = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.array([[[1.0, -1.0], [2.0, 0.5]]])
    labels = np.array([[2, 1]])
    logits = x @ table.T
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log([[probability[0, 0, 2], probability[0, 1, 1]]])
    dlogits = probability - np.eye(3)[labels]
    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32))
    got = chunked_losses(*arrays, jnp.asarray(labels), 1, DEFAULT)
    np.testing.assert_allclose(got, nats, rtol=1e-6)
    gradients = jax.grad(lambda x, t: chunked_losses(x, t, jnp.asarray(labels), 1, DEFAULT).sum(), (0, 1))(*arrays)
    np.testing.assert_allclose(gradients[0], dlogits @ table, rtol=1e-5)
    np.testing.assert_allclose(gradients[1], np.einsum("blv,bld->vd", dlogits, x), rtol=1e-5)


def test_large_logits_stay_finite():
    nats, gradients = jax.value_and_grad(lambda x: chunked_losses(x, TABLE_VD, LABEL_BL, 9, DEFAULT).sum())(1e4 * X_BLD)
    assert np.isfinite(nats)
    assert np.isfinite(gradients).all()
    reference = token_losses(1e4 * jnp.einsum("BLD,VD->BLV", X_BLD, TABLE_VD), LABEL_BL).sum()
    assert float(nats) == pytest.approx(float(reference), rel=1e-6)


def test_in_bfloat16_sums_over_chunks_are_float32():
    """Many chunks lose nothing against one: both are as far from float32 as the rounding of their inputs."""
    x_BLD, table_VD = X_BLD.astype(jnp.bfloat16), TABLE_VD.astype(jnp.bfloat16)

    def gradient(loss, x_BLD, table_VD):
        gradients = jax.grad(lambda x, table: loss(x, table, LABEL_BL, WEIGHT_BL)[0], argnums=(0, 1))(x_BLD, table_VD)
        return [np.asarray(value, np.float64) for value in gradients], gradients

    exact, _ = gradient(whole, x_BLD.astype(jnp.float32), table_VD.astype(jnp.float32))
    one, _ = gradient(whole, x_BLD, table_VD)
    many, raw = gradient(by_chunks(1), x_BLD, table_VD)
    assert {value.dtype for value in raw} == {jnp.dtype(jnp.bfloat16)}
    for e, o, m in zip(exact, one, many, strict=True):
        assert np.abs(m - e).max() <= 1.5 * np.abs(o - e).max()


def bodies_of_scans(jaxpr):
    """The bodies of all scans in a jaxpr, those inside other primitives as well."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["jaxpr"]
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from bodies_of_scans(inner)


MESHES = [
    {"data": 2, "fsdp": 2, "model": 2},
    {"expert": 2, "context": 2, "model": 2},
    pytest.param({"expert": 2, "model": 4}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "expert": 2}, marks=pytest.mark.slow),
    pytest.param({"model": 8}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_changes_nothing_and_chunks_cost_no_collectives(mesh_of, sizes, expected):
    with jax.set_mesh(mesh_of(**sizes)):
        arrays = (X_BLD, "BLD"), (LABEL_BL, "BL"), (WEIGHT_BL, "BL")
        x_BLD, label_BL, weight_BL = (DEFAULT.constrain(value, letters) for value, letters in arrays)
        table_VD = DEFAULT.shard_parameters({"table_VD": TABLE_VD})["table_VD"]
        inputs = (x_BLD, table_VD, label_BL, weight_BL)
        result = compiled(by_chunks(3), *inputs)(*inputs)
        assert result[1][1].sharding == table_VD.sharding
        assert_close(result, expected, 1e-5)
        jaxpr = jax.make_jaxpr(jax.grad(by_chunks(3), argnums=(0, 1), has_aux=True))(*inputs).jaxpr
    scans = list(bodies_of_scans(jaxpr))
    assert len(scans) == 2  # forward and backward
    assert "psum" in str(jaxpr)
    assert not any(re.search(r"\b(psum|pmax|all_gather|reduce_scatter)", str(body)) for body in scans)


def largest_with_vocabulary(text: str, vocab: int) -> int:
    """The most numbers that an array of the program has along axes other than the vocabulary; 0 without such arrays."""
    shapes = [[int(size) for size in match.split(",")] for match in re.findall(r"\w+\[(\d+(?:,\d+)*)\]", text)]
    return max((math.prod(shape) // vocab for shape in shapes if vocab in shape), default=0)


def test_no_array_has_all_tokens_and_the_vocabulary():
    vocab, tokens, chunk = 1000, 4 * 64, 16
    shapes = (
        jax.ShapeDtypeStruct((4, 64, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((vocab, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((4, 64), jnp.int32),
        jax.ShapeDtypeStruct((4, 64), jnp.float32),
    )
    all_at_once, chunks = compiled(whole, *shapes), compiled(by_chunks(chunk), *shapes)
    assert largest_with_vocabulary(all_at_once.as_text(), vocab) >= tokens
    # A chunk of logits, or the table itself.
    assert 0 < largest_with_vocabulary(chunks.as_text(), vocab) <= max(chunk, WIDTH)
    before, after = (program.memory_analysis().temp_size_in_bytes for program in (all_at_once, chunks))
    assert before >= tokens * vocab * 4
    assert after < before / 4


def whole_model(config, chunk, accumulate, sizes=None):
    """Loss, its parts and the gradients of the first batch, and an evaluation of it."""
    dataset = build_dataset(config.data, config.seed)
    model = resolved(config, dataset.vocab_size).model.replace(loss_chunk=chunk)
    batch = TrainLoader(dataset, 8, 0).batch_at(0)
    with jax.set_mesh(make_mesh(sizes or {}, jax.devices()[: math.prod((sizes or {}).values())])):
        batch = jax.tree.map(lambda x: DEFAULT.constrain(jnp.asarray(x), "B."), batch)
        model = build_decoder(jax.random.key(0), model, DEFAULT)
        function = jax.jit(loss_and_gradients, static_argnums=(3, 4))
        total, parts, gradients = function(model, batch, jax.random.key(1), accumulate, len(dataset.domains))
        evaluated = make_evaluate(dataset.domains)(model, [batch]).loss
    return jax.device_get((total, parts.loss, parts.domain_loss, jax.tree.leaves(gradients))), evaluated


def test_a_model_trains_and_is_evaluated_the_same():
    """With one table on both sides, and in microbatches."""
    config = tiny.experiment(model__dropout=0.0, model__num_layers=1, model__moe=None)
    (losses, evaluated), (same_losses, same_evaluated) = (whole_model(config, chunk, 2) for chunk in (None, 24))
    assert_close(same_losses, losses, 2e-6)
    assert same_evaluated == pytest.approx(evaluated, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "model": 2}, {"expert": 4, "model": 2}, {"fsdp": 8}], ids=str)
def test_a_sparse_model_on_a_mesh_has_the_same_loss_and_gradients(tied, sizes):
    config = tiny.experiment(model__dropout=0.0, model__tie_embeddings=tied)
    losses, evaluated = whole_model(config, None, 1)
    same_losses, same_evaluated = whole_model(config, 5, 1, sizes)
    assert_close(same_losses, losses, 1e-5)
    assert same_evaluated == pytest.approx(evaluated, rel=1e-5)
