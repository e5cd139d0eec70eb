"""A sparse layer equals the float64 oracle: output, loss, gradients and counts; for every router, dispatcher, mesh."""

from __future__ import annotations

import dataclasses
import itertools

import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.routers import ROUTERS
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.slots import PRIORITIES

TOLERANCE = 1e-5  # of the largest value of each quantity
TOLERANCE_BF16 = 3e-2
ORDER = {name: i for i, name in enumerate(cases.ROUTER_CASES)}


def _rows(quick, *axes):
    """Every combination; those that are not quick are marked slow: `make test-all` runs the whole product."""
    rows = [row for row in itertools.product(*map(list, axes)) if row[1] in cases.able(row[0])]
    return [pytest.param(*row, marks=() if quick(*row) else pytest.mark.slow) for row in rows]


def _quick_pair(name, dispatcher):
    """Every case once, its dispatcher taken in turn, and two cases with all of them."""
    names = cases.able(name)
    return name in cases.MESH_CASES or names[ORDER[name] % len(names)] == dispatcher


def _quick_mesh(name, dispatcher, sizes):
    """The dispatchers that people train with on every mesh, and all of them on one."""
    if name == "dropless":
        return dispatcher not in cases.LIMITED
    return (
        dispatcher == "all_to_all" or sizes == "data2-expert4" or (dispatcher == "gather" and name == "switch_shared")
    )


def _quick_kind(name, dispatcher, sizes):
    return sizes == "data2-expert4" and dispatcher == cases.able(name)[-1]


def test_every_router_and_dispatcher_of_the_package_has_a_case():
    missing = set(ROUTERS) - {case.moe.router.kind for case in cases.ROUTER_CASES.values()}
    assert not missing, f"add to ROUTER_CASES in tests/contracts/cases.py: {sorted(missing)}"
    assert set(DISPATCHERS) == set(cases.DISPATCHERS)
    assert {case.moe.priority for case in cases.ROUTER_CASES.values()} == set(PRIORITIES)
    assert {case.moe.balance.scope for case in cases.ROUTER_CASES.values()} == {"sequence", "group", "global"}
    assert {case.activation for case in cases.ROUTER_CASES.values()} == {
        "relu",
        "gelu",
        "geglu",
        "swiglu",
        "clamped_swiglu",
    }


@pytest.mark.parametrize("option", ["gate", "renormalise", "second_expert"])
def test_every_word_of_a_top_k_option_has_a_case(option):
    words = {field.name: field.type for field in dataclasses.fields(TopK)}[option]
    routers = [case.moe.router for case in cases.ROUTER_CASES.values()]
    used = {getattr(router, option) for router in routers if isinstance(router, TopK)}
    assert all(f'"{word}"' in str(words) or f"'{word}'" in str(words) for word in used)
    assert str(words).count(",") + 1 == len(used), f"{words}: only {sorted(used)} have a case"


@pytest.mark.parametrize(("name", "dispatcher"), _rows(_quick_pair, cases.ROUTER_CASES, cases.DISPATCHERS))
def test_layer_equals_the_oracle(name, dispatcher, record_property):
    got = harness.run(cases.dispatched(cases.ROUTER_CASES[name], dispatcher))
    _check(got, name, record_property)


@pytest.mark.parametrize(
    ("name", "dispatcher", "sizes"), _rows(_quick_mesh, cases.MESH_CASES, cases.DISPATCHERS, cases.MESHES)
)
def test_layer_on_a_mesh_equals_the_oracle(name, dispatcher, sizes, mesh_of, record_property):
    got = harness.run(cases.dispatched(cases.ROUTER_CASES[name], dispatcher), mesh_of(**cases.MESHES[sizes]))
    _check(got, name, record_property)


@pytest.mark.parametrize(
    ("name", "dispatcher", "sizes"),
    _rows(_quick_kind, (*cases.KIND_CASES.values(), *cases.VARIANT_CASES), cases.DISPATCHERS, cases.MESHES),
)
def test_every_kind_of_router_on_a_mesh_equals_the_oracle(name, dispatcher, sizes, mesh_of, record_property):
    mesh = mesh_of(**cases.MESHES[sizes])
    _check(harness.run(cases.dispatched(cases.ROUTER_CASES[name], dispatcher), mesh), name, record_property)


def _check(got, name, record_property, dtype=jnp.float32):
    assert got.unaccounted == 0
    tolerance = TOLERANCE if dtype == jnp.float32 else TOLERANCE_BF16
    deviations = harness.compare(got, name, dtype)
    worst = max(deviations, key=lambda key: deviations[key])
    record_property("worst", f"{worst} {deviations[worst]:.2g}")
    assert deviations[worst] < tolerance, {key: value for key, value in deviations.items() if value >= tolerance}


ROUNDED = [(name, dispatcher, "one") for name in cases.MESH_CASES[:2] for dispatcher in cases.LIMITED]
ROUNDED += [("dropless", "dropless", "one"), ("dropless", "ragged_all_to_all", "data2-expert4")]


@pytest.mark.parametrize(("name", "dispatcher", "sizes"), ROUNDED)
def test_bfloat16_is_close_and_keeps_the_statistics_in_float32(name, dispatcher, sizes, mesh_of, record_property):
    case = cases.dispatched(cases.ROUTER_CASES[name], dispatcher)
    got = harness.run(case, mesh_of(**cases.MESHES[sizes]) if sizes != "one" else None, dtype=jnp.bfloat16)
    assert got.y_BLD.dtype == jnp.bfloat16
    assert got.d_x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(got.d_weights)} == {np.dtype("float32")}
    for field in ("importance_UE", "z_U", "entropy_U"):
        assert getattr(got.stats.router, field).dtype == np.float32
    for field in ("tokens_U", "padding_U", "declined_U", "load_UE"):
        assert getattr(got.stats.router, field).dtype == np.int32
    # The oracle sees the rounded input, so that both route alike; the rest is the rounding of the experts.
    _check(got, name, record_property, jnp.bfloat16)


def noisy(dispatcher):
    """Everything random at once: jitter, dropout of inputs and experts, drawn experts, a policy for the second one."""
    case = cases.dispatched(cases.ROUTER_CASES["top2_token"], dispatcher)
    router = case.moe.router.replace(jitter=0.3, input_dropout=0.2, sample=True, second_expert="gshard")
    return dataclasses.replace(case, moe=case.moe.replace(router=router, expert_dropout=0.3, num_shared=1))


@pytest.fixture(scope="module")
def noisy_reference():
    return harness.run(noisy("dense"))


@pytest.mark.parametrize(
    ("dispatcher", "sizes"),
    [(name, "one") for name in cases.LIMITED]
    + [(name, sizes) for name in ("gather", "all_to_all") for sizes in cases.MESHES if sizes != "one"]
    + [(name, "fsdp2-expert2-model2") for name in ("dense", "einsum")],
)
def test_noise_is_the_same_on_every_mesh_and_dispatcher(dispatcher, sizes, mesh_of, noisy_reference):
    got = harness.run(noisy(dispatcher), mesh_of(**cases.MESHES[sizes]))
    assert got.unaccounted == 0
    for one, other in zip(jax.tree.leaves(got.stats), jax.tree.leaves(noisy_reference.stats), strict=True):
        assert harness.deviation(one, other) < TOLERANCE
    assert harness.deviation(got.y_BLD, noisy_reference.y_BLD) < TOLERANCE
    assert harness.deviation(got.d_x, noisy_reference.d_x) < TOLERANCE
    for key, value in noisy_reference.d_weights.items():
        assert harness.deviation(got.d_weights[key], value) < TOLERANCE, key


@pytest.mark.parametrize(
    ("dispatcher", "sizes"),
    [("dropless", "one"), ("dropless", "fsdp2-expert2-model2"), ("ragged_all_to_all", "fsdp2-expert2-model2")],
)
def test_noise_without_a_capacity(dispatcher, sizes, mesh_of):
    case = noisy(dispatcher)
    got, expected = harness.run(case, mesh_of(**cases.MESHES[sizes])), harness.run(cases.dispatched(case, "dense"))
    assert int(got.stats.dispatch.dropped) == int(expected.stats.dispatch.dropped) == 0
    assert harness.deviation(got.y_BLD, expected.y_BLD) < TOLERANCE
    for key, value in expected.d_weights.items():
        assert harness.deviation(got.d_weights[key], value) < TOLERANCE, key


def test_the_noise_is_there(noisy_reference):
    quiet = harness.run(cases.dispatched(cases.ROUTER_CASES["top2_token"], "dense"))
    assert noisy_reference.stats.router.declined_U.sum() > 0
    assert harness.deviation(quiet.stats.router.importance_UE, noisy_reference.stats.router.importance_UE) > 1e-3
