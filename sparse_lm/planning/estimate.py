"""What a step needs, by formulas instead of the compiler: for a first look, for GPUs, and to sort changes by.

The formulas know the largest arrays and no scheduling. Their figures are for comparing variants; beside compiled ones
they are a check. What is a bound of what the compiler finds, and how far off they were, stands in docs/plans.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sparse_lm.experiment import Experiment
from sparse_lm.mesh import TOKEN_AXES
from sparse_lm.models.attention_counts import score_widths
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import count
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.dispatch.hot import worst
from sparse_lm.nn.mlp import GATED
from sparse_lm.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step.

    activations: bytes that the forward pass keeps for the backward one. working: bytes of the largest layer or of the
    loss while it is computed, and of weights gathered for it. flops: executed, with recomputation and empty slots.
    memory_bytes: moved to and from main memory. collectives: by kind and axes. idle: share of a pipeline's turns in
    which a stage has no microbatch (it computes on padding, which `flops` has).
    """

    activations: int
    working: int
    flops: int
    memory_bytes: int
    collectives: tuple[Collective, ...]
    idle: float


def estimate(experiment: Experiment, mesh: Mapping[str, int], parameters: int, optimizer: int) -> Estimate:
    """The estimate of a resolved experiment on a mesh. parameters, optimizer: bytes of them on a device.

    With stages, all layers are taken to be in their groups, and each group to work in every turn of the pipeline.
    """
    sizes, turns = _Sizes.of(experiment, mesh), _Turns.of(experiment, mesh)
    kept = {"none": sizes.inside, "full": sizes.tokens * sizes.width}.get(experiment.model.remat, sizes.products)
    working = max(sizes.logits, sizes.inside + 2 * sizes.gathered)
    if experiment.train.accumulate > 1:
        working += parameters  # the sum of gradients beside those of the microbatch
    passes = 2 if experiment.model.remat == "none" else 3
    moved = 3 * (parameters + optimizer) + turns.all * passes * turns.layers * (2 * sizes.inside + 2 * sizes.gathered)
    return Estimate(
        activations=int(turns.layers * kept * turns.kept),
        working=int(working),
        flops=int(_flops(experiment, turns) / math.prod(mesh.values())),
        memory_bytes=int(moved + 4 * experiment.train.accumulate * sizes.logits),
        collectives=_moves(experiment, mesh, sizes, turns),
        idle=1 - 1 / turns.longer,
    )


@dataclasses.dataclass(frozen=True)
class _Turns:
    """How often a device passes through its `layers` in a step (`all`), how many passes it keeps at once (`kept`), and
    passes over those that have a microbatch (`longer`, at least 1); see `models.pipeline`.
    """

    layers: float
    all: int
    kept: int
    longer: float

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mapping[str, int]) -> _Turns:
        """Of a resolved experiment on a mesh."""
        stages, microbatches = mesh["stage"], experiment.train.accumulate
        in_flight = 1 if stages == 1 else experiment.train.pipeline_microbatches or microbatches
        one = in_flight + stages - 1
        return cls(experiment.model.num_layers / stages, microbatches // in_flight * one, one, one / in_flight)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """tokens: of a device in one microbatch. width: bytes of an activation vector. The rest in bytes: what a layer
    computes (`inside`), of that the results of its products (`products`), its weights as they are used (`gathered`),
    and logits with their gradient.
    """

    tokens: int
    width: int
    inside: float
    products: float
    gathered: float
    logits: float

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mapping[str, int]) -> _Sizes:
        """Of a resolved experiment on a mesh."""
        model, length = experiment.model, experiment.data.length
        parts = experiment.train.accumulate * math.prod(mesh[axis] for axis in TOKEN_AXES if axis in mesh)
        tokens = max(1, int(experiment.train.batch_size * length / parts))
        element = 2 if model.dtype == "bfloat16" else 4
        cut = mesh["model"]
        hidden, slots = model.d_ff / cut, 0.0
        if model.moe is not None:
            slots = _slots(model.moe, mesh["expert"])
            hidden = (slots * model.d_expert + model.moe.shared_width(model.d_expert)) / cut
        matrices = 3 if model.activation in GATED else 2
        products = tokens * element * (_heads(model) / cut + matrices * hidden + (slots + 2) * model.d_model)
        scores = tokens * _scores(model, length) / cut * (4 + 4 + element)  # logits, shifted, and weights
        inside = products + scores + tokens * (slots + 4) * model.d_model * element
        counts = count(model)
        stay = model.moe is not None and DISPATCHERS[model.moe.dispatcher].moves_tokens
        layer = sum(getattr(counts, part).total for part in ("attention", "dense", "shared"))
        layer += counts.experts.total / (mesh["expert"] if stay else 1)
        gathered = layer / model.num_layers * element / cut
        logits = 2 * 4 * min(tokens, model.loss_chunk or tokens) * (model.vocab_size or 0) / cut
        return cls(tokens, element * model.d_model, inside, products, gathered, logits)


def _slots(moe: MoEConfig, devices: int) -> float:
    """Rows of experts per token: k times the capacity factor; all experts' where nothing is dropped and all have room.

    Without capacity, if tokens move, a device has room for `exchange_room` times its even share, or for what all
    devices along `expert` could send it if that is less; see `moe.dispatch.hot` for copies of experts.
    """
    dispatcher = DISPATCHERS[moe.dispatcher]
    if not dispatcher.has_capacity:
        most = float(worst(moe.num_experts, devices, moe.hot_copies))
        return moe.top_k * (min(most, moe.exchange_room) if dispatcher.moves_tokens else 1.0)
    if moe.dispatcher == "dense" or moe.capacity_factor is None:
        return float(moe.num_experts)
    return min(moe.top_k * moe.capacity_factor, float(moe.num_experts))


def filled(experiment: Experiment, mesh: Mapping[str, int]) -> float:
    """The share of the room for rows of experts that is in use at even loads, where nothing has a capacity; else 1."""
    moe = experiment.model.moe
    if moe is None or DISPATCHERS[moe.dispatcher].has_capacity:
        return 1.0
    return moe.top_k / max(_slots(moe, mesh["expert"]), float(moe.top_k))


def _heads(model: ModelConfig) -> float:
    """Numbers per token in queries, keys, values and what heads see."""
    return _keys(model) * (1 + model.num_heads / model.kv_heads)


def _keys(model: ModelConfig) -> float:
    """Numbers per token in keys and values."""
    return model.kv_heads * score_widths(model)[0][0] / model.num_heads


def _scores(model: ModelConfig, length: int) -> float:
    """Scores per token that exist at once: of a block of queries and one of keys, unless one array holds all.

    Kernels hold theirs on the chip; a block's are counted all the same. See `nn.attend.choose`.
    """
    heads = model.heads
    block = length if heads.implementation == "reference" or model.dropout > 0 else min(heads.block, length)
    return model.num_heads * block**2 / length


def _flops(experiment: Experiment, turns: _Turns) -> float:
    """FLOPs that all devices execute in a step: the model's, empty slots, and the forward pass again with remat.

    What a stage computes without a microbatch counts as well.
    """
    model, length = experiment.model, experiment.data.length
    counts = count(model)
    parts = {name: float(counts.part_flops(name, length)) for name in counts.parts()}
    if model.moe is not None:
        parts["experts"] *= _slots(model.moe, 1) / model.moe.top_k
    again = turns.longer * (4 / 3 if model.remat == "full" else 1)
    parts = {name: flops * (1 if name == "unembedding" else again) for name, flops in parts.items()}
    return experiment.train.batch_size * length * sum(parts.values())


def _moves(experiment: Experiment, mesh: Mapping[str, int], sizes: _Sizes, turns: _Turns) -> tuple[Collective, ...]:
    """Weights gathered and their gradients scattered over fsdp, gradients summed over data and replica, slots
    exchanged, keys and values gathered over context, activations handed on over stage.
    """
    model = experiment.model
    element = 2 if model.dtype == "bfloat16" else 4
    forward = 1 if model.remat == "none" else 2
    counts, passes, vectors = count(model), turns.all * turns.layers, sizes.tokens * sizes.width
    found: list[Collective] = []

    def move(kind: str, times: float, bytes_: float, *along: str) -> None:
        axes = tuple(axis for axis in along if mesh[axis] > 1)
        if axes and times:
            found.append(Collective(kind, int(times), int(times * bytes_), True, axes))

    table = (counts.embedding.total + counts.unembedding.total) * element / mesh["model"]
    weights = sizes.gathered + table / turns.layers
    move("all-gather", passes * forward, weights, "fsdp")
    move("reduce-scatter", passes, weights, "fsdp")
    move("all-reduce", turns.layers, 4 * weights / element / mesh["fsdp"], "replica", "data")
    if model.moe is not None and any(model.sparse):
        sparse = turns.all * sum(model.sparse) / mesh["stage"]
        if DISPATCHERS[model.moe.dispatcher].moves_tokens:
            move("all-to-all", 2 * sparse * (forward + 1), _slots(model.moe, 1) * vectors, "expert")
        else:
            experts = counts.experts.total / sum(model.sparse) * element / mesh["model"]
            move("all-gather", sparse * forward, experts, "expert")
    move("all-reduce", 2 * passes * (forward + 1), vectors, "model")
    keys = sizes.tokens * mesh["context"] * element * _keys(model) / mesh["model"]
    move("all-gather", passes * forward, keys, "context")
    move("reduce-scatter", passes, keys, "context")
    move("collective-permute", 3 * 2 * turns.all, vectors, "stage")
    return tuple(found)
