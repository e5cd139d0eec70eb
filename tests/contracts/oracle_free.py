"""The oracle of free experts: what they compute, what they are worth, and how many slots the others have then."""

from __future__ import annotations

from fractions import Fraction

from sparse_lm.moe.config import MoEConfig


def worths(config: MoEConfig) -> list[float]:
    """For each expert, what its load weighs in the balance loss."""
    free = config.num_zero + config.num_copy + config.num_constant
    return [1.0] * config.num_experts + [config.free_share] * free


def divisor(config: MoEConfig) -> Fraction:
    """What the slots are divided by: tau / (tau N_F + N_free) of them are those of one feed-forward expert."""
    share, free = Fraction(str(config.free_share)), config.num_zero + config.num_copy + config.num_constant
    return (share * config.num_experts + free) / share


def expert(config: MoEConfig, weights, number: int, x, xp):
    """Free expert `number`, counted from 0, on one token or on rows of tokens."""
    if number < config.num_zero:
        return xp.zeros_like(x)
    if number < config.num_zero + config.num_copy:
        return x
    number -= config.num_zero + config.num_copy
    powers = xp.exp(x @ weights["mix_EDK"][number])
    first = powers[..., :1] / (powers[..., :1] + powers[..., 1:])
    return first * x + (1 - first) * weights["vector_ED"][number]
