"""The laws with the coefficients of their papers, by name."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_lm.config import ConfigError, closest
from sparse_lm.scaling.laws import Chinchilla, Granularity, Joint, Law, Sparsity, Unified

LAWS: Mapping[str, type[Law]] = {law.kind: law for law in (Chinchilla, Unified, Granularity, Joint, Sparsity)}

# Section 4 and table A3 there; MassiveText, a vocabulary of 32,000.
CHINCHILLA = Chinchilla(e=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)

# Table 3 there, one for each router; MassiveText. Rounded to three digits, which moves `cutoff` by up to a factor of 3.
UNIFIED_S_BASE = Unified(a=-0.082, b=-0.108, c=0.009, d=1.104, e_start=1.847, e_max=314.478)
UNIFIED_RL_R = Unified(a=-0.083, b=-0.126, c=0.012, d=1.111, e_start=1.880, e_max=469.982)
UNIFIED_HASH = Unified(a=-0.087, b=-0.136, c=0.012, d=1.157, e_start=4.175, e_max=477.741)

# Table 1 there, the line of mixtures of experts; C4, the vocabulary of GPT-2, expansion 64.
GRANULARITY = Granularity(c=0.47, g=2.1, a=18.1, b=30.8, alpha=0.115, beta=0.147, gamma=0.58)

# Table 3 there; FineWeb-Edu, the vocabulary of GPT-2.
JOINT = Joint(
    a=35.91,
    alpha=-0.1889,
    delta=-0.2285,
    gamma=0.0098,
    b=35.98,
    beta=-0.1775,
    omega=0.5529,
    zeta=-0.0259,
    e_start=2.0732,
    e_max=290.4521,
    c=1.3637,
)

# Table 3 there; RedPajama. The authors report R^2 of 99 % on their fit and 68 % on a held-out sparsity of 98 %.
SPARSITY = Sparsity(
    a=16612.50,
    b=5455.67,
    c=0.4598,
    d=17.26,
    e=0.94,
    alpha=0.5962,
    beta=0.3954,
    lam=-0.1666,
    delta=0.1603,
    gamma=0.1595,
)

PUBLISHED: Mapping[str, Law] = {
    "chinchilla": CHINCHILLA,
    "unified": UNIFIED_S_BASE,
    "unified_rl_r": UNIFIED_RL_R,
    "unified_hash": UNIFIED_HASH,
    "granularity": GRANULARITY,
    "joint": JOINT,
    "sparsity": SPARSITY,
}


def published(name: str) -> Law:
    """A published law. Raises `ConfigError` on an unknown name."""
    if name not in PUBLISHED:
        raise ConfigError("law", name, closest(name, PUBLISHED))
    return PUBLISHED[name]


def law_type(kind: str) -> type[Law]:
    """The class of a law. Raises `ConfigError` on an unknown kind."""
    if kind not in LAWS:
        raise ConfigError("law", kind, closest(kind, LAWS))
    return LAWS[kind]
