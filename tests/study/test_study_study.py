"""A study's declaration is checked before anything runs."""

from __future__ import annotations

import pytest
import study_cases

from sparse_lm.config import ConfigError
from sparse_lm.study.claims import Less
from sparse_lm.study.plan import make_plan
from sparse_lm.study.study import Study, Variant, load_study


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "use letters"),
        ({"variants": {"dense": Variant()}, "claims": ()}, "and not 'dense'"),
        ({"variants": {"with space": Variant()}, "claims": ()}, "use letters"),
        ({"claims": (Less("fore", "two", name="x", statement=""),)}, "did you mean 'four'"),
        ({"claims": (Less("four", "two", name="x", statement=""),) * 2}, "two claims"),
        ({"same_parameters": (("four", "six"),)}, "is no variant"),
        ({"scales": {}}, "toy, small, paper"),
        ({"flop_tolerance": 0.0}, "between 0 and 1"),
        ({"variants": {"a": Variant(evaluates="b"), "b": Variant(evaluates="dense")}, "claims": ()}, "that is trained"),
        ({"variants": {"a": Variant(evaluates="a")}, "claims": ()}, r"tiny\.a\.evaluates='a'"),
        ({"variants": {"a": Variant(evaluates="dense")}, "claims": (), "budget": "time"}, "at an earlier time"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        study_cases.study(**changes)


def test_claims_may_speak_of_the_baseline():
    assert study_cases.study(claims=(Less("two", "dense", name="x", statement=""),)).claims


def test_the_measure_follows_the_budget():
    assert study_cases.study().measure == "validation_loss"
    assert study_cases.study(budget="flops").measure == "validation_loss"
    assert study_cases.study(budget="time").measure == "loss_at_equal_time"


def test_variants_cannot_be_changed_afterwards():
    with pytest.raises(TypeError):
        study_cases.study().variants["x"] = Variant()  # type: ignore[index]


def test_a_file_with_a_study(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import study_cases\nSTUDY = study_cases.study()\n")
    assert isinstance(load_study(file), Study)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.py", None, "there is no such file"),
        ("empty.py", "", "defines no STUDY"),
        ("other.py", "STUDY = 3", "defines no STUDY"),
        ("text.txt", "STUDY = 3", "is no Python file"),
    ],
)
def test_a_file_without_one(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_study(tmp_path / name)


def test_a_smaller_study_has_the_claims_that_speak_of_it_alone():
    whole = study_cases.study(
        same_parameters=(("four", "two"),),
        claims=(*study_cases.study().claims, Less("two", "dense", name="x", statement="")),
    )
    small = whole.smaller("two", train__steps=3)
    assert list(small.variants) == ["two"] and [claim.name for claim in small.claims] == ["x"]
    assert small.same_parameters == () and small.name == whole.name
    assert {scale.base.train.steps for scale in small.scales.values()} == {3}
    assert {scale.base.train.steps for scale in whole.scales.values()} == {4}
    assert [(run.variant, run.seed) for run in make_plan(small, "toy").runs] == [
        (name, seed) for seed in (0, 1) for name in ("dense", "two")
    ]


def test_a_smaller_study_of_all_is_the_study():
    whole = study_cases.study()
    same = whole.smaller("four", "two")
    assert same.claims == whole.claims and dict(same.variants) == dict(whole.variants)
    assert make_plan(same, "toy").runs == make_plan(whole, "toy").runs


@pytest.mark.parametrize(("names", "changes", "words"), [
    (("fore",), {}, "did you mean 'four'"),
    (("dense",), {}, "is no variant"),
    (("four",), {"train__steps": 0}, "steps"),
])  # fmt: skip
def test_a_smaller_study_of_what_there_is_not_is_refused(names, changes, words):
    with pytest.raises(ConfigError, match=words):
        study_cases.study().smaller(*names, **changes)
