"""What every dispatcher shares: the only `shard_map` of the model, and how experts meet tokens in it.

A dispatcher takes tokens to experts and back. On a mesh one of the two has to move:

- `weights` move: each device gathers all experts and keeps its tokens (like FSDP along E);
- `tokens` move: each device keeps its experts, and an all-to-all over the `expert` axis exchanges the slots.

Everything inside is local to a device: plain arrays, G the local groups, no sharding in sight.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.config import ConfigError
from sparse_lm.mesh import manual_axis_size, platform, sum_over
from sparse_lm.moe.dispatch.replicas import own_experts, place
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.grouped import Grouped, Kernel, kernel_of
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import Decision, TokenChoice
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Dispatcher(abc.ABC):
    """Takes tokens to their experts and back: `(experts, x_GSD, decision, key) -> (y_GSD, kept_GSK)`; no weights.

    grouped: the kernel of those that have no capacity, see `moe.grouped`.
    exchange_chunks: into how many parts those that move tokens cut an exchange, see `in_chunks`.
    hot_copies: how many of the most loaded experts every device gets a copy of, see `dispatch.hot`.
    exchange_room: rows that a device computes at a time without a capacity, over its even share.
    """

    slots: SlotRule
    rules: Rules
    grouped: Grouped = "auto"
    exchange_chunks: int = 1
    hot_copies: int = 0
    exchange_room: float = 2.0

    @abc.abstractmethod
    def local(
        self, experts: Experts, x_GSD: jax.Array, decision: TokenChoice, ids_GS: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """One device's share. ids_GS: the number of each token in the whole batch. Returns float32 y and kept."""

    moves_tokens: ClassVar[bool] = False
    has_capacity: ClassVar[bool] = True

    @property
    def kernel(self) -> Kernel:
        """The kernel for grouped products. Raises `ConfigError` where it cannot run on the devices in use."""
        return kernel_of(self.grouped, platform())

    def __call__(
        self, experts: Experts, x_GSD: Float[Array, "G S D"], decision: Decision, key: jax.Array | None = None
    ) -> tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]:
        """Each token's gated sum over its experts, in the dtype of x, and which assignments were kept.

        The gated sum is taken in float32. key: None is evaluation, without expert dropout. Raises `ConfigError` where
        the mesh can cut the experts evenly neither along E nor along F.
        """
        specs = self._stored(experts)
        groups, size = x_GSD.shape[:2]
        ids_GS = self.rules.constrain(jnp.arange(groups * size, dtype=jnp.int32).reshape(groups, size), "GS")
        keep = ("expert",) if self.moves_tokens else ()

        def body(experts, tokens, key):
            x_GSD, decision, ids_GS = tokens
            if self.moves_tokens:
                experts = own_experts(experts, specs, x_GSD.dtype)
            experts = self.rules.gather_shards(experts, keep, x_GSD.dtype, specs)
            y_GSD, kept_GSK = self.local(experts, x_GSD, decision, ids_GS, key)
            # A shard of F gave a partial sum; the combination is linear, so the sum is taken once, at its narrowest.
            return sum_over(y_GSD, "model").astype(x_GSD.dtype), kept_GSK

        checked = self.has_capacity or self.kernel.checked
        return self.rules.per_device(body, experts, (x_GSD, decision, ids_GS), key, checked)

    def _stored(self, experts: Experts):
        """How the experts lie on the mesh that is set."""
        devices, ways = manual_axis_size("expert"), manual_axis_size("expert") * manual_axis_size("model")
        if experts.num_experts % devices and experts.d_hidden % ways:
            raise ConfigError(
                "model.moe.num_experts",
                experts.num_experts,
                f"mesh.expert={devices} does not divide it, nor mesh.expert x mesh.model={ways} the experts' hidden "
                f"width {experts.d_hidden}; use a multiple in one of them, or fewer devices along mesh.expert",
            )
        return self.rules.parameter_specs(experts, jax.sharding.get_abstract_mesh())


def apply_experts(experts: Experts, x_ERD: jax.Array, ids_ER: jax.Array | None, key: jax.Array | None) -> jax.Array:
    """Experts on their rows, with the row numbers that seed expert dropout: token * E + expert.

    ids_ER: the token in each row (any number for an empty row), or None when nothing is dropped.
    """
    if ids_ER is None or key is None or experts.dropout_rate == 0:
        return experts(x_ERD)
    local = ids_ER.shape[0]
    first = place(experts.num_experts // local) * local
    expert_E1 = first + jnp.arange(local, dtype=jnp.int32)[:, None]
    return experts(x_ERD, ids_ER * experts.num_experts + expert_E1, key)


def in_chunks(body: Callable, inputs, chunks: int):
    """`body(inputs)` chunk by chunk along the second axis of all arrays, results side by side again.

    No chunk waits for another, so that the compiler can exchange the next one while the experts are at this one, and
    the same backwards: software pipelining by the scheduler. Unrolled, since it does not look past the end of a loop's
    iteration. Chunks are at most as many as there are rows, and differ by a row where they do not come out even.
    """
    length = jax.tree.leaves(inputs)[0].shape[1]
    chunks = min(chunks, length)
    if chunks == 1:
        return body(inputs)
    ends = [length * i // chunks for i in range(chunks + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(ends)]
    leaves, treedef = jax.tree.flatten(inputs)
    cut = zip(*(jax.lax.split(leaf, sizes, axis=1) for leaf in leaves), strict=True)
    results = [body(jax.tree.unflatten(treedef, part)) for part in cut]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results)
