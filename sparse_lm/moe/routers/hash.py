"""Routing by token id, without weights: hash layers."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import Router, RouterConfig, RouterShape, RouterState
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Hash(RouterConfig):
    """Options of hash routing (Roller et al. 2021): the expert is a fixed function of the token id; nothing is learned.

    mode: `random` (each id gets the k experts with the highest hash of (id, expert), so that they are distinct and no
        vocabulary size is needed; every layer has a hash of its own, whose seed is drawn from the layer's key and kept
        in checkpoints), `bigram` (the same of the id and the one before it in the same document; convention: a
        document's first token is hashed alone, as under `random`), or `balanced` (ids, most frequent first, go to the
        k experts with the least load so far: the paper's balanced assignment; the same table in every layer).
    frequencies: for `balanced`, how often each id occurs, from id 0 on, in any unit; ids beyond are hashed.
        `sparse_lm.data.counts.token_counts` counts those of the training rows.
    gate: `one` (with k > 1 the experts' outputs add up, as in the paper's MultiHash, whose slices of one feed-forward
        layer are experts of width d_ff / k here), or `mean` (1 / k each).
    The paper's own layers drop nothing: both capacity factors None. The balance losses have no gradient here
    and weigh nothing; the probabilities in the statistics are 1 / k on the chosen experts.
    """

    kind = "hash"
    learned = False

    mode: Literal["random", "bigram", "balanced"] = "random"
    frequencies: tuple[float, ...] = option(())
    gate: Literal["one", "mean"] = "one"

    def check(self) -> None:
        """Raises `ConfigError` when frequencies are missing, of no use, or no frequencies."""
        if (self.mode == "balanced") != bool(self.frequencies):
            raise ConfigError(
                "frequencies",
                self.frequencies,
                "mode=balanced needs the frequency of every token id, and no other mode reads them; "
                "give them with mode=balanced, or use mode=random without them",
            )
        for i, frequency in enumerate(self.frequencies):
            if frequency < 0:
                raise ConfigError(f"frequencies[{i}]", frequency, "must be at least 0; give counts of token ids")

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return HashRouter(key, self, shape, rules)


class HashRouter(Router):
    """Looks at token ids alone."""

    def __init__(self, key: jax.Array, config: Hash, shape: RouterShape, rules: Rules):
        self.config, self.shape, self.rules = config, shape, rules
        self.seed = RouterState(jax.random.bits(key, (), jnp.uint32))

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        num_experts, top_k = self.shape.num_experts, self.shape.top_k
        ids_GS = inputs.ids_GS
        if self.config.mode == "bigram" and inputs.previous_GS is not None:
            ids_GS = bigrams(inputs.previous_GS, ids_GS)
        expert_GSK = hashed_experts(ids_GS, self.seed[...], num_experts, top_k)
        if self.config.mode == "balanced":
            table_VK = balanced_table(self.config.frequencies, num_experts, top_k)
            known_GS = inputs.ids_GS < len(table_VK)
            listed_GS = jnp.where(known_GS, inputs.ids_GS, 0)
            listed_GSK = self.rules.take_rows(jnp.asarray(table_VK), listed_GS, "GSK")
            expert_GSK = jnp.where(known_GS[..., None], listed_GSK, expert_GSK)
        probability_GSE = jnp.mean(jax.nn.one_hot(expert_GSK, num_experts, dtype=jnp.float32), axis=2)
        real_GS1 = inputs.mask_GS[..., None]
        gate = 1.0 if self.config.gate == "one" else 1.0 / top_k
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, jnp.full_like(expert_GSK, gate, jnp.float32), 0.0),
        )
        return decision, Scores(probability_GSE, jnp.zeros_like(probability_GSE[..., 0]))


def hashed_experts(ids_GS: Integer[Array, "G S"], seed: jax.Array, num_experts: int, top_k: int) -> Int[Array, "G S K"]:
    """The k experts with the highest hash of (seed, id, expert): distinct, and for random ids all equally likely.

    Convention of rendezvous hashing (Thaler and Ravishankar 1998): with more experts an id either keeps its expert or
    moves to a new one.
    """
    id_GS1 = _mix(ids_GS.astype(jnp.uint32) + seed)[..., None]
    expert_E = jnp.arange(1, num_experts + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    # 31 bits, since sorting signed numbers works everywhere.
    hash_GSE = (_mix(id_GS1 + expert_E) >> 1).astype(jnp.int32)
    return jax.lax.top_k(hash_GSE, top_k)[1]


def bigrams(previous_GS: Int[Array, "G S"], ids_GS: Int[Array, "G S"]) -> UInt[Array, "G S"]:
    """A 32-bit word for each pair of ids, to be hashed like an id; where previous is -1 it is the id itself.

    Two pairs share a word by chance alone, once in 2^32.
    """
    return ids_GS.astype(jnp.uint32) + _mix((previous_GS + 1).astype(jnp.uint32))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words whose every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.lru_cache(maxsize=8)
def balanced_table(frequencies: tuple[float, ...], num_experts: int, top_k: int) -> np.ndarray:
    """[V, K] experts: ids by falling frequency (ties by id) to the least loaded experts (ties by number)."""
    table_VK = np.zeros((len(frequencies), top_k), np.int32)
    loads = [(0.0, expert) for expert in range(num_experts)]
    for token in sorted(range(len(frequencies)), key=lambda token: -frequencies[token]):
        least = [heapq.heappop(loads) for _ in range(top_k)]
        table_VK[token] = [expert for _, expert in least]
        for load, expert in least:
            heapq.heappush(loads, (load + frequencies[token], expert))
    return table_VK
