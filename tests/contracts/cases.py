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
from sparse_lm.moe.routers.base_layer import Base
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.routers.fixed_noise import FixedNoise
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.noisy_top_k import NoisyTopK
from sparse_lm.moe.routers.prototype import Prototype
from sparse_lm.moe.routers.relu import Relu
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.moe.routers.sinkhorn import Sinkhorn
from sparse_lm.moe.routers.soft import SoftMixture
from sparse_lm.moe.routers.sparse_mixer import SparseMixer
from sparse_lm.moe.routers.top_k import TopK


@dataclasses.dataclass(frozen=True)
class Case:
    """A sparse layer. training: with the capacity and the policies of training, noise aside.

    state: (name, value) of what the router holds beside its weights, where that is not what a fresh one has.
    drops: whether some assignment finds no slot.
    """

    moe: MoEConfig
    activation: str = "swiglu"
    training: bool = True
    state: tuple[tuple[str, Any], ...] = ()
    drops: bool = True


BIAS = (0.3, -0.2, 0.1, 0.0, -0.4, 0.25, 0.05, -0.1)  # changes about half of the choices
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


FREQUENCIES = (5.0, 1.0, 0.0, 7.0, 7.0, 2.0, 9.0, 1.0, 1.0, 3.0, 4.0, 4.0, 8.0)  # of ids 0 to 12; the others are hashed

DROPLESS: dict[str, Any] = {"capacity_factor": None, "capacity_factor_eval": None}

ROUTER_CASES: dict[str, Case] = {
    "switch": Case(moe(1), "relu"),
    "switch_small_groups": Case(moe(1, scope="sequence", group_size=4), "gelu"),
    "switch_shared": Case(moe(1, scope="group", num_shared=2), "geglu"),
    "switch_sample": Case(moe(1, {"sample": True}, priority="token"), "relu", training=False),
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
    "top2_batch": Case(moe(2, {"gate": "softmax_after"}, priority="batch", allow_non_causal=True)),
    "top2_random": Case(moe(2, priority="random", allow_non_causal=True), training=False),
    "noisy_top_k": Case(moe(2, NoisyTopK(10.0, 10.0, init_scale=ROUTER_SCALE)), training=False),
    "noisy_top_k_small_groups": Case(
        moe(3, NoisyTopK(10.0, 10.0, init_scale=ROUTER_SCALE), "group", group_size=4), "relu", training=False
    ),
    "fixed_noise": Case(moe(2, FixedNoise(0.0, 10.0, 10.0, ROUTER_SCALE), priority="batch", allow_non_causal=True)),
    "fixed_noise_top1": Case(moe(1, FixedNoise(1.0, 10.0, 10.0, ROUTER_SCALE), "sequence"), "gelu", training=False),
    "prototype": Case(moe(2, Prototype(ROUTER_SCALE))),
    "prototype_four": Case(moe(4, Prototype(ROUTER_SCALE), "group", d_expert=4), "geglu"),
    "dropless": Case(moe(2, scope="group", **DROPLESS), drops=False),
    "dropless_input": Case(
        moe(3, Sigmoid(init_scale=ROUTER_SCALE, scale=1.0, gate_on="input"), expert_bias=True, **DROPLESS),
        "clamped_swiglu",
        drops=False,
    ),
    "hash": Case(moe(1, Hash())),
    "hash_multi": Case(moe(3, Hash(gate="mean"), "sequence", priority="token")),
    "hash_balanced": Case(moe(2, Hash(mode="balanced", frequencies=FREQUENCIES), "group")),
    "hash_bigram": Case(moe(2, Hash(mode="bigram"), group_size=4)),
    "expert_choice": Case(moe(2, ExpertChoice(init_scale=ROUTER_SCALE)), drops=False),
    "expert_choice_wide": Case(moe(1, ExpertChoice(init_scale=ROUTER_SCALE), "sequence", group_size=16), drops=False),
    "expert_choice_limited": Case(
        moe(2, ExpertChoice(ROUTER_SCALE, max_experts=2, entropy=0.1, iterations=40), "group"), drops=False
    ),
    "sinkhorn": Case(moe(1, Sinkhorn(init_scale=ROUTER_SCALE))),
    "sinkhorn_top2": Case(moe(2, Sinkhorn(init_scale=ROUTER_SCALE, temperature=2.0, iterations=7), "group")),
    "sinkhorn_evaluation": Case(moe(1, Sinkhorn(init_scale=ROUTER_SCALE)), training=False),
    "base": Case(moe(1, Base(gain=2.0)), drops=False),
    "base_wide": Case(moe(1, Base(gain=2.0), "group", group_size=16, capacity_factor=0.5)),
    "base_evaluation": Case(moe(1, Base(gain=2.0)), training=False),
    "soft": Case(moe(2, SoftMixture(2.0), group_size=8, dispatcher="einsum"), drops=False),
    "soft_wide": Case(
        moe(1, SoftMixture(), "sequence", group_size=16, dispatcher="einsum", num_shared=1), "gelu", drops=False
    ),
    "sparse_mixer": Case(moe(2, SparseMixer(0.2, ROUTER_SCALE)), training=False),
    "sparse_mixer_top1": Case(moe(1, SparseMixer(0.4, ROUTER_SCALE), "group", priority="token"), training=False),
    "deepseek_v3": Case(
        moe(3, Sigmoid(init_scale=ROUTER_SCALE, num_groups=4, groups_kept=2), "sequence", num_shared=1),
        state=(("bias_E", BIAS),),
    ),
    "llama4": Case(
        moe(1, Sigmoid(init_scale=ROUTER_SCALE, renormalise="none", scale=1.0, bias_rate=0.0, gate_on="input"))
    ),
    "top2_input": Case(
        moe(2, Sigmoid(init_scale=ROUTER_SCALE, scale=1.0, gate_on="input"), expert_bias=True, priority="token"), "gelu"
    ),
    "gpt_oss": Case(
        moe(4, {"gate": "softmax_after", "bias": True}, "group", expert_bias=True, priority="token"), "clamped_swiglu"
    ),
    "qwen2": Case(moe(2, num_shared=2, shared_gate="sigmoid", d_shared=5, priority="token")),
    "residual": Case(moe(1, num_shared=1, shared_gate="mix", d_shared=8), "gelu"),
    "deepseek_v2": Case(
        moe(2, Sigmoid("softmax", "none", 16.0, 4, 3, "max", 0.0, init_scale=ROUTER_SCALE), "sequence"), "geglu"
    ),
    "kimi_k2": Case(moe(4, Sigmoid(init_scale=ROUTER_SCALE, scale=2.827), priority="token"), state=(("bias_E", BIAS),)),
    "sigmoid_top1": Case(
        moe(1, Sigmoid(init_scale=ROUTER_SCALE, renormalise="none"), capacity_factor=2.0), state=(("bias_E", BIAS),)
    ),
    "sigmoid_after_drop": Case(
        moe(2, Sigmoid(init_scale=ROUTER_SCALE, renormalise="after_drop", scale=1.0), "group", group_size=4),
        state=(("bias_E", BIAS),),
    ),
    "moe_plus_plus": Case(
        moe(
            2,
            {"pathway": True},
            num_zero=1,
            num_copy=1,
            num_constant=2,
            free_share=0.75,
            capacity_factor=0.8,
            priority="token",
        )
    ),
    "free_after_drop": Case(
        moe(3, {"renormalise": "after_drop"}, "group", num_constant=3, num_copy=2, num_shared=1, capacity_factor=0.8),
        "geglu",
    ),
    "free_input": Case(
        moe(
            2,
            Sigmoid(init_scale=ROUTER_SCALE, scale=1.0, gate_on="input", pathway=True),
            "sequence",
            num_zero=2,
            num_constant=1,
            free_share=0.5,
            expert_bias=True,
        ),
        "gelu",
    ),
    "remoe": Case(moe(2, Relu(init_scale=ROUTER_SCALE), capacity_factor=1.5), state=(("coefficient", 2.0),)),
    "remoe_limited": Case(
        moe(2, Relu(init_scale=ROUTER_SCALE, refine_balance=False, max_active=3), "group", group_size=16),
        "relu",
        state=(("coefficient", 2.0),),
    ),
}

DISPATCHERS = tuple(DISPATCHER_CLASSES)
LIMITED = tuple(name for name, cls in DISPATCHER_CLASSES.items() if cls.has_capacity)

MESHES: dict[str, dict[str, int]] = {
    "one": {"data": 1},
    "data8": {"data": 8},
    "expert8": {"expert": 8},
    "data2-expert4": {"data": 2, "expert": 4},
    "data2-expert2-model2": {"data": 2, "expert": 2, "model": 2},
    "fsdp2-expert2-model2": {"fsdp": 2, "expert": 2, "model": 2},
    "replica2-expert2-context2": {"replica": 2, "expert": 2, "context": 2},
    "fsdp2-context2-model2": {"fsdp": 2, "context": 2, "model": 2},
}

MESH_CASES = ("switch_shared", "top2_after_drop", "dropless")  # top-1 and top-2, with and without shared experts

# The first case of each kind of router but top-k, to be run on one mesh with every dispatcher.
KIND_CASES = {kind: name for name, case in reversed(ROUTER_CASES.items()) if (kind := case.moe.router.kind) != "top_k"}

# Options of a router that compute in another way on a mesh, and so are run on it too.
VARIANT_CASES = (
    "dropless",
    "expert_choice_limited",
    "hash_bigram",
    "llama4",
    "gpt_oss",
    "qwen2",
    "residual",
    "moe_plus_plus",
    "free_input",
)


def able(name: str) -> tuple[str, ...]:
    """The dispatchers that can carry the case's decisions."""
    moe = ROUTER_CASES[name].moe
    limited = moe.capacity_factor is not None or moe.capacity_factor_eval is not None
    able = moe.router.dispatchers or DISPATCHERS
    return tuple(dispatcher for dispatcher in able if not limited or dispatcher in LIMITED)


@functools.cache
def dispatched(case: Case, dispatcher: str) -> Case:
    """The same case with another dispatcher, and without a capacity where that has none."""
    options = {} if dispatcher in LIMITED else DROPLESS
    return dataclasses.replace(case, moe=case.moe.replace(dispatcher=dispatcher, **options))
