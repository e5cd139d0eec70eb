"""Ladders: equal FLOPs on every rung, overrides that make the runs, and ladders that make none."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import count
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.scaling.ladder import Ladder, Size, describe, load_ladder, plan_ladder
from sparse_lm.scaling.points import columns_of
from sparse_lm.train.config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = Experiment(
    model=ModelConfig(vocab_size=264, max_length=32, activation="gelu", moe=MoEConfig(num_experts=4, every=1)),
    data=DataConfig(length=32),
    optim=OptimConfig(warmup_steps=100),
    train=TrainConfig(steps=1000, batch_size=4),
)
LADDER = Ladder(
    base=BASE,
    sizes=(Size(2, 16, 2, 64), Size(2, 32, 2, 128)),
    experts=(1, 4),
    budgets=(4e9, 1e9),
    granularity=2,
    min_steps=40,
)


def test_every_run_has_the_flops_of_its_rung():
    plan = plan_ladder(LADDER)
    assert len(plan.rungs) + len(plan.left_out) == 8 and plan.rungs
    for rung in plan.rungs:
        counts = count(rung.experiment.model)
        steps = rung.experiment.train.steps
        assert rung.flops == counts.flops_per_token(32) * 4 * 32 * steps
        assert rung.flops == pytest.approx(rung.budget, rel=0.5 / 40) and steps >= 40
        assert rung.columns["total"] == counts.total and rung.columns["active"] == counts.active
        assert rung.columns["total_non_embedding"] == counts.non_embedding
    assert [rung.budget for rung in plan.rungs] == sorted(rung.budget for rung in plan.rungs)


def test_columns_are_those_that_a_finished_run_will_have():
    for rung in plan_ladder(LADDER).rungs:
        assert rung.columns == pytest.approx({**rung.columns, **columns_of(rung.experiment)})


def test_overrides_are_experts_of_a_share_of_the_width():
    by_name = {rung.name: rung for rung in plan_ladder(LADDER).rungs}
    sparse = by_name["f4e+09-l2d16h64-e4-g2"]
    model = sparse.experiment.model
    assert model.moe is not None and (model.d_ff, model.d_expert) == (64, 32)
    assert (model.moe.num_experts, model.moe.top_k) == (8, 2)
    assert sparse.experiment == BASE.replace(**sparse.changes)
    dense = by_name["f4e+09-l2d16h64-e1"].experiment
    assert dense.model.moe is None and dense.data == BASE.data
    # A tenth of the steps warm up, as in the base, and the only evaluation that counts is the last.
    assert dense.optim.warmup_steps == round(dense.train.steps / 10)
    assert dense.checkpoint.every == dense.train.steps


def test_overrides_are_flags_of_the_main_and_variants_of_a_study():
    plan = plan_ladder(LADDER)
    dense = next(rung for rung in plan.rungs if rung.name == "f4e+09-l2d16h64-e1")
    assert "--config.model.moe=None" in dense.flags() and "--config.model.d_model=16" in dense.flags()
    assert f"--config.train.steps={dense.experiment.train.steps}" in dense.flags()
    assert list(plan.changes()) == [rung.name for rung in plan.rungs]


def test_runs_that_are_too_short_or_too_long_are_left_out_by_name():
    short = plan_ladder(dataclasses.replace(LADDER, min_steps=200, budgets=(4e9,)))
    assert set(short.left_out) and all(steps < 200 for steps in short.left_out.values())
    text = describe(short)
    assert "left out for their number of steps: f4e+09-l2d32h128-e1 (" in text
    assert all(rung.name in text and rung.flags()[0] in text for rung in short.rungs)
    assert not plan_ladder(dataclasses.replace(LADDER, min_steps=1)).left_out
    with pytest.raises(ConfigError, match=r"ladder\.budgets.*less than min_steps=100000 .*f1e\+09-l2d16h64-e1 \d"):
        plan_ladder(dataclasses.replace(LADDER, min_steps=100_000))
    with pytest.raises(ConfigError, match="more than max_steps=2"):
        plan_ladder(dataclasses.replace(LADDER, min_steps=1, max_steps=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, r"ladder\.sizes=\(\): is empty"),
        ({"experts": (0,)}, r"ladder\.experts\[0\]=0: must be at least 1"),
        ({"budgets": (1e9, float("inf"))}, r"ladder\.budgets\[1\]=inf: must be at least 1 and finite"),
        ({"granularity": 0}, r"ladder\.granularity=0"),
        ({"min_steps": 0}, r"ladder\.min_steps=0"),
        ({"base": BASE.replace(model__moe=None)}, r"ladder\.base\.model\.moe=None: is dense"),
    ],
)
def test_ladders_that_make_no_runs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LADDER, **changes)


def test_what_does_not_resolve_is_named_with_its_run():
    with pytest.raises(
        ConfigError, match=r"ladder\.f1e\+09-l2d16h64-e4-g3\.d_ff=64: must be a multiple of granularity=3"
    ):
        plan_ladder(dataclasses.replace(LADDER, granularity=3, min_steps=1))
    with pytest.raises(ConfigError, match=r"ladder\.f1e\+09-l2d15h64-e1\..*num_heads=2: must divide"):
        plan_ladder(dataclasses.replace(LADDER, sizes=(Size(2, 15, 2, 64),)))
    with pytest.raises(ConfigError, match="two runs have this name"):
        plan_ladder(dataclasses.replace(LADDER, budgets=(4e9, 4e9)))


def test_the_ladder_that_comes_with_the_project(tmp_path):
    ladder = load_ladder(ROOT / "configs" / "ladder.py")
    plan = plan_ladder(ladder)
    assert all(abs(rung.flops / rung.budget - 1) < 0.005 for rung in plan.rungs)
    # Enough for the eleven coefficients of the joint law, with three values of everything.
    assert len(plan.rungs) >= 3 * 10
    for name in ("active", "tokens", "experts"):
        assert len({rung.columns[name] for rung in plan.rungs}) >= 3
    with pytest.raises(ConfigError, match="there is no such Python file"):
        load_ladder(tmp_path / "nowhere.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"defines no LADDER"):
        load_ladder(tmp_path / "empty.py")
