"""Copies of the most loaded experts on every device, chosen anew in every step: their tokens stay where they are.

Source: He et al. 2022 (FasterMoE), dynamic shadowing. There a model of costs says how many; here the number is fixed,
as compiled programs want it. Weights are stored once. The gradients of the copies are summed on the way back, so that
results are those without copies.

Copies bound how uneven the work can be: where every device has m experts and copies of the H most loaded, at most
m / (m + H) of all rows go to the m of one device, since each of the H has at least as many as any of them.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_lm.config import ConfigError
from sparse_lm.mesh import manual_axis_size, varying
from sparse_lm.moe.dispatch.dropless import loads
from sparse_lm.moe.dispatch.replicas import place, sharers
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.types import TokenChoice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hot:
    """The experts of which every device has a copy, the same on all of them.

    Each device computes `each` experts, its own and then the copies; they are numbered one device after the other.
    """

    expert_H: Int[Array, "H"]
    num_experts: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, decision: TokenChoice, num_experts: int, copies: int) -> Hot:
        """The most loaded ones; none where a device has all experts. decision: for the tokens of this device.

        Raises what `sharing` does.
        """
        if sharing(num_experts, copies) == 1 or not copies:
            return cls(jnp.zeros((0,), jnp.int32), num_experts)
        count_E = jax.lax.psum(loads(decision, num_experts), "expert")
        return cls(jax.lax.top_k(count_E, copies)[1].astype(jnp.int32), num_experts)

    @property
    def devices(self) -> int:
        """Those that share the experts."""
        return sharers(self.num_experts)

    @property
    def own(self) -> int:
        """Experts that a device has without copies."""
        return self.num_experts // self.devices

    @property
    def each(self) -> int:
        """Experts that a device computes."""
        return self.own + self.expert_H.size

    def numbered(self) -> Int[Array, "E"]:
        """Which of all experts each one is that this device computes."""
        own = place(self.devices) * self.own + jnp.arange(self.own, dtype=jnp.int32)
        return jnp.concatenate([own, self.expert_H])

    def renumbered(self, decision: TokenChoice) -> TokenChoice:
        """The decision in numbers of the experts that devices compute: this one's copy where there is one."""
        if not self.expert_H.size:
            return decision
        expert_GSK, first = decision.expert_GSK, place(self.devices) * self.each + self.own
        away_GSK = expert_GSK // self.own * self.each + expert_GSK % self.own
        is_GSKH = expert_GSK[..., None] == self.expert_H
        new_GSK = jnp.where(jnp.any(is_GSKH, axis=-1), first + jnp.argmax(is_GSKH, axis=-1), away_GSK)
        return dataclasses.replace(decision, expert_GSK=jnp.where(expert_GSK < 0, -1, new_GSK).astype(jnp.int32))

    def with_copies(self, experts: Experts) -> Experts:
        """This device's experts with the copies behind them: each comes from where it is, by one all-reduce."""
        if not self.expert_H.size:
            return experts
        here_H = self.expert_H // self.own == place(self.devices)

        def extended(leaf):
            picked = leaf[self.expert_H % self.own]
            picked = jnp.where(here_H.reshape(-1, *(1,) * (leaf.ndim - 1)), picked, jnp.zeros((), leaf.dtype))
            return jnp.concatenate([varying(leaf), varying(jax.lax.psum(picked, "expert"))])

        return jax.tree.map(extended, experts)

    def room(self, rows: int) -> int:
        """Rows that a device may have to compute, where each of those that share the experts has `rows`."""
        return int(rows * worst(self.num_experts, self.devices, self.expert_H.size))


def sharing(num_experts: int, copies: int) -> int:
    """Devices that share the experts, see `dispatch.replicas`.

    Raises `ConfigError` for copies where they cannot share them out evenly: then there are replicas of all.
    """
    devices, sharing = manual_axis_size("expert"), sharers(num_experts)
    if copies and sharing < devices:
        raise ConfigError(
            "model.moe.hot_copies",
            copies,
            f"mesh.expert={devices} does not divide the {num_experts} experts, which have replicas as it is; use 0",
        )
    return sharing


def worst(num_experts: int, devices: int, copies: int) -> Fraction:
    """What one device may have to compute at most, as a multiple of the assignments that each device has."""
    if not copies:
        return Fraction(devices)
    others = min(num_experts // devices, num_experts - copies)
    return min(Fraction(devices), Fraction(devices * others, others + copies) + 1)
