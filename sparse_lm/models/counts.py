"""What a model costs, from its configuration alone: parameters, FLOPs per token, bytes. Nothing is allocated.

Conventions:

- A matrix product with P weights costs 2 P FLOPs per token forward and 4 P backward: 6 P in training.
- Attention scores and their use cost 12 x layers x heads x head_dim x length per token in training: whole rows, the
  causal half is not taken off (Chowdhery et al. 2022, PaLM, appendix B). A layer with a window or chunks counts as many
  keys as a query sees at most; latent attention counts the keys and values that it makes, at their own widths.
- The unembedding is a matrix product, tied or not; looking up an embedding or a position is not.
- Empty slots of experts and recomputation (remat) are not counted: they are overhead, not work of the model.
- Norms, activations, softmax and the choice of experts count no FLOPs; the router's product does.
- Beside free experts a token has as many feed-forward ones as at balance: top_k * tau N / (tau N + free ones), with
  tau = `free_share`, `active` being rounded. It is an expectation: what a run chose stands in its loads. Free experts
  count their weights, which every token multiplies by, chosen or not.
- A block that a share c of the tokens passes (Mixture of Depths) costs a token c of its weights, and c squared of its
  attention scores, as in training; `active` is then a mean over tokens. Evaluation computes such blocks in full.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import optax
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.models.attention_counts import head_cost, score_widths
from sparse_lm.models.config import LayerKind, ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.nn.mlp import GATED
from sparse_lm.sharding import DEFAULT


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one part of a model, over all layers.

    total: all that are stored. active: those that one token's forward pass uses. multiplied: those that it multiplies
    by, in matrix products; a tied table is stored once, as embedding, and multiplied as unembedding.
    """

    total: int
    active: int
    multiplied: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """The parts of a model. `embedding`, `unembedding` (empty when tied) and `positions` (learned ones) are tables.

    dense: feed-forward layers that are not sparse. free: weights of constant experts. shared: experts that see every
    token. depth: routers and predictors of blocks that tokens may skip. scores: what attention scores cost beside their
    parameters: for each layer the number that a query multiplies by per key, and how many keys it sees at most.
    """

    embedding: Part
    positions: Part
    attention: Part
    norms: Part
    dense: Part
    router: Part
    experts: Part
    free: Part
    shared: Part
    depth: Part
    unembedding: Part
    scores: tuple[tuple[float, int | None], ...]

    def parts(self) -> dict[str, Part]:
        """The parts by name, in the order in which a token meets them."""
        named = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: part for name, part in named if isinstance(part, Part)}

    @property
    def total(self) -> int:
        """All parameters, embeddings included."""
        return sum(part.total for part in self.parts().values())

    @property
    def active(self) -> int:
        """Parameters that one token uses, the whole tables of embeddings included (as in Mixtral's 12.9B)."""
        return sum(part.active for part in self.parts().values())

    @property
    def non_embedding(self) -> int:
        """`total` without the tables of embeddings and positions."""
        return self.total - self._tables().total

    @property
    def active_non_embedding(self) -> int:
        """`active` without the tables of embeddings and positions."""
        return self.active - self._tables().active

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the stored parameters, which are float32."""
        return 4 * self.total

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs (forward and backward) per token in rows of `length` tokens; see the module's conventions."""
        return sum(self.part_flops(name, length) for name in self.parts())

    def forward_flops_per_token(self, length: int) -> int:
        """FLOPs of the forward pass alone: a third."""
        return self.flops_per_token(length) // 3

    def part_flops(self, name: str, length: int) -> int:
        """The share of one part in `flops_per_token`; attention includes its scores."""
        scores = self.score_width(length) if name == "attention" else 0
        return 6 * (self.parts()[name].multiplied + scores)

    def score_width(self, length: int) -> int:
        """Multiplications of a token with keys and values in rows of `length` tokens, over all layers."""
        return round(sum(width * min(length, limit or length) for width, limit in self.scores))

    def _tables(self) -> Part:
        tables = (self.embedding, self.positions, self.unembedding)
        return Part(*(sum(getattr(part, field) for part in tables) for field in ("total", "active", "multiplied")))


def count(config: ModelConfig) -> Counts:
    """Counts of the decoder that `config` describes.

    Raises `ConfigError` when the vocabulary, or the length of learned positions, is left to the data.
    """
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size", None, "is left to the data; set it to count parameters")
    if config.position == "learned" and config.max_length is None:
        raise ConfigError("model.max_length", None, "is left to the data; set it to count parameters")
    layers, width, num_sparse = config.num_layers, config.d_model, sum(config.sparse)
    table = config.vocab_size * width
    tied = config.tie_embeddings
    positions = (config.max_length or 0) * width if config.position == "learned" else 0
    norms = _norms(config)
    counts = Counts(
        embedding=Part(table, table, 0),
        positions=Part(positions, positions, 0),
        attention=_attention(config),
        norms=Part(norms, norms, 0),
        dense=_matrices((layers - num_sparse) * _feed_forward(config, config.d_ff)),
        router=_router(config),
        experts=_experts(config),
        free=_free(config),
        shared=_shared(config),
        depth=_depth(config),
        unembedding=Part(0, 0, table) if tied else _matrices(table),
        scores=score_widths(config),
    )
    return counts if config.depth is None else _discounted(counts, config, config.depth.capacity)


def optimizer_bytes(config: ModelConfig, optimizer: optax.GradientTransformation) -> int:
    """Bytes of the state that `optimizer` keeps for this model, exactly as it would be made.

    By name: about 8 bytes per parameter for adamw, 4 for lion, and for adafactor only rows and columns of matrices.
    """

    def state(key):
        return optimizer.init(nnx.split(Decoder(key, config, DEFAULT), nnx.Param, ...)[1])

    count(config)  # names what is missing
    leaves = jax.tree.leaves(jax.eval_shape(state, jax.random.key(0)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def table(config: ModelConfig, length: int) -> str:
    """Parameters and training FLOPs per token by part, as text to print before a run; parts that are empty left out."""
    counts = count(config)
    rows = [("", "parameters", "active", "FLOPs/token")]
    for name, part in counts.parts().items():
        flops = counts.part_flops(name, length)
        if part.total or flops:
            tied = " (tied)" if name == "unembedding" and config.tie_embeddings else ""
            rows.append((name + tied, f"{part.total:,}", f"{part.active:,}", f"{flops:,}"))
    rows.append(("total", f"{counts.total:,}", f"{counts.active:,}", f"{counts.flops_per_token(length):,}"))
    rows.append(("without embeddings", f"{counts.non_embedding:,}", f"{counts.active_non_embedding:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [[row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4))] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The dense model whose feed-forward layers cost each token as many FLOPs, and active parameters, as `config`'s.

    Every layer gets the hidden width that a token sees in a sparse one: (top_k + num_shared) * d_expert, or beside
    free experts the expected number for top_k, the width rounded. Free experts and the router are
    extra in the sparse model and have no counterpart. Attention experts become one attention with as many heads as a
    token has. Where tokens skip layers, the twin has as many layers as a token passes on average, rounded, and the
    hidden width that gives its products with weights the same FLOPs.

    Raises `ConfigError` when the model is dense already, when its dense layers are of another width (no single d_ff
    then matches every layer), and when skipping leaves the twin no FLOPs for feed-forward layers.
    """
    if config.depth is not None:
        return _depth_twin(config)
    if config.attention is not None:
        config = _without_attention_experts(config)
        if config.moe is None:
            return config
    if config.moe is None:
        raise ConfigError("model.moe", None, "the model is dense: it is its own twin")
    width = round(config.moe.expected * config.d_expert) + _shared_width(config)
    if not all(config.sparse) and width != config.d_ff:
        raise ConfigError(
            "model.moe.d_expert",
            config.d_expert,
            f"gives sparse layers of {width} active hidden units beside dense layers of d_ff={config.d_ff}, so that no "
            f"dense model has the FLOPs of both; choose them equal, for example d_ff={width}, or every=1",
        )
    return config.replace(moe=None, d_ff=width)


def _without_attention_experts(config: ModelConfig) -> ModelConfig:
    """The same with one attention for all tokens, of as many active parameters but for the router's."""
    assert config.attention is not None
    twin = config.replace(attention=None)
    cost = config.attention.cost(config.attention_shape)
    if config.num_layers * (cost.active - cost.router) != _attention(twin).active:
        raise ConfigError(
            "model.attention.top_k",
            config.attention.top_k,
            f"gives a head of {config.attention.kind} more than one value and output projection per token, which no "
            "dense attention of the same heads has; with top_k=1 there is a twin",
        )
    return twin


def _depth_twin(config: ModelConfig) -> ModelConfig:
    assert config.depth is not None
    layers = max(1, round(sum(config.depth.capacity if kind.wrapped else 1 for kind in config.layers)))
    counts, twin = count(config), config.replace(moe=None, depth=None, num_layers=layers)
    spare = sum(part.multiplied for part in (counts.attention, counts.dense, counts.experts, counts.shared))
    width = round((spare - count(twin).attention.multiplied) / (layers * _feed_forward(config, 1)))
    if width < 1:
        raise ConfigError(
            "model.depth.capacity",
            config.depth.capacity,
            f"leaves a dense model of {layers} layers no FLOPs for feed-forward layers; there is no twin of this shape",
        )
    return twin.replace(d_ff=width)


def _discounted(counts: Counts, config: ModelConfig, capacity: float) -> Counts:
    """With what a token uses on average, where some layers are passed by the share `capacity` of the tokens."""

    def scaled(part: Part, layers: Sequence[LayerKind], fixed: int = 0) -> Part:
        share = sum(capacity if kind.wrapped else 1.0 for kind in layers) / max(1, len(layers))
        return Part(part.total, round((part.active - fixed) * share) + fixed, round(part.multiplied * share))

    layers = config.layers
    dense, sparse = ([kind for kind in layers if kind.sparse == is_sparse] for is_sparse in (False, True))
    last = _last_norm(config)
    return dataclasses.replace(
        counts,
        attention=scaled(counts.attention, layers),
        norms=scaled(counts.norms, layers, last),
        dense=scaled(counts.dense, dense),
        **{name: scaled(getattr(counts, name), sparse) for name in ("router", "experts", "free", "shared")},
        scores=tuple(
            (width * (capacity**2 if kind.wrapped else 1), limit)
            for (width, limit), kind in zip(counts.scores, layers, strict=True)
        ),
    )


def _depth(config: ModelConfig) -> Part:
    """Every token meets all of it."""
    depth, wrapped = config.depth, sum(kind.wrapped for kind in config.layers)
    if depth is None:
        return Part(0, 0, 0)
    hidden = depth.hidden if depth.predictor == "mlp" else 0
    multiplied = wrapped * (config.d_model + config.d_model * hidden + hidden)
    return Part(multiplied + wrapped * hidden, multiplied + wrapped * hidden, multiplied)


def _attention(config: ModelConfig) -> Part:
    """Projections, and the routers of attention experts."""
    layers, shape = config.num_layers, config.attention_shape
    if config.attention is not None:
        cost = config.attention.cost(shape)
        return Part(*(layers * size for size in (cost.total, cost.active, cost.multiplied)))
    heads = head_cost(shape)
    return Part(layers * heads.total, layers * heads.total, layers * heads.multiplied)


def _norms(config: ModelConfig) -> int:
    per_layer = 4 if config.norm_position == "sandwich" else 2
    return per_layer * config.num_layers * _one_norm(config) + _last_norm(config)


def _last_norm(config: ModelConfig) -> int:
    return 0 if config.norm_position == "post" else _one_norm(config)


def _one_norm(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm == "layernorm" else 1)


def _matrices(size: int) -> Part:
    return Part(size, size, size)


def _feed_forward(config: ModelConfig, hidden: int) -> int:
    return (3 if config.activation in GATED else 2) * config.d_model * hidden


def _shared_width(config: ModelConfig) -> int:
    return 0 if config.moe is None else config.moe.shared_width(config.d_expert)


def _shared(config: ModelConfig) -> Part:
    """Experts that see every token, and the weights of their gate."""
    if config.moe is None or not config.moe.num_shared:
        return Part(0, 0, 0)
    gate = {"none": 0, "sigmoid": 1, "mix": 2}[config.moe.shared_gate] * config.d_model
    return _matrices(sum(config.sparse) * (_feed_forward(config, _shared_width(config)) + gate))


def _experts(config: ModelConfig) -> Part:
    if config.moe is None:
        return Part(0, 0, 0)
    layers, expected = sum(config.sparse), config.moe.expected
    matrices = layers * _feed_forward(config, config.d_expert)
    gated = config.activation in GATED
    biases = layers * ((1 + gated) * config.d_expert + config.d_model) if config.moe.expert_bias else 0
    one = matrices + biases
    return Part(config.moe.num_experts * one, round(expected * one), round(expected * matrices))


def _free(config: ModelConfig) -> Part:
    """Of a constant expert: a vector, and a product that mixes it with the token."""
    return _matrices(0 if config.moe is None else sum(config.sparse) * config.moe.num_constant * 3 * config.d_model)


def _router(config: ModelConfig) -> Part:
    """From the router itself, since kinds of router differ in what they hold."""
    if config.moe is None:
        return Part(0, 0, 0)
    one, multiplied = config.moe.router.parameters(config.moe.router_shape(config.d_model))
    num_sparse = sum(config.sparse)
    return Part(num_sparse * one, num_sparse * one, num_sparse * multiplied)
