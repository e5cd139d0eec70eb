"""The oracle of SparseMixer, in evaluation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle_choice import Choice, Group, RouterOracle, Smooth, log_sum_exp, softmax


def near(logits_E, left: list[int], jitter: float) -> list[int]:
    """The experts left whose logit is relatively close to the best."""
    best = max(logits_E[expert] for expert in left)
    return [expert for expert in left if not (best - logits_E[expert]) / max(abs(logits_E[expert]), best) > 2 * jitter]


def choose(logits_E, jitter: float, top_k: int):
    """(expert, those it was compared with) for each choice."""
    left, chosen = list(range(len(logits_E))), []
    for _ in range(top_k):
        rivals = near(logits_E, left, jitter)
        best = max(rivals, key=lambda expert: logits_E[expert])
        chosen.append((best, rivals))
        left.remove(best)
    return chosen


def decide(problem, group: Group) -> Choice:
    """See `RouterOracle`."""
    assert not problem.training
    logits_SE = group.x_SD @ problem.weights["weight_DE"]
    best, gates = [], []
    for logits_E in logits_SE:
        chosen = choose(logits_E, problem.config.router.jitter, problem.config.top_k)
        best.append([expert for expert, _ in chosen])
        gates.append([softmax(list(logits_E[rivals]))[rivals.index(expert)] for expert, rivals in chosen])
    return Choice(
        candidate_SK=np.array(best),
        gate_SK=np.array(gates),
        used_SK=np.ones((len(best), problem.config.top_k), bool),
        probability_SE=np.array([softmax(list(logits_E)) for logits_E in logits_SE]),
        logsumexp_S=np.array([log_sum_exp(logits_E) for logits_E in logits_SE]),
    )


def smooth(problem, weights, x_TD, candidate_TK) -> Smooth:
    """See `RouterOracle`; who is compared with whom is held fixed as well."""
    fixed_TE = problem.x_BLD.reshape(-1, problem.x_BLD.shape[-1]) @ problem.weights["weight_DE"]
    rival_TKE = np.zeros((*candidate_TK.shape, fixed_TE.shape[1]), bool)
    for token, logits_E in enumerate(fixed_TE):
        chosen = choose(logits_E, problem.config.router.jitter, problem.config.top_k)
        for k, (_, rivals) in enumerate(chosen):
            rival_TKE[token, k, rivals] = True
    powers_TE = jnp.exp(x_TD @ weights["weight_DE"])
    of_rivals_TK = jnp.sum(jnp.where(jnp.asarray(rival_TKE), powers_TE[:, None, :], 0.0), axis=-1)
    gate_TK = jnp.take_along_axis(powers_TE, jnp.asarray(candidate_TK), axis=1) / of_rivals_TK
    return Smooth(gate_TK, powers_TE / powers_TE.sum(-1, keepdims=True), jnp.log(powers_TE.sum(-1)))


ORACLE = RouterOracle(decide, smooth)
