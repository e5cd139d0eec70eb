"""What a sparse layer's configuration accepts, refuses and claims."""

from __future__ import annotations

import pytest

from sparse_lm.config import ConfigError, from_dict, to_dict
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.routers.top_k import TopK


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, r"config\.top_k=5: must be at most num_experts=4"),
        (
            {"router": {"kind": "top_k", "gate": "softmax_after"}},
            r"config\.router\.gate='softmax_after'.*softmax_before",
        ),
        (
            {"router": {"kind": "top_k", "renormalise": "after_drop"}},
            r"config\.router\.renormalise='after_drop'.*use none",
        ),
        ({"router": {"kind": "top_k", "second_expert": "gshard"}}, r"config\.router\.second_expert='gshard'.*use all"),
        (
            {"top_k": 2, "router": {"kind": "top_k", "second_expert": "none", "renormalise": "after_drop"}},
            r"config\.router\.renormalise='after_drop'.*second_expert=none.*use none or before_drop",
        ),
        ({"router": {"kind": "top-k"}}, r"config\.router\.kind='top-k'.*did you mean 'top_k'"),
        ({"dispatcher": "ragged"}, r"config\.dispatcher='ragged'.*known: all_to_all, dense, dropless, einsum, gather"),
        ({"priority": "tokens"}, r"config\.priority='tokens'.*did you mean 'token'"),
        ({"capacity_factor": 0.0}, r"config\.capacity_factor=0\.0: must be greater than 0"),
        ({"capacity_factor_eval": -1}, r"config\.capacity_factor_eval=-1"),
        ({"group_size": 0}, r"config\.group_size=0: must be at least 1"),
        ({"expert_dropout": 1.0}, r"config\.expert_dropout=1\.0: must be less than 1"),
        ({"balance": {"scope": "batch"}}, r"config\.balance\.scope='batch'"),
        ({"balance": {"load": -0.1}}, r"config\.balance\.load=-0\.1"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_way_out(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(MoEConfig, values)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("priority", "causal_for"),
    [("token", (1, 2)), ("first_choice", (1,)), ("probability", ()), ("batch", ()), ("random", ())],
)
def test_which_priorities_are_causal(top_k, priority, causal_for):
    config = MoEConfig(top_k=top_k, priority=priority)
    assert config.causal == (top_k in causal_for)
    training_only = config.replace(capacity_factor_eval=None)
    assert training_only.causal == (top_k in causal_for)
    evaluation_only = config.replace(capacity_factor=None)
    assert evaluation_only.causal == (top_k in causal_for)
    assert config.replace(capacity_factor=None, capacity_factor_eval=None).causal


def test_a_router_that_is_not_causal_is_not_made_so_by_capacity():
    class LooksAhead(TopK):
        causal = False

    config = MoEConfig(capacity_factor=None, capacity_factor_eval=None)
    object.__setattr__(config, "router", LooksAhead())
    assert not config.causal


def test_the_default_is_causal_for_every_top_k():
    assert all(MoEConfig(top_k=k).causal for k in range(1, 9))


def test_every_dispatcher_of_the_table_can_be_chosen():
    for name in DISPATCHERS:
        limits = {} if DISPATCHERS[name].has_capacity else {"capacity_factor": None, "capacity_factor_eval": None}
        assert from_dict(MoEConfig, {"dispatcher": name, **limits}).dispatcher == name


@pytest.mark.parametrize("option", ["capacity_factor", "capacity_factor_eval"])
def test_a_capacity_where_there_is_none_is_refused(option):
    limits = {"capacity_factor": None, "capacity_factor_eval": None, option: 1.25}
    with pytest.raises(ConfigError, match=rf"{option}=1\.25.*dropless has no capacity"):
        MoEConfig(dispatcher="dropless", **limits)


def test_kernels_of_grouped_products_need_a_dispatcher_that_has_any():
    limits = {"capacity_factor": None, "capacity_factor_eval": None}
    assert MoEConfig(dispatcher="ragged_all_to_all", grouped="megablox", **limits).grouped == "megablox"
    with pytest.raises(ConfigError, match=r"grouped='megablox'.*gather has no grouped products; use auto"):
        MoEConfig(grouped="megablox")
    known = "auto, blocks, megablox, ragged_dot, tokamax, triton"
    with pytest.raises(ConfigError, match=rf"grouped='cublas'.*known: {known}"):
        from_dict(MoEConfig, {"dispatcher": "dropless", "grouped": "cublas", **limits})


def test_round_trip_through_plain_dictionaries():
    config = MoEConfig(
        num_experts=16,
        top_k=4,
        router=TopK(renormalise="before_drop", jitter=0.01),
        balance=BalanceConfig(scope="sequence", z=0.0),
        capacity_factor=None,
    )
    assert from_dict(MoEConfig, to_dict(config)) == config
