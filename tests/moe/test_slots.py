"""Capacity, drop priorities and slots: tables by hand, published examples, and a literal loop over assignments."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.slots import PRIORITIES, SlotRule, capacity, place
from sparse_lm.moe.types import TokenChoice


@functools.cache
def compiled(num_experts: int, rule: SlotRule):
    return jax.jit(lambda expert, gate, order: place(TokenChoice(expert, gate, order), num_experts, rule))


def placed(expert, gate, num_experts: int, rule: SlotRule, order=None):
    """`place` on one group or several, as numpy arrays (slot, gate, token)."""
    expert, gate = np.asarray(expert, np.int32), np.asarray(gate, np.float32)
    if expert.ndim == 2:
        expert, gate = expert[None], gate[None]
    order = None if order is None else np.asarray(order, np.float32).reshape(expert.shape[:2])
    result = compiled(num_experts, rule)(expert, gate, order)
    return np.asarray(result.slot_GSK), np.asarray(result.gate_GSK), np.asarray(result.token_GEC)


@pytest.mark.parametrize(
    ("factor", "top_k", "size", "num_experts", "expected"),
    [
        (1.25, 2, 100, 8, 32),  # 31.25; Megatron, V-MoE and DeepSpeed give 32 too
        (1.25, 1, 100, 8, 16),
        (1.0, 1, 64, 8, 8),
        (1.0, 1, 65, 8, 9),
        (1.1, 2, 100, 4, 55),  # exact: floating point makes 55.00000000000001 of it
        (0.5, 1, 8, 8, 1),
        (1e-9, 1, 8, 8, 1),  # however small the factor, rounding up leaves one slot
        (2.0, 8, 16, 8, 16),  # 32, but no expert can have more than every token
        (None, 2, 100, 8, 100),
    ],
)
def test_capacity(factor, top_k, size, num_experts, expected):
    assert capacity(factor, top_k, size, num_experts) == expected


@hypothesis.given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 512), st.integers(1, 64))
def test_capacity_is_the_exact_ceiling(hundredths, top_k, size, num_experts):
    exact = -(-hundredths * top_k * size // (100 * num_experts))
    assert capacity(hundredths / 100, top_k, size, num_experts) == min(size, exact)


EXPERT_SK = [[0, 1], [0, 2], [1, 2], [1, 2]]
GATE_SK = [[0.9, 0.1], [0.2, 0.6], [0.8, 0.5], [0.7, 0.55]]


@pytest.mark.parametrize(
    ("priority", "slots", "tokens"),
    [
        ("first_choice", [[0, -1], [1, 0], [0, 1], [1, -1]], [[0, 1], [2, 3], [1, 2]]),
        ("token", [[0, 0], [1, 0], [1, 1], [-1, -1]], [[0, 1], [0, 2], [1, 2]]),
        ("probability", [[0, -1], [1, 0], [0, -1], [1, 1]], [[0, 1], [2, 3], [1, 3]]),
        # Tokens by their largest gate: 0 (0.9), 2 (0.8), 3 (0.7), 1 (0.6); then their second choices in that order.
        ("batch", [[0, -1], [1, -1], [0, 0], [1, 1]], [[0, 1], [2, 3], [2, 3]]),
        ("random", [[0, 0], [1, 0], [1, 1], [-1, -1]], [[0, 1], [0, 2], [1, 2]]),  # without an order as `token`
    ],
)
def test_priorities_by_hand(priority, slots, tokens):
    slot_GSK, gate_GSK, token_GEC = placed(EXPERT_SK, GATE_SK, 3, SlotRule(2, priority))
    np.testing.assert_array_equal(slot_GSK[0], slots)
    np.testing.assert_array_equal(token_GEC[0], tokens)
    np.testing.assert_allclose(gate_GSK[0], np.where(np.array(slots) >= 0, GATE_SK, 0))


def test_a_random_order_decides_for_all_choices_of_a_token():
    rule = SlotRule(2, "random")
    slot_GSK, gate_GSK, token_GEC = placed(EXPERT_SK, GATE_SK, 3, rule, order=[0.9, 0.2, 0.8, 0.1])  # 3, 1, 2, 0
    np.testing.assert_array_equal(slot_GSK[0], [[1, -1], [0, 1], [1, -1], [0, 0]])
    np.testing.assert_array_equal(token_GEC[0], [[1, 0], [3, 2], [3, 1]])
    np.testing.assert_allclose(gate_GSK[0], np.where(slot_GSK[0] >= 0, GATE_SK, 0))


@pytest.mark.parametrize("priority", sorted(set(PRIORITIES) - {"random"}))
def test_only_random_looks_at_the_order(priority):
    rule = SlotRule(2, priority)
    with_order = placed(EXPERT_SK, GATE_SK, 3, rule, order=[0.9, 0.2, 0.8, 0.1])
    for one, other in zip(with_order, placed(EXPERT_SK, GATE_SK, 3, rule), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batch_keeps_the_most_certain_tokens_and_token_the_first_ones():
    expert_SK, gate_SK = np.zeros((6, 1), int), np.array([[0.3], [0.9], [0.4], [0.9], [0.5], [0.8]])
    kept = {p: np.flatnonzero(placed(expert_SK, gate_SK, 1, SlotRule(3, p))[0][0, :, 0] >= 0) for p in PRIORITIES}
    np.testing.assert_array_equal(kept["batch"], [1, 3, 5])
    np.testing.assert_array_equal(kept["token"], [0, 1, 2])


def test_batch_and_probability_differ_where_a_second_choice_beats_a_first():
    """Token 0 is sure of expert 0 and still gives expert 1 more than token 1 does, whose first choice that is."""
    expert_SK, gate_SK = [[0, 1], [1, 0]], [[0.5, 0.4], [0.3, 0.2]]
    slots = {p: placed(expert_SK, gate_SK, 2, SlotRule(1, p))[0][0] for p in ("batch", "probability")}
    np.testing.assert_array_equal(slots["batch"], [[0, -1], [0, -1]])
    np.testing.assert_array_equal(slots["probability"], [[0, 0], [-1, -1]])


def test_renormalisation_is_over_what_was_kept():
    _, gate_GSK, _ = placed(EXPERT_SK, GATE_SK, 3, SlotRule(2, "first_choice", renormalise=True))
    np.testing.assert_allclose(gate_GSK[0], [[1, 0], [0.25, 0.75], [8 / 13, 5 / 13], [1, 0]], rtol=1e-6)
    _, gate_GSK, _ = placed(EXPERT_SK, GATE_SK, 3, SlotRule(2, "token", renormalise=True))
    np.testing.assert_array_equal(gate_GSK[0, 3], [0, 0])  # nothing kept: no division by zero


def test_ties_go_to_the_earlier_choice_and_then_to_the_earlier_token():
    slot_GSK, _, _ = placed([[1, 0], [0, 1], [0, 1]], np.full((3, 2), 0.5), 2, SlotRule(2, "probability"))
    np.testing.assert_array_equal(slot_GSK[0], [[0, -1], [0, 1], [1, -1]])


def test_empty_slots_and_tokens_without_an_expert():
    slot_GSK, gate_GSK, token_GEC = placed([[-1], [2], [-1], [2]], [[0.0], [1.0], [0.0], [0.5]], 4, SlotRule(3))
    np.testing.assert_array_equal(slot_GSK[0, :, 0], [-1, 0, -1, 1])
    np.testing.assert_array_equal(token_GEC[0], [[-1] * 3, [-1] * 3, [1, 3, -1], [-1] * 3])
    np.testing.assert_array_equal(gate_GSK[0, :, 0], [0, 1, 0, 0.5])


# DeepSpeed's test of its top-k gate: k = 2, two slots per expert, triples (token, expert, slot). There slots are
# numbered by token among the kept, here by priority, so that only `token` gives the same numbers.
DEEPSPEED = np.array([[0.11, 0.2, 0.1, 0.3], [0.3, 0.4, 0.11, 0.1], [0.11, 0.1, 0.6, 0.5], [0.1, 0.11, 0.7, 0.8]])


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        ("probability", {(0, 1, 0), (1, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 0), (3, 2, 1), (3, 3, 1)}),
        ("token", {(0, 1, 0), (0, 3, 0), (1, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 1), (3, 2, 1)}),
    ],
)
def test_deepspeed_drops_the_same(priority, expected):
    gate_SE = np.exp(DEEPSPEED) / np.exp(DEEPSPEED).sum(-1, keepdims=True)
    expert_SK = np.argsort(-gate_SE, axis=-1)[:, :2]
    slot_GSK, _, _ = placed(expert_SK, np.take_along_axis(gate_SE, expert_SK, 1), 4, SlotRule(2, priority))
    kept = {
        (s, int(expert_SK[s, k]), int(slot_GSK[0, s, k])) for s in range(4) for k in range(2) if slot_GSK[0, s, k] >= 0
    }
    if priority != "token":
        ranks: dict[int, int] = {}
        relabelled = set()
        for token, expert, _ in sorted(kept):
            relabelled.add((token, expert, ranks.get(expert, 0)))
            ranks[expert] = ranks.get(expert, 0) + 1
        kept = relabelled
    assert kept == expected


def loop(expert_SK, gate_SK, num_experts: int, rule: SlotRule, order_S):
    """Slots by a literal queue."""
    size, top_k = expert_SK.shape
    queue = [(s, k) for s in range(size) for k in range(top_k)]
    if rule.priority == "random":
        queue.sort(key=lambda item: order_S[item[0]])
    if rule.priority not in ("token", "random"):
        queue = [(s, k) for k in range(top_k) for s in range(size)]
    if rule.priority == "probability":
        queue.sort(key=lambda item: -gate_SK[item])
    if rule.priority == "batch":
        queue.sort(key=lambda item: (item[1], -max(gate_SK[item[0]])))
    slot_SK, waiting = np.full((size, top_k), -1), [0] * num_experts
    for s, k in queue:
        expert = expert_SK[s, k]
        if expert >= 0:
            if waiting[expert] < rule.capacity:
                slot_SK[s, k] = waiting[expert]
            waiting[expert] += 1
    return slot_SK


GROUPS, SIZE, TOP_K, EXPERTS = 2, 6, 3, 4


@st.composite
def decisions(draw):
    """Distinct experts per token, some left out, and gates and an order with many ties."""
    order = st.permutations(range(EXPERTS)).map(lambda p: p[:TOP_K])
    expert = np.array([[draw(order) for _ in range(SIZE)] for _ in range(GROUPS)])
    shape = (GROUPS, SIZE, TOP_K)
    used = np.array(draw(st.lists(st.booleans(), min_size=36, max_size=36))).reshape(shape)
    gate = np.array(draw(st.lists(st.sampled_from([0.1, 0.25, 0.5]), min_size=36, max_size=36))).reshape(shape)
    order = draw(st.lists(st.sampled_from([0.0, 0.3, 0.7]), min_size=12, max_size=12))
    return (
        np.where(used, expert, -1),
        np.where(used, gate, 0).astype(np.float32),
        np.array(order).reshape(GROUPS, SIZE),
    )


@pytest.mark.parametrize("priority", PRIORITIES)
@hypothesis.given(decision=decisions(), slots=st.sampled_from([1, 2, 6]))
def test_place_equals_the_loop(priority, decision, slots):
    expert, gate, order = decision
    rule = SlotRule(slots, priority)
    slot_GSK, gate_GSK, token_GEC = placed(expert, gate, EXPERTS, rule, order)
    for group in range(GROUPS):
        np.testing.assert_array_equal(slot_GSK[group], loop(expert[group], gate[group], EXPERTS, rule, order[group]))
    assert token_GEC.shape == (GROUPS, EXPERTS, slots)
    for g, s, k in zip(*np.nonzero(slot_GSK >= 0), strict=True):
        assert token_GEC[g, expert[g, s, k], slot_GSK[g, s, k]] == s
    assert (token_GEC >= 0).sum() == (slot_GSK >= 0).sum()
    wanted = np.sum(expert[..., None] == np.arange(EXPERTS), axis=(1, 2))
    np.testing.assert_array_equal((token_GEC >= 0).sum(-1), np.minimum(wanted, slots))
    np.testing.assert_array_equal(gate_GSK, np.where(slot_GSK >= 0, gate, 0))


def test_the_gate_is_differentiable_and_the_order_is_not():
    expert, gate = jnp.asarray([EXPERT_SK]), jnp.asarray([GATE_SK])

    def total(gate, priority):
        return jnp.sum(place(TokenChoice(expert, gate), 3, SlotRule(2, priority)).gate_GSK)

    for priority in PRIORITIES:
        slot_GSK, _, _ = placed(EXPERT_SK, GATE_SK, 3, SlotRule(2, priority))
        np.testing.assert_array_equal(jax.grad(total)(gate, priority), (slot_GSK >= 0).astype(np.float32))
