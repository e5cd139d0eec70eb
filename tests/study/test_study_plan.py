"""Plans: every study of configs/ablations/ resolves at every scale; FLOPs, parameters and budgets are checked."""

from __future__ import annotations

import pathlib

import pytest
import study_cases

from sparse_lm.config import ConfigError
from sparse_lm.study.plan import config_key, make_plan
from sparse_lm.study.protocols import full_width
from sparse_lm.study.study import BASELINE, SCALES, Variant, load_study

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "ablations"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_study_resolves_at_every_scale(file, scale):
    study = load_study(file)
    plan = make_plan(study, scale)
    assert study.name == file.stem
    assert len(plan.runs) == len(plan.variants) * study.scales[scale].seeds
    assert len({run.name for run in plan.runs}) == len(plan.runs)
    assert len({run.key for run in plan.runs if run.seed == 0}) == len(plan.variants), "two variants are the same"
    for run in plan.runs:
        run.experiment.mesh_sizes(1)
        assert run.experiment.data_seed == run.seed
    for name, cost in plan.costs.items():
        if cost.matched:
            assert abs(cost.flop_ratio - 1) <= study.flop_tolerance, name
    assert plan.costs[BASELINE].router_flops == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_study_is_short_and_tells_source_command_and_cost(file):
    words = file.read_text()
    assert len(words.splitlines()) <= 60
    head = words.split('"""')[1]
    assert "Source:" in head and "Cost: toy " in head and f"--study=configs/ablations/{file.name}" in head
    runs = len(make_plan(load_study(file), "toy").jobs)
    assert f"toy {runs} runs" in head


def test_runs_go_seed_by_seed():
    plan = study_cases.plan(2)
    assert [(run.variant, run.seed) for run in plan.runs] == [
        ("dense", 0),
        ("four", 0),
        ("two", 0),
        ("dense", 1),
        ("four", 1),
        ("two", 1),
    ]
    assert len(make_plan(plan.study, "toy", seeds=5).runs) == 15


def test_the_baseline_is_the_dense_twin_and_costs_by_hand():
    plan = study_cases.plan()
    assert plan.runs[0].experiment.model.moe is None
    four, dense = plan.costs["four"], plan.costs["dense"]
    # Beside the dense twin: a router of 16 x 4 weights, and four experts of which two are used.
    assert four.router_flops == 6 * 16 * 4 == four.flops_per_token - dense.flops_per_token
    assert four.active - dense.active == 16 * 4
    assert four.parameters - dense.parameters == 16 * 4 + 2 * (3 * 16 * 8)
    assert dense.flop_ratio == 1.0


def test_the_key_is_of_the_whole_configuration():
    plan = study_cases.plan()
    one = plan.runs[1].experiment
    assert config_key(one) == plan.runs[1].key == config_key(one.replace())
    assert config_key(one.replace(optim__weight_decay=0.05)) != plan.runs[1].key
    assert plan.runs[1].name == f"four-s0-{plan.runs[1].key}"


def test_unmatched_flops_are_refused_unless_declared():
    wide = {"model__moe__d_expert": 16}
    with pytest.raises(ConfigError, match=r"study\.tiny\.wide=.*FLOPs per token.*matched=False"):
        study_cases.plan(variants={"four": Variant(), "two": Variant(), "wide": Variant(wide)})
    plan = study_cases.plan(variants={"four": Variant(), "two": Variant(), "wide": Variant(wide, matched=False)})
    assert plan.costs["wide"].flop_ratio > 1.05 and not plan.costs["wide"].matched


def test_values_may_depend_on_the_base():
    wide = Variant({"model__moe__d_expert": full_width}, matched=False)
    plan = study_cases.plan(variants={"four": Variant(), "two": Variant(), "wide": wide})
    assert plan.runs[3].experiment.model.d_expert == plan.runs[3].experiment.model.d_ff


def test_unequal_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"study\.tiny\.two=.*parameters.*of those of four"):
        study_cases.plan(same_parameters=(("four", "two"),))


def test_equal_flops_cuts_steps():
    wide = Variant({"model__moe__d_expert": 64}, matched=False)
    plan = study_cases.plan(steps=100, budget="flops", variants={"four": Variant(), "two": Variant(), "wide": wide})
    cost = plan.costs["wide"]
    assert cost.steps == round(100 / cost.flop_ratio) < 100
    assert plan.runs[3].experiment.train.steps == cost.steps
    assert plan.costs["dense"].steps == 100


def test_equal_time_needs_a_rate_that_does_not_fall():
    with pytest.raises(ConfigError, match="falls towards the last step"):
        study_cases.plan(budget="time")
    study = study_cases.study(budget="time")
    scale = study.scales["toy"]
    constant = type(scale)(scale.base.replace(optim__schedule="constant"), 1)
    assert make_plan(study_cases.study(budget="time", scales=dict.fromkeys(SCALES, constant)), "toy").runs


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({"model__moe__num_expert": 3}, "num_expert"),
        ({"model__moe__top_k": 9}, "must be at most num_experts=4"),
        ({"model__moo__top_k": 1}, "moo"),
    ],
)
def test_a_variant_that_does_not_resolve_is_named(variants, words):
    with pytest.raises(ConfigError, match=r"study\.tiny\.two") as caught:
        study_cases.plan(variants={"four": Variant(), "two": Variant(variants)})
    assert words in str(caught.value)


AGAIN = {
    "four": Variant(),
    "roomy": Variant({"model__moe__capacity_factor_eval": 4.0}, paper=1.0, evaluates="four"),
    "two": Variant({"model__moe__num_experts": 2}),
}


def test_an_evaluation_shares_training_seed_and_costs_and_has_a_key_of_its_own():
    plan = study_cases.plan(2, variants=AGAIN)
    assert [(run.variant, run.seed) for run in plan.runs[:4]] == [("dense", 0), ("four", 0), ("two", 0), ("roomy", 0)]
    dense, four, two, roomy = plan.runs[:4]
    assert roomy.training is four and four.training is two.training is dense.training is None
    moe = roomy.experiment.model.moe
    assert moe is not None and moe.capacity_factor_eval == 4.0
    assert roomy.experiment.replace(model=four.experiment.model) == four.experiment
    assert plan.costs["roomy"] is plan.costs["four"]
    # Another key than of a training with this configuration, and another one when what is evaluated changes.
    assert roomy.key not in (four.key, config_key(roomy.experiment))
    assert [[run.variant for run in job] for job in plan.jobs] == [["dense"], ["four", "roomy"], ["two"]] * 2
    assert four.key == study_cases.plan(1).runs[1].key, "a training is the same with and without further evaluations"
    other = study_cases.plan(2, variants=AGAIN | {"four": Variant({"model__moe__capacity_factor": 3.0})})
    assert other.runs[3].key != roomy.key


def test_the_baseline_may_be_evaluated_again():
    again = Variant({"train__eval_batches": 2}, evaluates="dense")
    plan = study_cases.plan(1, variants={"longer": again}, claims=())
    assert plan.runs[1].training is plan.runs[0] and plan.runs[1].experiment.model.moe is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__learning_rate": 0.5}, r"roomy='optim'.*matter of training"),
        ({"train__batch_size": 16}, r"roomy='train'.*matter of training"),
        ({"model__moe__num_experts": 2}, r"parameters.*were trained as"),
    ],
)
def test_what_needs_another_training_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        study_cases.plan(variants={"four": Variant(), "roomy": Variant(changes, evaluates="four")}, claims=())


def test_scale_and_seeds_are_checked():
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        make_plan(study_cases.study(), "toyy")
    with pytest.raises(ConfigError, match="seeds=0"):
        make_plan(study_cases.study(), "toy", 0)
