"""Configuration of the model."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from sparse_lm.config import Config, ConfigError, option
from sparse_lm.moe.attention import ATTENTIONS, AttentionExperts, AttentionShape
from sparse_lm.moe.config import MoEConfig
from sparse_lm.nn.config import HeadsConfig
from sparse_lm.nn.mlp import Activation
from sparse_lm.nn.norm import Norm
from sparse_lm.nn.remat import policy
from sparse_lm.sharding import Rules


class LayerKind(NamedTuple):
    """What is particular to a layer. sparse: experts in its feed-forward part. wrapped: tokens may skip it.

    window, chunk, rotated: see `HeadsConfig`.
    """

    sparse: bool
    wrapped: bool = False
    window: int | None = None
    chunk: int | None = None
    rotated: bool = True


@dataclasses.dataclass(frozen=True)
class DepthConfig(Config):
    """Mixture of Depths (Raposo et al. 2024, 2404.02258): some blocks are passed by a share of each row's tokens only.

    capacity: that share in training: the C = ceil(capacity * length) tokens of a row with the highest router weights.
    every: every `every`-th block is wrapped so; the first wrapped one is block number `every`.
    predictor: what says, from the token alone, whether it would be chosen; evaluation and generation go by it.
        `router`: the router's own weight, positive or not, trained by an auxiliary loss that also moves the model
        (section 3.5, first method). `mlp`: a small network that sees the token without a gradient (second method).
    hidden: width of that network. weight: of the predictor's cross-entropy, once per wrapped block.
    allow_non_causal: accept that in training a token's way depends on later tokens.
    """

    capacity: float = option(0.125, gt=0, le=1)
    every: int = option(2, ge=1)
    predictor: Literal["router", "mlp"] = "router"
    hidden: int = option(32, ge=1)
    weight: float = option(0.01, ge=0)
    allow_non_causal: bool = False

    def slots(self, length: int) -> int:
        """How many tokens of a row of this length pass a wrapped block in training."""
        # The rounding of 0.1 * 30 to above 3 must not add a token.
        return min(length, max(1, math.ceil(round(self.capacity * length, 9))))


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """A decoder-only Transformer.

    vocab_size: None is the vocabulary of the data. num_kv_heads: None is num_heads. head_dim: None is
    d_model / num_heads. max_length: rows of the learned position table; None is the length of the data.
    norm: `layernorm_no_bias` has weights alone. norm_position: `pre` normalises the input of a sublayer, `post` the sum
    after it, `sandwich` the input and the output before the sum (Grok-1, Gemma 2). norm_eps: what norms add to the mean
    square. heads: what attention is beside its sizes, see `sparse_lm.nn.config`. dtype: of activations and matrix
    products; parameters, norms, softmax, router and loss are float32. scan_layers: compile one layer and loop over it.
    remat: what the backward pass computes again: `none`, `full` (all but the input of a layer), `dots` (all but the
    results of matrix products), or all but named values, as in `save:expert_hidden,attention+offload:qkv` (see
    `sparse_lm.nn.remat`). loss_chunk: tokens of a device whose logits the loss has at once, in training and
    evaluation; None is all. A number bounds memory where the vocabulary is large, and costs one more product with it in
    the backward pass. moe: None is a dense model. attention: experts in the attention of every layer, see
    `sparse_lm.moe.attention`; None is one attention for all tokens. depth: None sends every token through every layer.
    """

    vocab_size: int | None = option(None, ge=2)
    num_layers: int = option(4, ge=1)
    d_model: int = option(128, ge=2)
    num_heads: int = option(4, ge=1)
    num_kv_heads: int | None = option(None, ge=1)
    head_dim: int | None = option(None, ge=2)
    d_ff: int = option(512, ge=1)
    max_length: int | None = option(None, ge=1)
    activation: Activation = "swiglu"
    norm: Literal["rmsnorm", "layernorm", "layernorm_no_bias"] = "rmsnorm"
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    norm_eps: float = option(1e-6, gt=0)
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_base: float = option(10_000.0, gt=1)
    tie_embeddings: bool = True
    dropout: float = option(0.0, ge=0, lt=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True
    remat: str = "none"
    loss_chunk: int | None = option(None, ge=1)
    heads: HeadsConfig = HeadsConfig()
    moe: MoEConfig | None = None
    attention: AttentionExperts | None = option(None, variants=ATTENTIONS)
    depth: DepthConfig | None = None

    def check(self) -> None:
        """Raises `ConfigError` when the shapes do not fit together."""
        policy(self.remat)
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError("num_heads", self.num_heads, f"must divide d_model={self.d_model}, or set head_dim")
        if self.num_heads % self.kv_heads:
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"must divide num_heads={self.num_heads}")
        if self.position == "rope" and self.width % 2 and self.heads.latent is None:
            raise ConfigError("head_dim", self.width, "rope rotates pairs: choose an even width, or another position")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ConfigError("d_model", self.d_model, "sinusoidal positions need an even width")
        if self.moe is not None and not any(self.sparse):
            raise ConfigError(
                "moe.every",
                self.moe.every,
                f"leaves no layer of {self.num_layers} sparse (first_dense={self.moe.first_dense}); moe=None is dense",
            )
        if self.moe is not None and self.d_expert < 1:
            raise ConfigError("moe.top_k", self.moe.top_k, f"is more than d_ff={self.d_ff}; set moe.d_expert")

        self._check_heads()
        if self.attention is not None:
            self.attention.check_shape(self.attention_shape)
        self._check_depth()

    def _check_heads(self) -> None:
        heads = self.heads
        if heads.implementation not in ("auto", "reference") and self.dropout:
            raise ConfigError(
                "dropout", self.dropout, f"is not in {heads.implementation} attention; use 0, or auto or reference"
            )
        if heads.implementation == "cudnn" and self.dtype != "bfloat16":
            raise ConfigError("heads.implementation", "cudnn", "needs dtype=bfloat16; or use auto or chunked")
        for name in ("rotated", "rope_scaling"):
            if getattr(heads, name) and self.position != "rope":
                raise ConfigError(f"heads.{name}", getattr(heads, name), "needs position=rope; leave it out")
        if heads.latent is not None and self.kv_heads != self.num_heads:
            raise ConfigError("num_kv_heads", self.num_kv_heads, "latent attention has one per query head; use None")
        if self.attention is not None:
            try:
                heads.only_between()
            except ConfigError as error:
                raise error.under("heads") from None
        turned = heads.latent.rope_dim if heads.latent else self.width
        if heads.rope_scaling is not None:
            # Names a list of another length than the pairs of a head.
            heads.rope_scaling.stretched(np.ones(turned // 2), self.rope_base)

    def _check_depth(self) -> None:
        if self.depth is None:
            return
        if self.attention is not None:
            raise ConfigError(
                "attention.kind",
                self.attention.kind,
                "has balance losses over all tokens of a row, of which a wrapped block sees some; use attention=None "
                "or depth=None",
            )
        if self.depth.every > self.num_layers:
            raise ConfigError(
                "depth.every", self.depth.every, f"wraps no layer of {self.num_layers}; depth=None wraps none"
            )
        if self.moe is not None and self.moe.router.pathway:
            raise ConfigError(
                "moe.router.pathway",
                True,
                "needs every token's logits in the sparse layer before, and tokens that skip a layer have none; use "
                "pathway=False or depth=None",
            )
        routed_inside = any(kind.sparse and kind.wrapped for kind in self.layers)
        if routed_inside and self.moe is not None and self.moe.group_size is not None:
            raise ConfigError(
                "moe.group_size",
                self.moe.group_size,
                "a wrapped sparse layer routes the chosen tokens of each row as one group; leave it at None, or choose "
                "moe.every, moe.first_dense and depth.every so that no sparse layer is wrapped",
            )

    @property
    def attention_shape(self) -> AttentionShape:
        """The heads of every layer, before what is particular to it."""
        return self.shape_of(LayerKind(False))

    def shape_of(self, kind: LayerKind) -> AttentionShape:
        """The heads of a layer of this kind."""
        return AttentionShape(
            d_model=self.d_model,
            num_heads=self.num_heads,
            kv_heads=self.kv_heads,
            head_dim=self.width,
            rope_base=self.rope_base if self.position == "rope" and kind.rotated else None,
            dropout_rate=self.dropout,
            options=self.heads,
            window=kind.window,
            chunk=kind.chunk,
            eps=self.norm_eps,
        )

    def build_norm(self, rules: Rules) -> Norm:
        """A norm over the model width."""
        return Norm(self.norm, self.d_model, rules, self.norm_eps)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def d_expert(self) -> int:
        """Hidden width of an expert."""
        assert self.moe is not None
        return self.moe.d_expert or self.d_ff // self.moe.top_k

    @property
    def sparse(self) -> tuple[bool, ...]:
        """For each layer, whether its feed-forward part is a mixture of experts."""
        if self.moe is None:
            return (False,) * self.num_layers
        first, every = self.moe.first_dense, self.moe.every
        return tuple(i >= first and (i - first + 1) % every == 0 for i in range(self.num_layers))

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """What is particular to each layer."""
        every = self.depth.every if self.depth else self.num_layers + 1
        heads = self.heads
        return tuple(
            LayerKind(sparse, (i + 1) % every == 0, heads.window(i), heads.chunk(i), heads.rotates(i))
            for i, sparse in enumerate(self.sparse)
        )

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat, first dense layers aside."""
        return math.lcm(self.moe.every if self.moe else 1, self.depth.every if self.depth else 1, *self.heads.period)
