"""Softmax attention one query of one head at a time, in float64 numpy, and the features that it is tested with."""

from __future__ import annotations

import dataclasses

import numpy as np

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 2, 11, 4, 2, 4, 6
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3], [1] * 8 + [0] * 3], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1], list(range(11))], np.int32)


@dataclasses.dataclass(frozen=True)
class Features:
    """What is on. The names are those of `Sight.within` and `Softmax`; sinks: whether there are any."""

    window: int | None = None
    chunk: int | None = None
    sinks: bool = False
    soft_cap: float | None = None
    scale: float | None = None
    kv_heads: int = KV_HEADS


FEATURES = {
    "causal": Features(),
    "multi_head": Features(kv_heads=HEADS),
    "one_head": Features(kv_heads=1, window=2),
    "window": Features(window=3),
    "chunk": Features(chunk=3),
    "sinks": Features(sinks=True),
    "soft_cap": Features(soft_cap=1.5),
    "scale": Features(scale=1.25),
    "all": Features(window=4, chunk=3, sinks=True, soft_cap=2.0, scale=0.8),
}


def sees(features: Features, b: int, t: int, s: int, segments=SEGMENTS, positions=POSITIONS) -> bool:
    """Whether the query at place t of row b sees the key at place s."""
    if segments[b, s] == 0 or segments[b, s] != segments[b, t] or s > t:
        return False
    if features.window is not None and t - s >= features.window:
        return False
    return features.chunk is None or positions[b, s] // features.chunk == positions[b, t] // features.chunk


def operands(kv_heads: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Queries, keys, values and sinks in float64."""
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (BATCH, LENGTH, HEADS, WIDTH),
        "key": (BATCH, LENGTH, kv_heads, WIDTH),
        "value": (BATCH, LENGTH, kv_heads, VALUE_WIDTH),
        "sinks": (HEADS,),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def attention(given: dict[str, np.ndarray], features: Features) -> np.ndarray:
    """[B, L, H, W]; 0 for a query that sees nothing."""
    query, key, value = given["query"], given["key"], given["value"]
    batch, length, heads, width = query.shape
    mixed = np.zeros((batch, length, heads, value.shape[-1]))
    scale = width**-0.5 if features.scale is None else features.scale
    for b, t, h in np.ndindex(batch, length, heads):
        seen = [s for s in range(t + 1) if sees(features, b, t, s)]
        if not seen:
            continue
        j = h // (heads // key.shape[2])
        scores = key[b, seen, j] @ query[b, t, h] * scale
        if features.soft_cap is not None:
            scores = features.soft_cap * np.tanh(scores / features.soft_cap)
        total = np.sum(np.exp(scores)) + (np.exp(given["sinks"][h]) if features.sinks else 0)
        mixed[b, t, h] = np.exp(scores) / total @ value[b, seen, j]
    return mixed
