"""`attend`: which implementation of attention runs, and on which arrays of which device."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Float

from sparse_lm.config import ConfigError
from sparse_lm.mesh import platform
from sparse_lm.nn.attend.chunked import chunked
from sparse_lm.nn.attend.kernels import CUDNN_WIDTHS, cudnn, splash, splash_block
from sparse_lm.nn.attend.reference import reference
from sparse_lm.nn.attend.shards import per_shard
from sparse_lm.nn.attend.sight import Sight
from sparse_lm.sharding import Rules

Implementation = Literal["auto", "reference", "chunked", "splash", "cudnn"]
PLATFORM = {"splash": "tpu", "cudnn": "gpu"}


@dataclasses.dataclass(frozen=True)
class Softmax:
    """How scores become weights, and by which implementation.

    scale: of the product of query and key; None is one over the root of their width. soft_cap: scores are
    cap * tanh(score / cap), after the scale (Gemma 2, Grok); None is off. rate: of dropout of weights. block: tokens
    per block of the implementations that never hold all queries by all keys.
    """

    implementation: Implementation = "auto"
    scale: float | None = None
    soft_cap: float | None = None
    rate: float = 0.0
    block: int = 512


def attend(
    query_BLHI: Float[Array, "B L H I"],
    key_BTJI: Float[Array, "B T J I"],
    value_BTJW: Float[Array, "B T J W"],
    sight: Sight,
    softmax: Softmax,
    rules: Rules,
    sinks_H: Float[Array, "H"] | None = None,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L H W"]:
    """Softmax attention of H heads over J: head h looks at key/value head h // (H / J).

    sinks_H: scores beside those of the keys, which take weight and give nothing (gpt-oss, 2508.10925; Xiao et al. 2023,
    2309.17453); None is off. dropout_key: None is evaluation. A query that sees nothing gets 0. Raises `ConfigError`
    when the implementation that is asked for cannot do it.
    """
    dropping = dropout_key is not None and softmax.rate > 0
    shape = (query_BLHI.shape[1], key_BTJI.shape[1], query_BLHI.shape[3], value_BTJW.shape[3])
    chosen = implementation_of(softmax, sight, shape, dropping, rules.ways("L", shape[0]))
    scale = query_BLHI.shape[-1] ** -0.5 if softmax.scale is None else softmax.scale
    scoring = (scale, softmax.soft_cap)
    operands = (query_BLHI, key_BTJI, value_BTJW, sinks_H)
    if chosen == "reference":
        return reference(operands, sight, scoring, rules, softmax.rate, dropout_key)
    implementation = {"chunked": chunked, "splash": splash, "cudnn": cudnn}[chosen]

    def body(operands, sight, pieces):
        return implementation(operands, sight, scoring, softmax.block, *([pieces] if chosen == "chunked" else []))

    return per_shard(body, operands, sight, rules, checked=chosen == "chunked")


def implementation_of(
    softmax: Softmax, sight: Sight, shape: tuple[int, int, int, int], dropping: bool, devices: int | None = 1
) -> str:
    """The implementation that `attend` takes.

    shape: length, keys, width of a query, width of a value. dropping: whether weights are dropped, which only the
    reference does, since what a loop over blocks drops would depend on their size. `auto` is the reference where one
    block holds all, and otherwise splash on a TPU and chunked elsewhere. What the kernels ask for: see `kernels`.
    devices: that share a row; the kernels want it whole. None is a row that they do not divide, for the reference.
    """
    length, keys, *widths = shape
    asked, where = softmax.implementation, platform()
    if dropping:
        if asked not in ("auto", "reference"):
            raise ConfigError("model.dropout", softmax.rate, f"is not in {asked} attention; use auto or reference")
        return "reference"
    small = max(length, keys) <= softmax.block or length == 1
    if devices is None:
        return "reference"
    if asked in ("reference", "chunked"):
        return asked
    if sight.layout != "row":
        # Kernels are for whole rows; a cache is read, and some tokens of a row are looked at, by the plain forms.
        return "reference" if small else "chunked"
    if asked == "auto":
        fits = where == "tpu" and devices == 1 and splash_block(length, softmax.block) is not None
        return "reference" if small else "splash" if fits else "chunked"
    if devices > 1:
        raise ConfigError("mesh.context", devices, f"{asked} attention wants whole rows; use implementation=auto")
    if where != PLATFORM[asked]:
        raise ConfigError(
            "model.heads.implementation", asked, f"runs on {PLATFORM[asked]} and this is {where}; use auto"
        )
    multiple, most = CUDNN_WIDTHS
    if asked == "cudnn" and any(width % multiple or width > most for width in widths):
        raise ConfigError(
            "model.head_dim",
            max(widths),
            f"cudnn needs multiples of {multiple} up to {most}; or use implementation=auto",
        )
    return asked
