"""A block that tokens may skip, in float64, one token at a time: what `sparse_lm.models.depth` is compared with.

It shares no code with the package: RMSNorm, rotary grouped-query attention, a SwiGLU layer, all as loops over tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

ROPE_BASE, EPSILON = 10_000.0, 1e-6


@dataclasses.dataclass(frozen=True)
class Problem:
    """weights: by the end of their names. slots: C, or None in evaluation."""

    weights: Mapping[str, np.ndarray]
    x_BLD: np.ndarray
    segments_BL: np.ndarray
    positions_BL: np.ndarray
    slots: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What comes out, who was chosen, whom the predictor picks, and the sum of its cross-entropy."""

    y_BLD: np.ndarray
    chosen_BL: np.ndarray
    says_BL: np.ndarray
    nats: float


def _norm(x_D, scale_D):
    return x_D / np.sqrt(np.mean(x_D**2) + EPSILON) * scale_D


def _turned(x_I, position):
    half = len(x_I) // 2
    out = np.empty_like(x_I)
    for i in range(half):
        angle = position * ROPE_BASE ** (-i / half)
        out[i] = x_I[i] * np.cos(angle) - x_I[i + half] * np.sin(angle)
        out[i + half] = x_I[i + half] * np.cos(angle) + x_I[i] * np.sin(angle)
    return out


def _attended(weights, normed, place, others, positions):
    """Attention of the token at `place` to the tokens at `others` of its row."""
    query_DHI, key_DJI, value_DJI = (weights[f"attention/{name}"] for name in ("query_DHI", "key_DJI", "value_DJI"))
    heads, width = query_DHI.shape[1:]
    result = 0.0
    for head in range(heads):
        shared = head * key_DJI.shape[1] // heads
        query = _turned(normed[place] @ query_DHI[:, head], positions[place])
        keys = [_turned(normed[other] @ key_DJI[:, shared], positions[other]) for other in others]
        scores = np.array([query @ key for key in keys]) / np.sqrt(width)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        mixed = sum(share * (normed[other] @ value_DJI[:, shared]) for share, other in zip(shares, others, strict=True))
        result = result + mixed @ weights["attention/out_HID"][head]
    return result


def _fed_forward(weights, x_D):
    up, gate = (x_D @ weights[f"feed_forward/{name}"] for name in ("up_DF", "gate_DF"))
    return (gate / (1 + np.exp(-gate)) * up) @ weights["feed_forward/down_FD"]


def _logit(weights, x_D, router_weight):
    if "predictor/up_DF" not in weights:
        return router_weight
    hidden = _norm(x_D, 1.0) @ weights["predictor/up_DF"] + weights["predictor/bias_F"]
    return np.maximum(hidden, 0) @ weights["predictor/down_F"]


def block(problem: Problem, training: bool) -> Answer:
    """The literal program."""
    weights, x_BLD, segments_BL = problem.weights, problem.x_BLD, problem.segments_BL
    y_BLD, nats = x_BLD.copy(), 0.0
    chosen_BL, says_BL = np.zeros(segments_BL.shape, bool), np.zeros(segments_BL.shape, bool)
    for row, (x_LD, segments, positions) in enumerate(zip(x_BLD, segments_BL, problem.positions_BL, strict=True)):
        real = [place for place in range(len(x_LD)) if segments[place] > 0]
        router = {place: float(x_LD[place] @ weights["weight_D"]) for place in real}
        for place in sorted(real, key=lambda place: (-router[place], place))[: problem.slots]:
            chosen_BL[row, place] = True
        for place in real:
            logit = _logit(weights, x_LD[place], router[place])
            says_BL[row, place] = logit > 0
            nats += np.log1p(np.exp(-logit if chosen_BL[row, place] else logit))
        taking_part = [place for place in real if (chosen_BL if training else says_BL)[row, place]]
        normed = {place: _norm(x_LD[place], weights["attention_norm/scale_D"]) for place in taking_part}
        for place in taking_part:
            others = [other for other in taking_part if other <= place and segments[other] == segments[place]]
            middle = x_LD[place] + _attended(weights, normed, place, others, positions)
            end = middle + _fed_forward(weights, _norm(middle, weights["feed_forward_norm/scale_D"]))
            y_BLD[row, place] = x_LD[place] + router[place] * (end - x_LD[place])
    return Answer(y_BLD, chosen_BL, says_BL, nats)
