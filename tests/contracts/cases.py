"""What the contracts are tested on: a new router, dispatcher or mesh is one line here, and every test takes it up.

`test_contract_layer` fails when a router or a dispatcher of the package is missing from these tables.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from sparse_lm.config import from_dict
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS as DISPATCHER_CLASSES
from sparse_lm.moe.routers import RouterConfig
from sparse_lm.moe.routers.top_k import TopK


@dataclasses.dataclass(frozen=True)
class Case:
    """A sparse layer. training: with the capacity and the policies of training, noise aside.

    state: (name, value) of what the router holds beside its weights, where that is not what a fresh one has.
    """

    moe: MoEConfig
    activation: str = "swiglu"
    training: bool = True
    state: tuple[tuple[str, Any], ...] = ()


ROUTER_SCALE = 4.0  # logits of a few units, so that experts are unevenly loaded and a capacity of 1 drops


def moe(
    top_k: int, router: dict[str, Any] | RouterConfig | None = None, scope: str = "global", **options: Any
) -> MoEConfig:
    """Eight experts whose capacity, in training and in evaluation, drops some assignments.

    router: options of a top-k router, or the configuration of another kind.
    """
    defaults = {"capacity_factor": 1.0, "capacity_factor_eval": 1.0, "priority": "first_choice"}
    options = {**defaults, "d_expert": 8, "every": 1, **options}
    if not isinstance(router, RouterConfig):
        router = TopK(init_scale=ROUTER_SCALE, **(router or {}))
    balance = from_dict(BalanceConfig, {"scope": scope})
    return MoEConfig(num_experts=8, top_k=top_k, router=router, balance=balance, **options)


ROUTER_CASES: dict[str, Case] = {
    "switch": Case(moe(1), "relu"),
    "switch_small_groups": Case(moe(1, scope="sequence", group_size=4), "gelu"),
    "switch_shared": Case(moe(1, scope="group", num_shared=2), "geglu"),
    "top2": Case(moe(2, scope="group")),
    "top2_token": Case(moe(2, {"renormalise": "before_drop"}, "sequence", priority="token")),
    "top2_after_drop": Case(moe(2, {"renormalise": "after_drop"})),
    "top2_wide_groups": Case(moe(2, {"renormalise": "after_drop"}, "sequence", group_size=16, priority="token")),
    "top2_probability": Case(moe(2, {"renormalise": "after_drop"}, priority="probability", allow_non_causal=True)),
    "top2_probability_before_drop": Case(
        moe(2, {"renormalise": "before_drop"}, "group", priority="probability", allow_non_causal=True)
    ),
    "mixtral": Case(moe(2, {"gate": "softmax_after"}, priority="token")),
    "gshard": Case(moe(2, {"second_expert": "gshard", "renormalise": "before_drop"}), "relu", training=False),
    "mesh_tf": Case(moe(2, {"second_expert": "mesh_tf"}, "group"), "relu", training=False),
    "threshold": Case(moe(2, {"second_expert": "threshold", "renormalise": "before_drop"})),
    "first_only": Case(moe(2, {"second_expert": "none", "renormalise": "before_drop"}, "sequence")),
    "fine_grained": Case(moe(4, num_shared=1, d_expert=4, priority="token")),
    "dropless": Case(moe(2, scope="group", capacity_factor=None)),
}

DISPATCHERS = tuple(DISPATCHER_CLASSES)

MESHES: dict[str, dict[str, int]] = {
    "one": {"data": 1},
    "data8": {"data": 8},
    "expert8": {"expert": 8},
    "data2-expert4": {"data": 2, "expert": 4},
    "data2-expert2-model2": {"data": 2, "expert": 2, "model": 2},
    "fsdp2-expert2-model2": {"fsdp": 2, "expert": 2, "model": 2},
}

MESH_CASES = ("switch_shared", "top2_after_drop")  # top-1 and top-2, with and without shared experts

# The first case of each kind of router but top-k, to be run on one mesh with every dispatcher.
KIND_CASES = {kind: name for name, case in reversed(ROUTER_CASES.items()) if (kind := case.moe.router.kind) != "top_k"}


@functools.cache
def dispatched(case: Case, dispatcher: str) -> Case:
    """The same case with another dispatcher."""
    return dataclasses.replace(case, moe=case.moe.replace(dispatcher=dispatcher))
