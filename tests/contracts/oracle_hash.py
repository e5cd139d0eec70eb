"""The oracle of hash routing: whole numbers of Python, one id at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth

from sparse_lm.moe.routers.hash import Hash

WORD = 2**32


def mixed(word: int) -> int:
    """The 32-bit mixing function."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) % WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) % WORD
    return word ^ (word >> 16)


def hashed(token: int, seed: int, num_experts: int, top_k: int) -> list[int]:
    """The experts with the highest hash of (seed, id, expert), ties to the lower number."""
    start = mixed((token + seed) % WORD)
    height = [mixed((start + (expert + 1) * 0x9E3779B9) % WORD) // 2 for expert in range(num_experts)]
    return sorted(range(num_experts), key=lambda expert: -height[expert])[:top_k]


def listed(frequencies, num_experts: int, top_k: int) -> dict[int, list[int]]:
    """Ids by falling frequency to the least loaded experts."""
    load, table = [0.0] * num_experts, {}
    for token in sorted(range(len(frequencies)), key=lambda token: (-frequencies[token], token)):
        table[token] = sorted(range(num_experts), key=lambda expert: (load[expert], expert))[:top_k]
        for expert in table[token]:
            load[expert] += frequencies[token]
    return table


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`."""
    config, router = problem.config, problem.config.router
    assert isinstance(router, Hash)
    num_experts, top_k = config.num_experts, config.top_k
    table = listed(router.frequencies, num_experts, top_k)
    seed = int(problem.state["seed"])
    words = [int(token) for token in group.ids_S]
    if router.mode == "bigram":
        words = [word + mixed(int(before) + 1) for before, word in zip(group.previous_S, words, strict=True)]
    candidate_SK = np.array([table.get(word) or hashed(word, seed, num_experts, top_k) for word in words])
    probability_SE = np.zeros((len(candidate_SK), num_experts))
    np.put_along_axis(probability_SE, candidate_SK, 1 / top_k, axis=1)
    return Choice(
        candidate_SK=candidate_SK,
        gate_SK=np.full(candidate_SK.shape, _gate(router, top_k)),
        used_SK=np.ones(candidate_SK.shape, bool),
        probability_SE=probability_SE,
        logsumexp_S=np.zeros(len(candidate_SK)),
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`; nothing depends on weights."""
    num_experts, top_k = problem.config.num_experts, candidate_TK.shape[1]
    chosen_TKE = jnp.asarray(candidate_TK)[..., None] == jnp.arange(num_experts)
    gate_TK = jnp.full(candidate_TK.shape, _gate(problem.config.router, top_k), x_TD.dtype)
    return Smooth(gate_TK, jnp.mean(chosen_TKE.astype(x_TD.dtype), axis=1), jnp.zeros(len(x_TD), x_TD.dtype))


def _gate(router: Hash, top_k: int) -> float:
    return {"one": 1.0, "mean": 1.0 / top_k}[router.gate]


ORACLE = RouterOracle(decide, smooth)
