"""What the text of a plan says where there is a chip, and where the compiler found the step too large."""

from __future__ import annotations

import dataclasses
import re

import pytest
import tiny

from sparse_lm.planning.describe import aligned, describe
from sparse_lm.planning.plan import OutOfMemory, plan_topology, resolve

CONFIG = resolve(tiny.experiment(model__dropout=0.0, mesh__expert=2, model__moe__dispatcher="all_to_all"))


@pytest.fixture(scope="module")
def plan():
    return plan_topology(CONFIG, "h100:8")


def test_a_chip_has_a_verdict_and_a_roofline(plan):
    text = describe(plan, CONFIG)
    assert "estimated, not compiled: h100: programs for GPUs are compiled on a host with such a GPU only" in text
    assert "fits: " in text and "of the 74.51 GiB of h100" in text
    assert "arithmetic, at 9.89e+14 FLOP/s (bfloat16)" in text
    assert "main memory, at 3.35e+12 bytes/s" in text
    assert "bound by" in text
    assert re.search(r"all-to-all +expert  +\d", text)


def test_what_does_not_fit_is_loud(plan):
    small = dataclasses.replace(plan, chip=dataclasses.replace(plan.chip, hbm=1000))
    assert "DOES NOT FIT" in describe(small, CONFIG)


def test_the_compilers_words_are_passed_on(plan):
    words = "RESOURCE_EXHAUSTED: Used 90.5G of 80.0G hbm\n  1. Size: 4.00G f32[4,8]"
    large = dataclasses.replace(plan, compiled=OutOfMemory(12.5, 90 * 2**30, words))
    text = describe(large, CONFIG)
    assert "the compiler gave up after 12.5 s" in text
    assert "at most in use (compiled)" in text and "DOES NOT FIT: 121%" in text
    assert text.endswith("  1. Size: 4.00G f32[4,8]")
    assert "executed" not in text and "a step takes at least" not in text
    assert large.to_json()["fits"] is False


def test_waiting_of_stages_is_told():
    config = resolve(CONFIG.replace(mesh__expert=1, mesh__stage=2, train__accumulate=4, model__moe__every=1))
    text = describe(plan_topology(config, "h100:2", compile_step=False), config)
    assert "stages have no microbatch in 20% of the pipeline's turns" in text
    assert re.search(r"collective-permute +stage  +\d", text)
    assert "stages" not in describe(plan_topology(CONFIG, "h100:8"), CONFIG)


def test_columns_are_aligned():
    assert aligned([("a", "1"), ("bbb", "22")]) == ["a     1", "bbb  22"]
