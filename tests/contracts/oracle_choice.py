"""What the oracle asks of every kind of router, in float64: the decisions of one group, and their gates once more as a
function that can be differentiated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
    """What a router sees of one group. ids_S: token ids. slots: per expert. previous_S: ids before, -1 for none.
    carried_SE: logits of the layer before."""

    x_SD: np.ndarray
    mask_S: np.ndarray
    ids_S: np.ndarray
    previous_S: np.ndarray
    carried_SE: np.ndarray
    slots: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """Decisions of one group. candidate_SK: experts that were considered; used_SK: and chosen (padding is left to the
    caller). gate_SK: before any drop. penalty: summed over the group's real tokens."""

    candidate_SK: np.ndarray
    gate_SK: np.ndarray
    used_SK: np.ndarray
    probability_SE: np.ndarray
    logsumexp_S: np.ndarray
    penalty: float = 0.0


@dataclasses.dataclass(frozen=True)
class Smooth:
    """The same of all tokens, as jax arrays, with the decisions held fixed. gate_TK: of the candidates."""

    gate_TK: Any
    probability_TE: Any
    logsumexp_T: Any
    penalty: Any = 0.0


@dataclasses.dataclass(frozen=True)
class RouterOracle:
    """decide: (problem, group) -> choice, a literal program. smooth: (problem, weights, x_TD, candidate_TK) -> smooth,
    for jax in float64. output: (problem, weights, x_SD, mask_S, expert) -> y_SD, for jax, where experts see no single
    tokens."""

    decide: Callable[[Any, Group], Choice]
    smooth: Callable[[Any, Any, Any, np.ndarray], Smooth]
    output: Callable[..., Any] | None = None


def softmax(values):
    """exp(v) / sum exp(v)."""
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def log_sum_exp(values) -> float:
    """log sum exp(v), of moderate values."""
    return math.log(sum(math.exp(value) for value in values))
