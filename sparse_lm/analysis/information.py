"""Mutual information between a token's experts and what kind of token it is, beside what chance alone would give."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Information:
    """bits: of mutual information per assignment, the plug-in estimate. entropy: of the labels, in bits, its bound.

    shuffled, highest: mean and maximum of the same estimate after the labels were shuffled, in `shuffles` repetitions:
    the plug-in estimate is above 0 for unrelated labels too, by about (E - 1)(C - 1) / (2 n ln 2) bits for n
    independent assignments (Miller 1955).
    """

    bits: float
    entropy: float
    shuffled: float
    highest: float
    shuffles: int

    @property
    def excess(self) -> float:
        """Bits above the mean of the shuffles."""
        return self.bits - self.shuffled

    @property
    def share(self) -> float:
        """The excess as a share of the labels' entropy: 1 is that the experts tell the label."""
        return self.excess / self.entropy if self.entropy > 0 else 0.0

    @property
    def chance(self) -> bool:
        """Whether a shuffle reached as much."""
        return self.bits <= self.highest


def count_pairs(
    expert_MK: Int[np.ndarray, "M K"], label_M: Int[np.ndarray, "M"], num_experts: int, num_labels: int
) -> Int[np.ndarray, "E C"]:
    """Assignments of every expert (rows) to tokens of every label (columns); -1 is no expert, or no label."""
    label_MK = np.broadcast_to(label_M[:, None], expert_MK.shape)
    there = (expert_MK >= 0) & (label_MK >= 0)
    flat = expert_MK[there].astype(np.int64) * num_labels + label_MK[there]
    return np.bincount(flat, minlength=num_experts * num_labels).reshape(num_experts, num_labels)


def mutual_information(counts_EC: Int[np.ndarray, "E C"]) -> float:
    """Bits of I(expert; label) = sum p(e, c) log2(p(e, c) / (p(e) p(c))) of the counts; 0 of none."""
    total = counts_EC.sum()
    if total == 0:
        return 0.0
    joint = counts_EC / total
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return max(0.0, float(np.sum(joint[there] * np.log2(joint[there] / apart[there]))))


def entropy(counts_C: Int[np.ndarray, "C"]) -> float:
    """Bits of -sum p log2 p of the counts; 0 of none."""
    share = counts_C[counts_C > 0] / max(1, counts_C.sum())
    return abs(float(np.sum(share * np.log2(share))))  # abs, as -0.0 is no entropy to show


def specialisation(
    expert_MK: Int[np.ndarray, "M K"],
    label_M: Int[np.ndarray, "M"],
    sizes: tuple[int, int],
    block_M: Int[np.ndarray, "M"] | None = None,
    shuffles: int = 20,
    seed: int = 0,
) -> Information:
    """How much the experts of a token say about its label. sizes: numbers of experts and of labels.

    A shuffle gives the labels to other tokens and leaves the experts of a token together. block_M: tokens that share a
    label because they stand together, as those of a document share its domain; then the blocks change their labels as
    wholes, since tokens of one text are alike and would make any grouping of texts look like knowledge. None is every
    token by itself. Raises `ValueError` when a block has two labels, or without shuffles.
    """
    if shuffles < 1:
        raise ValueError(f"shuffles={shuffles}: without any there is no baseline; give at least 1")
    block_M = np.arange(len(label_M)) if block_M is None else np.unique(block_M, return_inverse=True)[1]
    label_of_block = np.zeros(int(block_M.max(initial=-1)) + 1, label_M.dtype)
    label_of_block[block_M] = label_M
    if (label_of_block[block_M] != label_M).any():
        mixed = int(np.argmax(label_of_block[block_M] != label_M))
        raise ValueError(f"token {mixed} has another label than the rest of its block; labels are shuffled by block")
    rng = np.random.default_rng(seed)
    found = [
        mutual_information(count_pairs(expert_MK, rng.permutation(label_of_block)[block_M], *sizes))
        for _ in range(shuffles)
    ]
    counts = count_pairs(expert_MK, label_M, *sizes)
    return Information(
        mutual_information(counts), entropy(counts.sum(0)), math.fsum(found) / shuffles, max(found), shuffles
    )


def lift(counts_EC: Int[np.ndarray, "E C"]) -> Float[np.ndarray, "E C"]:
    """p(label | expert) / p(label): 1 is as often as everywhere. NaN where an expert or a label has no assignment."""
    total, per_expert, per_label = counts_EC.sum(), counts_EC.sum(1, keepdims=True), counts_EC.sum(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (counts_EC / per_expert) / (per_label / total)
