"""Attention with experts by loops over tokens, heads and choices, in float64 numpy. Slow and obvious.

A problem is one batch: `x` [B][L][D], `segments` (0 is padding), `positions`, and weights by the names of the package.
"""

from __future__ import annotations

import numpy as np

ROPE_BASE = 100.0


def softmax(values):
    exp = np.exp(np.asarray(values) - np.max(values))
    return exp / exp.sum()


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values)))


def best(scores, k):
    """The k highest, highest first."""
    return np.argsort(-np.asarray(scores), kind="stable")[:k]


def rotated(vector, position):
    """Pairs (i, i + half) turned by position * base^(-i / half)."""
    half = len(vector) // 2
    result = np.empty_like(vector)
    for i in range(half):
        angle = position * ROPE_BASE ** (-i / half)
        a, b = vector[i], vector[i + half]
        result[i], result[i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return result


def seen_from(segments, i):
    """The tokens that token i looks at: of its document, not later."""
    return [j for j in range(i + 1) if segments[j] == segments[i] and segments[j] > 0]


def attended(query, keys, values):
    """One head's mix of values."""
    weights = softmax([query @ key / np.sqrt(len(query)) for key in keys])
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def mixture(weights, x, segments, positions, top_k):
    """Softmax over the chosen logits as gates; returns the result, and experts and gates of each real token."""
    y, choices = np.zeros_like(x), {}
    heads, kv_heads = weights["query_EDHI"].shape[2], weights["key_DJI"].shape[1]
    for b, row in enumerate(x):
        for i, token in enumerate(row):
            if segments[b][i] == 0:
                continue
            logits = token @ weights["weight_DE"]
            chosen = best(logits, top_k)
            gates = softmax(logits[chosen])
            choices[b, i] = chosen, gates
            seen = seen_from(segments[b], i)
            for expert, gate in zip(chosen, gates, strict=True):
                for h in range(heads):
                    j = h // (heads // kv_heads)
                    query = rotated(token @ weights["query_EDHI"][expert][:, h], positions[b][i])
                    keys = [rotated(row[t] @ weights["key_DJI"][:, j], positions[b][t]) for t in seen]
                    values = [row[t] @ weights["value_DJI"][:, j] for t in seen]
                    y[b, i] += gate * attended(query, keys, values) @ weights["out_EHID"][expert][h]
    return y, choices


def switch_head(weights, x, segments, positions, top_k):
    """Returns the result, and per real token and head the experts of its value and of its output."""
    y, choices = np.zeros_like(x), {}
    experts, _, heads, _ = weights["value_EDHI"].shape

    def routed(token, side, h):
        scores = sigmoid(token @ weights[f"{side}_weight_DE"][:, h * experts : (h + 1) * experts])
        return best(scores, top_k), scores

    for b, row in enumerate(x):
        for i, token in enumerate(row):
            if segments[b][i] == 0:
                continue
            seen = seen_from(segments[b], i)
            for h in range(heads):
                values = []
                for t in seen:
                    chosen, scores = routed(row[t], "value", h)
                    values.append(sum(scores[e] * (row[t] @ weights["value_EDHI"][e][:, h]) for e in chosen))
                query = rotated(token @ weights["query_DHI"][:, h], positions[b][i])
                keys = [rotated(row[t] @ weights["key_DHI"][:, h], positions[b][t]) for t in seen]
                mixed = attended(query, keys, values)
                chosen, scores = routed(token, "out", h)
                for e in chosen:
                    y[b, i] += scores[e] * mixed @ weights["out_EHID"][e][h]
                choices[b, i, h] = routed(token, "value", h)[0], chosen
    return y, choices
