"""A model trains the same on every mesh, however the batch is cut and however its layers are compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import cases
import decoders
import jax
import numpy as np
import optax
import pytest
from decoders import causal_moe, decoder_config
from harness import deviation

from sparse_lm.batch import Batch
from sparse_lm.mesh import MESH_AXES
from sparse_lm.moe.stats import unaccounted
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.rules import STRATEGIES
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

TOLERANCE = 1e-5


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> float:
    """Every quantity equal up to the tolerance, counts exactly; returns the largest deviation."""
    assert got.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        if np.issubdtype(value.dtype, np.floating):
            worst = max(worst, found := deviation(got[name], value))
            assert found < tolerance, f"{name}: {found}"
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    return worst


def assert_accounted(flat: dict[str, np.ndarray], top_k: int):
    """Nothing is lost in any layer, read from flattened statistics."""
    get = {name.split("/stats/")[1]: value for name, value in flat.items() if "/stats/" in name}
    total = get["dispatch/kept"] + get["dispatch/dropped"] + get["router/declined_U"].sum(-1)
    padding, real = get["router/padding_U"].sum(-1), get["router/tokens_U"].sum(-1)
    np.testing.assert_array_equal(total + top_k * padding, top_k * (real + padding))
    np.testing.assert_array_equal(real + padding, decoders.ROWS * decoders.LENGTH)
    assert np.all(get["dispatch/dropped"] > 0)


@functools.cache
def reference_training(dispatcher: str):
    return decoders.train(decoder_config(causal_moe(dispatcher=dispatcher)), None)[0]


@pytest.mark.parametrize(
    ("dispatcher", "sizes"),
    [("gather", sizes) for sizes in cases.MESHES]
    + [("all_to_all", sizes) for sizes in cases.MESHES if "expert" in sizes],
)
def test_training_is_the_same_on_every_mesh(dispatcher, sizes, mesh_of, record_property):
    config = decoder_config(causal_moe(dispatcher=dispatcher))
    first, again = decoders.train(config, mesh_of(**cases.MESHES[sizes]), times=2)
    reference = reference_training("gather")
    worst = assert_same(first.metrics, reference.metrics)
    worst = max(worst, assert_same(first.state, reference.state))
    record_property("worst", f"{worst:.2g}")
    assert_accounted(first.metrics, 2)
    assert again.programs == 1
    for name, value in first.state.items():
        assert value.tobytes() == again.state[name].tobytes(), f"{name} differs between two runs of one program"


@pytest.mark.parametrize(
    "name",
    ["zero1_ep", "fsdp_over_ep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ep", "hybrid_ep"))],
)
def test_training_is_the_same_with_every_strategy(name, mesh_of, record_property):
    config, mesh = decoder_config(causal_moe(dispatcher="all_to_all")), mesh_of(data=2, fsdp=2, expert=2)
    (got,) = decoders.train(config, mesh, rules=STRATEGIES[name])
    reference = reference_training("gather")
    worst = max(assert_same(got.metrics, reference.metrics), assert_same(got.state, reference.state))
    record_property("worst", f"{worst:.2g}")


def factorisations(number: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many, in order."""
    if axes == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in factorisations(number // first, axes - 1))


@functools.cache
def divisible_training():
    return decoders.train(DIVISIBLE, None)[0]


# Every size that a mesh axis cuts is a multiple of 8.
DIVISIBLE = decoder_config(causal_moe(dispatcher="all_to_all"), num_heads=8, num_kv_heads=8, d_model=16)


WITHOUT_STAGES = [axis for axis in MESH_AXES if axis != "stage"]


@pytest.mark.slow  # some 10 s for each of 56 meshes
@pytest.mark.parametrize("shape", list(factorisations(8, len(WITHOUT_STAGES))), ids=lambda s: "x".join(map(str, s)))
def test_training_is_the_same_on_every_factorisation_of_eight_devices(shape, mesh_of, record_property):
    (got,) = decoders.train(DIVISIBLE, mesh_of(**dict(zip(WITHOUT_STAGES, shape, strict=True))))
    worst = assert_same(got.metrics, divisible_training().metrics)
    record_property("worst", f"{max(worst, assert_same(got.state, divisible_training().state)):.2g}")


def test_the_mesh_comparison_sees_every_gradient():
    trace = {name: value for name, value in reference_training("gather").state.items() if "trace" in name}
    assert {name.removesuffix("/value").rsplit("/", 1)[-1] for name in trace} >= {"weight_DE", "up_EDF", "query_DHI"}
    assert all(np.abs(value).max() > 0 for value in trace.values())


@functools.cache
def whole_batch(scope: str):
    return decoders.gradients(decoder_config(causal_moe(scope=scope)))


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("scope", ["sequence", "group", "global"])
def test_microbatches_add_up_to_the_batch(scope, number):
    got = decoders.gradients(decoder_config(causal_moe(scope=scope)), number)
    assert_same(got, whole_batch(scope))
    assert_accounted(got, 2)


def test_microbatches_keep_groups_of_several_sequences_together():
    config = decoder_config(causal_moe(group_size=2 * decoders.LENGTH))
    assert_same(decoders.gradients(config, 4), decoders.gradients(config, 1))


def test_scopes_differ():
    totals = [float(whole_batch(scope)["total"]) for scope in ("sequence", "global")]
    assert abs(totals[0] - totals[1]) > 1e-5


def test_accumulation_on_a_mesh(mesh_of):
    config = decoder_config(causal_moe(dispatcher="all_to_all"))
    (got,) = decoders.train(config, mesh_of(fsdp=2, expert=2, model=2), accumulate=2)
    assert_same(got.metrics, reference_training("gather").metrics)
    assert_same(got.state, reference_training("gather").state)


@pytest.mark.slow
def test_fewer_experts_than_devices_train_the_same_in_chunks(mesh_of):
    config = decoder_config(causal_moe(dispatcher="all_to_all", exchange_chunks=2).replace(num_experts=4))
    (got,), (expected,) = (decoders.train(config, mesh) for mesh in (mesh_of(expert=8), None))
    assert_same(got.metrics, expected.metrics)
    assert_same(got.state, expected.state)


@functools.cache
def scanned(remat: str = "none", scan_layers: bool = True):
    moe = causal_moe(first_dense=1, every=1)
    return decoders.gradients(decoder_config(moe, num_layers=3, remat=remat, scan_layers=scan_layers))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_scan_and_remat_change_nothing(remat, scan_layers):
    got = scanned(remat, scan_layers)
    assert_same(got, scanned())
    assert_accounted(got, 2)
    assert got["parts/stats/dispatch/kept"].shape == (2,)


@functools.cache
def dropless(group_size: int | None):
    moe = causal_moe(group_size=group_size, capacity_factor=None, scope="sequence")
    return decoders.gradients(decoder_config(moe))


@pytest.mark.parametrize("group_size", [2, decoders.LENGTH, 4 * decoders.LENGTH])
def test_group_size_matters_only_where_slots_run_out(group_size):
    got, expected = dropless(group_size), dropless(None)
    positions = {name for name in got if "by_position" in name}
    assert len(positions) == 2
    got, expected = ({k: v for k, v in x.items() if k not in positions} for x in (got, expected))
    assert_same(got, expected)


def test_rows_of_padding_change_nothing():
    batch, config = decoders.host_batch(), decoder_config(causal_moe(scope="sequence"))
    more: dict[str, Any] = {
        name: np.concatenate([x, np.zeros((4, x.shape[1]), x.dtype)]) for name, x in vars(batch).items()
    }
    got = decoders.gradients(config, batch=Batch(**more))
    expected = {name: value for name, value in whole_batch("sequence").items() if "padding_U" not in name}
    assert_same({name: value for name, value in got.items() if "padding_U" not in name}, expected)


def test_a_step_compiles_once_and_survives_a_gradient_that_is_not_finite():
    """Token 15 has an infinite embedding, so that a batch with it, and only such a batch, gives no finite loss."""
    config = decoder_config(causal_moe(), tie_embeddings=False)
    optimizer = build_optimizer(OptimConfig(warmup_steps=2), 10)
    state = jax.jit(create_state, static_argnums=(1, 2, 3))(jax.random.key(0), config, optimizer, DEFAULT)
    table = state.model.embedding.table_VD
    table[...] = table[...].at[15].set(np.inf)
    good = decoders.placed(decoders.host_batch())
    bad = decoders.placed(
        Batch(**{**vars(decoders.host_batch()), "tokens_BL": np.full_like(decoders.host_batch().tokens_BL, 15)})
    )
    step = make_train_step(optimizer, 2, decoders.DOMAINS)
    seen = []
    for batch in (good, bad, bad, good, good):
        before = decoders.flat((state.model, state.optimizer))
        state, metrics = step(state, batch, jax.random.key(0))
        after = decoders.flat((state.model, state.optimizer))
        same = all(before[name].tobytes() == after[name].tobytes() for name in before)
        counts = (int(state.nonfinite), int(state.nonfinite_in_a_row))
        assert (int(metrics.nonfinite), int(metrics.nonfinite_in_a_row)) == counts
        seen.append((bool(metrics.finite), same, *counts))
        assert metrics.parts.stats is not None
        assert np.all(np.asarray(unaccounted(metrics.parts.stats, 2)) == 0)
    good_again = (True, False, 2, 0)
    assert seen == [(True, False, 0, 0), (False, True, 1, 1), (False, True, 2, 2), good_again, good_again]
    assert int(state.step) == 5
    assert step._cache_size() == 1


def test_the_noise_of_a_step_follows_its_number():
    moe = causal_moe(expert_dropout=0.5)
    step = make_train_step(optax.sgd(0.0), 1, decoders.DOMAINS)
    state = jax.jit(create_state, static_argnums=(1, 2, 3))(
        jax.random.key(0), decoder_config(moe), optax.sgd(0.0), DEFAULT
    )
    losses = []
    for _ in range(2):
        state, metrics = step(state, decoders.placed(decoders.host_batch()), jax.random.key(1))
        losses.append(float(metrics.total))
    assert losses[0] != losses[1]
