"""The checks of a router pass for those of the package, and each of them bites."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.check import Check, RouterChecks, check_router, dispatchers
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import ROUTERS
from sparse_lm.moe.routers.base import Router, RouterConfig, RouterShape
from sparse_lm.moe.routers.soft import SoftMixture
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice

EXPERTS = 4


@dataclasses.dataclass(frozen=True)
class Fixed(RouterConfig):
    """A router without weights: the first expert for every token, spoilt in the ways that `faults` names."""

    kind = "fixed"
    learned = False
    dispatchers = ("dense", "gather")
    faults: tuple[str, ...] = ()

    def build(self, key: jax.Array, shape: RouterShape, rules) -> Router:
        return FixedRouter(self.faults, shape)


class FixedRouter(Router):
    def __init__(self, faults: tuple[str, ...], shape: RouterShape):
        self.faults, self.shape = faults, shape

    def __call__(self, inputs: RouterInputs, key):
        faults, real_GS1 = self.faults, inputs.mask_GS[..., None]
        expert_GSK = jnp.zeros((*inputs.ids_GS.shape, self.shape.top_k), jnp.int32)
        if "later" in faults:  # whether the last token of the group is even decides for all
            expert_GSK = expert_GSK + inputs.ids_GS[:, -1:, None] % 2
        if "outside" in faults:
            expert_GSK = expert_GSK + self.shape.num_experts
        if "padding" not in faults:
            expert_GSK = jnp.where(real_GS1, expert_GSK, -1)
        gate_GSK = jnp.where(expert_GSK >= 0, jnp.inf if "gates" in faults else 0.5, 0.0)
        share = 2.0 if "probabilities" in faults else 1.0
        probability_GSE = jnp.full((*inputs.ids_GS.shape, self.shape.num_experts), share / self.shape.num_experts)
        return TokenChoice(expert_GSK, gate_GSK), Scores(probability_GSE, jnp.zeros(inputs.ids_GS.shape))


@dataclasses.dataclass(frozen=True)
class Unlearnable(Fixed):
    """The same, which claims to learn."""

    kind = "unlearnable"
    learned = True


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(ROUTERS, Fixed.kind, Fixed)
    monkeypatch.setitem(ROUTERS, Unlearnable.kind, Unlearnable)


def config(router: RouterConfig, top_k: int = 1) -> MoEConfig:
    """Nothing is dropped, so that only the router can look ahead."""
    return MoEConfig(EXPERTS, top_k, capacity_factor=None, capacity_factor_eval=None, router=router)


def fails(found: RouterChecks) -> dict[str, str]:
    return {check.name.partition(",")[0]: check.found for check in found.checks if not check.holds}


def test_a_router_of_the_package_keeps_everything():
    found = check_router(MoEConfig(EXPERTS, 1, capacity_factor=1.0, capacity_factor_eval=2.0))
    assert found.hold and fails(found) == {}
    assert len(found.checks) == 11 and len({check.name for check in found.checks}) == 11
    by_name = {check.name: check.found for check in found.checks}
    # Four rows of 16 tokens, of which one and a half are padding.
    kept, dropped = (int(n.split()[0]) for n in by_name["every assignment accounted for, training"].split(", "))
    assert kept + dropped == 40 and dropped > 0
    assert by_name["dispatchers agree, training"].startswith("dense, einsum, gather, ")
    assert by_name["no look at later tokens, training"] == "a later token changes 0"
    assert "not claimed" not in str(found) and str(found).startswith("router top_k\nok ")


@pytest.mark.parametrize(("faults", "top_k", "expected"), [
    (("padding", "probabilities", "later"), 1, {
        "every assignment accounted for": "+24 with dense (does padding get experts?)",
        "probabilities sum to 1": "off by 1 at most",
        "no look at later tokens": "a later token changes",
    }),
    (("outside", "gates"), 2, {
        "experts and gates": "80 outside -1 to 3; 40 of an expert that the token had already; 80 gates not finite",
    }),
])  # fmt: skip
def test_each_fault_is_found(faults, top_k, expected):
    found = fails(check_router(config(Fixed(faults=faults), top_k)))
    assert found.keys() >= expected.keys()
    assert all(words in found[name] for name, words in expected.items()), found


def test_weights_that_nothing_reaches_are_found():
    found = check_router(config(Unlearnable()))
    assert list(fails(found)) == ["the task teaches the router"]
    assert "set learned = False" in fails(found)["the task teaches the router"]


def test_only_dispatchers_that_fit_are_tried():
    assert "dropless" not in dispatchers(MoEConfig(router=TopK()))
    assert "dropless" not in dispatchers(MoEConfig(router=TopK(), capacity_factor=None))
    assert "dropless" in dispatchers(config(TopK()))
    soft = MoEConfig(
        router=SoftMixture(), dispatcher="einsum", group_size=8, capacity_factor=1.0, capacity_factor_eval=1.0,
        allow_non_causal=True,
    )  # fmt: skip
    assert dispatchers(soft) == ("einsum",)


def test_the_text_marks_what_fails():
    checks = RouterChecks("mine", (Check("one", True, "fine"), Check("another", False, "lost 3")))
    assert str(checks) == "router mine\nok     one      fine\nFAILS  another  lost 3"
    assert not checks.hold and np.all([RouterChecks("mine", checks.checks[:1]).hold])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_router_of_the_package_holds(kind):
    options = dict.fromkeys(("capacity_factor", "capacity_factor_eval"), 1.0)
    router = ROUTERS[kind]() if kind != "sigmoid" else ROUTERS[kind](renormalise="none")
    top_k = 1 if kind == "base" else 2
    dispatcher = router.dispatchers[0] if router.dispatchers else "gather"
    made = MoEConfig(8, top_k, group_size=8, router=router, dispatcher=dispatcher, **options)
    assert check_router(made).hold, str(check_router(made))
