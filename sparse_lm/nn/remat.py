"""Rematerialisation by name: what the backward pass of a layer keeps, moves to the host's memory, or computes again.

Layers name what is worth keeping (`named`); an option in words becomes a policy of `jax.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from sparse_lm.config import ConfigError, closest

Tree = TypeVar("Tree")

NAMES = {
    "qkv": "queries, keys and values, before rotation",
    "attention": "what the heads see, before the projection back",
    "mlp_hidden": "products of a dense layer's input with its first matrices",
    "router": "the router's logits, decision and scores",
    "dispatch": "rows of the experts: tokens in their slots",
    "expert_hidden": "products of the experts' rows with their first matrices",
    "expert_out": "what the experts make of their rows",
    "combine": "what a token gets back from its experts",
}
WHOLE = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
KEEP, MOVE = "save", "offload"


def named(values: Tree, name: str) -> Tree:
    """The same values, under a name of `NAMES` that a policy can choose."""
    assert name in NAMES
    return checkpoint_name(values, name)


def policy(remat: str) -> Callable[..., Any] | None:
    """The policy of `jax.checkpoint` that an option says in words; None keeps everything, without `jax.checkpoint`.

    remat: `none`, `full`, `dots`, or `save:NAME,NAME`, `offload:NAME`, or both with a + between. Everything else is
    computed again. What is offloaded waits for the backward pass in the host's pinned memory. Raises `ConfigError` on
    an unknown word or name, and on a name that stands twice.
    """
    if remat in WHOLE:
        return WHOLE[remat]
    chosen: dict[str, list[str]] = {KEEP: [], MOVE: []}
    for part in remat.split("+"):
        what, colon, names = part.partition(":")
        if what not in chosen or not colon:
            known = [*WHOLE, f"{KEEP}:NAMES", f"{MOVE}:NAMES"]
            raise ConfigError("remat", remat, closest(what, known) + ", and the last two with a + between them")
        for name in names.split(","):
            if name not in NAMES:
                raise ConfigError("remat", remat, f"no values are named {name!r}; {closest(name, NAMES)}")
            if name in chosen[KEEP] + chosen[MOVE]:
                raise ConfigError("remat", remat, f"{name!r} stands twice; name it once")
            chosen[what].append(name)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=chosen[KEEP],
        names_which_can_be_offloaded=chosen[MOVE],
        offload_src="device",
        offload_dst="pinned_host",
    )
