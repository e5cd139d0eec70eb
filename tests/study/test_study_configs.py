"""What the studies of configs/ablations/ compare, by hand: that each variant is what the paper's row says."""

from __future__ import annotations

import pathlib

import pytest

from sparse_lm.moe.conventions import convert_capacity
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.study.claims import Within
from sparse_lm.study.plan import Plan, make_plan
from sparse_lm.study.study import load_study

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "ablations"


def planned(name: str) -> Plan:
    """The toy plan of a study."""
    return make_plan(load_study(FOLDER / f"{name}.py"), "toy", 1)


def models(name: str) -> dict:
    """The model of each variant of a study at the toy scale."""
    return {run.variant: run.experiment.model for run in planned(name).runs}


def layers(name: str) -> dict:
    """The configuration of the sparse layers of each variant but the dense one."""
    return {variant: model.moe for variant, model in models(name).items() if model.moe is not None}


def test_capacity_trains_once_what_differs_in_evaluation_alone():
    runs = {run.variant: run for run in planned("capacity").runs}
    assert {name: run.training.variant for name, run in runs.items() if run.training} == {
        "k1_0.75_2": "k1_0.75_0.75",
        "k1_1_2": "k1_1_1",
    }
    found = {name: (moe.capacity_factor, moe.capacity_factor_eval) for name, moe in layers("capacity").items()}
    # As the names say; for two experts in the paper's convention, twice ours.
    for name, factors in found.items():
        k, *told = name[1:].split("_")
        assert tuple(int(k) * factor for factor in factors) == tuple(map(float, told)), name


def changed(name: str) -> set[str]:
    """The dotted keys that a study's variants change."""
    study = load_study(FOLDER / f"{name}.py")
    return {key.replace("__", ".") for variant in study.variants.values() for key in variant.changes}


def test_experts_differ_in_their_number_alone():
    assert changed("experts") == {"model.moe.num_experts"}
    assert [moe.num_experts for moe in layers("experts").values()] == [2, 4, 8, 16, 32]


def test_the_grid_keeps_width_times_choices():
    for name, model in models("experts_top_k").items():
        if model.moe is not None:
            experts, chosen = map(int, name.split("x"))
            assert (model.moe.num_experts, model.moe.top_k) == (experts, chosen)
            assert model.d_expert * chosen == model.d_ff


def test_gates_are_normalised_alike_wherever_there_are_several():
    for study in ("experts_top_k", "granularity"):
        for moe in layers(study).values():
            assert moe.router.renormalise == ("none" if moe.top_k == 1 else "before_drop")


def test_granularity_keeps_parameters_with_a_shared_expert_as_well():
    costs = planned("granularity").costs
    experts = {name: cost.parameters - cost.router_flops // 6 for name, cost in costs.items() if name != "dense"}
    assert len(set(experts.values())) == 1, experts
    shared = layers("granularity")["31x3+1"]
    assert shared.num_shared + shared.top_k == 4 and shared.num_shared + shared.num_experts == 32


def test_capacity_of_two_experts_is_converted_from_the_papers_convention():
    found = layers("capacity")
    for name, paper in (("k2_1_2", 1.0), ("k2_2_2", 2.0)):
        assert found[name].capacity_factor == convert_capacity(paper, "flaxformer", top_k=2)
        assert found[name].top_k == 2 and not planned("capacity").costs[name].matched
    # As many slots as one expert per token has at the same factor of the paper.
    assert found["k2_1_2"].capacity_factor * 2 == found["k1_1_2"].capacity_factor


@pytest.mark.parametrize(
    ("name", "low", "high"), [("capacity", "k1_0.75_2", "k1_1_2"), ("dropless", "0.5", "1"), ("dropless", "1", "2")]
)
def test_more_capacity_is_more_capacity(name, low, high):
    found = layers(name)
    assert found[low].capacity_factor < found[high].capacity_factor
    assert found[low].capacity_factor_eval == found[high].capacity_factor_eval


def test_dropless_drops_nothing_anywhere():
    found = layers("dropless")
    assert found["dropless"].capacity_factor is None
    assert all(moe.capacity_factor_eval is None for moe in found.values())


def test_who_looks_ahead_says_so():
    leak = layers("expert_choice_leak")
    assert {name: moe.causal for name, moe in leak.items()} == {
        "token_choice": True,
        "choice_in_rows": False,
        "choice_in_16": False,
        "choice_by_position": True,
    }
    for name in ("choice_in_rows", "choice_by_position"):
        assert leak[name].router.kind == "expert_choice" and leak[name].losses.load == 0
    order = layers("drop_priority")
    assert order["token"].priority == "token" and not order["batch"].causal
    assert all(moe.capacity_factor == moe.capacity_factor_eval for moe in order.values())


def test_hash_base_is_causal_for_all_and_balances_in_one_way_each():
    found = layers("hash_base")
    assert all(moe.causal for moe in found.values())
    assert {name: moe.losses.load > 0 for name, moe in found.items()} == {
        "switch": True,
        "hash": False,
        "base": False,
        "sinkhorn": False,
    }


def test_balance_studies_change_one_thing():
    assert changed("balance_weight") == {"model.moe.balance.load"}
    assert [moe.balance.load for moe in layers("balance_weight").values()] == [0, 0.001, 0.01, 0.1]
    assert {name: moe.balance.scope for name, moe in layers("balance_scope").items() if name != "none"} == {
        "sequence": "sequence",
        "global": "global",
    }
    base = planned("balance_scope").runs[0].experiment.data
    assert base.grammar.document_length == base.length + 1, "a row is one document, hence of one domain"


def test_loss_free_has_either_a_bias_or_a_loss():
    found = {name: (moe.router.bias_rate, moe.losses.load) for name, moe in layers("loss_free_bias").items()}
    assert found == {"loss": (0, 0.01), "bias_0.001": (0.001, 0), "bias_0.01": (0.01, 0), "neither": (0, 0)}


def test_placement_has_sixteen_experts_wherever_they_stand():
    for name, model in models("placement").items():
        if model.moe is not None:
            assert sum(model.sparse) * model.moe.num_experts == 16, name
    assert models("placement")["last_2"].sparse == (False, False, True, True)
    assert models("placement")["every_2"].sparse == (False, True, False, True)


def test_precision_changes_the_type_alone():
    assert {name: model.dtype for name, model in models("precision").items()} == {
        "dense": "float32",
        "float32": "float32",
        "selective": "bfloat16",
        "all_bfloat16": "bfloat16",
    }
    routers = {name: moe.router.dtype for name, moe in layers("precision").items()}
    assert routers == {"float32": "float32", "selective": "float32", "all_bfloat16": "bfloat16"}
    assert len({moe.replace(router__dtype="float32") for moe in layers("precision").values()}) == 1


def test_each_arm_of_exploration_explores_in_one_way():
    found = {name: moe.router for name, moe in layers("jitter").items()}
    noise = found.pop("logit_noise")
    assert noise.kind == "fixed_noise" and noise.noise > 0
    ways = {name: (router.sample, router.input_dropout, router.jitter) for name, router in found.items()}
    assert ways == {
        "argmax": (False, 0, 0),
        "sample": (True, 0, 0),
        "input_dropout": (False, 0.1, 0),
        "jitter_0.01": (False, 0, 0.01),
        "jitter_0.3": (False, 0, 0.3),
    }
    assert all(router.replace(sample=False, input_dropout=0.0, jitter=0.0) == TopK() for router in found.values())


def test_equal_flops_gives_wide_experts_fewer_steps():
    costs = planned("equal_flops").costs
    assert costs["top_4"].steps < costs["top_2"].steps < costs["top_1"].steps <= costs["dense"].steps
    for name, cost in costs.items():
        assert cost.steps * cost.flop_ratio == pytest.approx(costs["dense"].steps, rel=2e-3), name


def test_equal_time_compares_at_equal_slots():
    found = layers("equal_time")
    assert found["top2_0.5"].capacity_factor * 2 == found["switch_1.0"].capacity_factor
    assert {run.experiment.optim.schedule for run in planned("equal_time").runs} == {"constant"}


def test_margins_of_equality_are_positive_and_toy_runs_are_few():
    for file in FOLDER.glob("*.py"):
        study = load_study(file)
        assert all(claim.margin > 0 for claim in study.claims if isinstance(claim, Within))
        assert len(make_plan(study, "toy").runs) <= 30, file.name
