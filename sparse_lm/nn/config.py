"""Options of what is between the projections of an attention, and of the projections of the ordinary one."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_lm.config import Config, ConfigError, option
from sparse_lm.nn.attend.choose import Implementation
from sparse_lm.nn.rope_scaling import ROPE_SCALINGS, RopeScaling


@dataclasses.dataclass(frozen=True)
class LatentConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values from few numbers per token.

    kv_rank: numbers that keys and values of all heads are made from, and that a cache holds. query_rank: the same for
    queries; None makes them from the token. rope_dim: rotated part of a head, whose key all heads share, beside
    `model.head_dim` that are not rotated. value_dim: width of a value; None is `model.head_dim`.
    """

    kv_rank: int = option(512, ge=1)
    query_rank: int | None = option(None, ge=1)
    rope_dim: int = option(64, ge=2)
    value_dim: int | None = option(None, ge=1)

    def check(self) -> None:
        """Raises `ConfigError` where pairs cannot be rotated."""
        if self.rope_dim % 2:
            raise ConfigError("rope_dim", self.rope_dim, "rope rotates pairs: choose an even width")


@dataclasses.dataclass(frozen=True)
class HeadsConfig(Config):
    """The heads of every layer.

    implementation, block: see `sparse_lm.nn.attend`; `auto` chooses by platform and length.
    qk_norm: RMSNorm of queries and keys before rotation. `head`: over each head, with weights of one head (Qwen3).
        `model`: over all heads of a token together (OLMoE). `l2`: over each head, without weights, in rotated layers
        (Llama 4; rotation does not change it).
    qkv_bias, out_bias: added by the projections. clip_qkv: queries, keys and values are cut off beyond +- this (DBRX).
    sinks: one learned score per head that takes weight and gives nothing (gpt-oss).
    soft_cap: scores are cap * tanh(score / cap) (Grok-1: 30). scale: of the scores; None is 1 / sqrt(width of a head).
    windows: how many places a query sees, its own included, layer by layer, again from the start when it ends; None is
        all. (128, None) is gpt-oss's. Empty is all in every layer.
    chunks: the same for chunks: a query sees nothing before the chunk of this many positions that it is in.
        Llama 4's is (8192, 8192, 8192, None).
    rotated: the same for whether rope turns queries and keys; (True, True, True, False) is Llama 4's. Empty is always.
    rope_scaling: None is none. latent: None is one projection each for queries, keys and values.
    """

    implementation: Implementation = "auto"
    block: int = option(512, ge=1)
    qk_norm: Literal["none", "head", "model", "l2"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    clip_qkv: float | None = option(None, gt=0)
    sinks: bool = False
    soft_cap: float | None = option(None, gt=0)
    scale: float | None = option(None, gt=0)
    windows: tuple[int | None, ...] = ()
    chunks: tuple[int | None, ...] = ()
    rotated: tuple[bool, ...] = ()
    rope_scaling: RopeScaling | None = option(None, variants=ROPE_SCALINGS)
    latent: LatentConfig | None = None

    def check(self) -> None:
        """Raises `ConfigError` for what cannot work together."""
        for name in ("windows", "chunks"):
            for place, size in enumerate(getattr(self, name)):
                if size is not None and size < 1:
                    raise ConfigError(f"{name}[{place}]", size, "must be at least 1; None sees everything")
        if self.latent is not None:
            for name in ("qkv_bias", "clip_qkv"):
                if getattr(self, name):
                    raise ConfigError(
                        name, getattr(self, name), "latent attention has no such projections; leave it out"
                    )
            if self.qk_norm != "none":
                raise ConfigError("qk_norm", self.qk_norm, "latent attention normalises its latents; use none")
        if self.implementation == "cudnn":
            for name in ("sinks", "soft_cap", "chunks"):
                if getattr(self, name):
                    raise ConfigError(
                        name, getattr(self, name), "is not in cudnn attention; use implementation=auto or chunked"
                    )

    def only_between(self) -> None:
        """Raises `ConfigError` for options of the projections, which attention experts have of their own."""
        for name in ("qk_norm", "qkv_bias", "out_bias", "clip_qkv", "sinks", "latent"):
            value = getattr(self, name)
            if value not in (None, False, "none"):
                raise ConfigError(name, value, "is not in attention with experts; leave it out, or attention=None")

    @property
    def period(self) -> tuple[int, ...]:
        """After how many layers each pattern repeats."""
        return tuple(max(1, len(pattern)) for pattern in (self.windows, self.chunks, self.rotated))

    def window(self, layer: int) -> int | None:
        """See `windows`."""
        return self.windows[layer % len(self.windows)] if self.windows else None

    def chunk(self, layer: int) -> int | None:
        """See `chunks`."""
        return self.chunks[layer % len(self.chunks)] if self.chunks else None

    def rotates(self, layer: int) -> bool:
        """See `rotated`."""
        return not self.rotated or self.rotated[layer % len(self.rotated)]
