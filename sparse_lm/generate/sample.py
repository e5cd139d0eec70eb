"""From logits to the next token: greedy, or drawn after temperature, top-k and nucleus filters, in this order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.config import Config, ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling(Config):
    """How the next token is chosen.

    temperature: logits are divided by it; 0 is greedy: always the most probable token, and the filters change nothing.
    top_k: only the k most probable tokens stay; None is all of them.
    top_p: only the smallest set of most probable tokens whose probability reaches p stays, at least one token
        (nucleus: Holtzman et al. 2020). It is measured after temperature and top_k; None or 1 is all of them.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raises `ConfigError` when a value is outside its range."""
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "must not be negative; 0 is greedy, 1 the model itself")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "must be at least 1; leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "must be above 0 and at most 1; leave it out to keep all tokens")


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, top-k and nucleus, -inf where a token is out; their softmax is what is drawn from.

    Of equally probable tokens the one with the lower id comes first. With temperature 0 only the first token stays.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    top_k, top_p = sampling.top_k, sampling.top_p
    if sampling.temperature == 0:
        top_k, top_p = 1, None
    else:
        logits_BV = logits_BV / sampling.temperature
    # With p = 1 nothing may go, and the rounding of a cumulative sum would cut improbable tokens.
    top_p = None if top_p == 1 else top_p
    if top_k is None and top_p is None:
        return logits_BV
    order_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if top_k is not None:
        sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    if top_p is not None:
        reached_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        before_BV = jnp.pad(reached_BV, ((0, 0), (1, 0)))[:, :-1]
        sorted_BV = jnp.where(before_BV < top_p, sorted_BV, -jnp.inf)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(sorted_BV, rank_BV, axis=-1)


def sample(logits_BV: Float[Array, "B V"], sampling: Sampling, key: jax.Array) -> Int[Array, "B"]:
    """One token per row. The noise of a row comes from the key and the row's number, whatever the batch size."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    rows = jnp.arange(logits_BV.shape[0])
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits_BV, sampling)).astype(jnp.int32)
