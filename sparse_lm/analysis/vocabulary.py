"""The tokens that are most characteristic of an expert, and where it sees them."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from sparse_lm.analysis.classes import context, token_name
from sparse_lm.analysis.information import count_pairs, lift
from sparse_lm.analysis.observe import Tokens
from sparse_lm.data.tokenizers import Tokenizer

LEAST, WORDS, EXAMPLES = 5, 8, 3


@dataclasses.dataclass(frozen=True)
class Word:
    """A token of an expert. count: assignments of it to the expert. lift: p(token | expert) / p(token)."""

    token: int
    name: str
    count: int
    lift: float


@dataclasses.dataclass(frozen=True)
class ExpertWords:
    """assignments: of the expert, in all. words: the highest lift first. examples: texts with the token marked."""

    assignments: int
    words: tuple[Word, ...]
    examples: tuple[str, ...]


def characteristic(
    counts_EV: Int[np.ndarray, "E V"], tokenizer: Tokenizer, least: int = LEAST, most: int = WORDS
) -> tuple[tuple[Word, ...], ...]:
    """For every expert the tokens of the highest lift, of those that it has at least `least` times.

    Only tokens that it has more often than others do (a lift above 1). A lift of few counts is mostly luck; the
    threshold leaves the worst of that out. Ties: the more frequent, then the lower id.
    """
    lift_EV = lift(counts_EV)
    found = []
    for counts_V, lift_V in zip(counts_EV, lift_EV, strict=True):
        there = np.flatnonzero((counts_V >= max(1, least)) & (lift_V > 1))
        best = there[np.lexsort((there, -counts_V[there], -lift_V[there]))][:most]
        found.append(
            tuple(Word(int(v), token_name(tokenizer, int(v)), int(counts_V[v]), float(lift_V[v])) for v in best)
        )
    return tuple(found)


def vocabulary(
    tokens: Tokens,
    expert_MK: Int[np.ndarray, "M K"],
    gate_MK: Float[np.ndarray, "M K"],
    num_experts: int,
    tokenizer: Tokenizer,
) -> tuple[ExpertWords, ...]:
    """The words of every expert of a layer, and for the first of them the place where its gate is highest."""
    size = max(tokenizer.vocab_size, int(tokens.id_M.max(initial=0)) + 1)
    counts_EV = count_pairs(expert_MK, tokens.id_M, num_experts, size)
    words = characteristic(counts_EV, tokenizer)
    starts = np.flatnonzero(np.diff(tokens.part_M, prepend=-1))
    ends = np.append(starts[1:], len(tokens.part_M))
    found = []
    for expert in range(num_experts):
        gate_M = np.max(np.where(expert_MK == expert, gate_MK, -1.0), axis=1)
        examples = []
        for word in words[expert][:EXAMPLES]:
            at = int(np.argmax(np.where(tokens.id_M == word.token, gate_M, -1.0)))
            part = tokens.part_M[at]
            examples.append(context(tokenizer, tokens.id_M, at, (int(starts[part]), int(ends[part]))))
        found.append(ExpertWords(int(counts_EV[expert].sum()), words[expert], tuple(examples)))
    return tuple(found)
