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
from sparse_lm.nn.mlp import GATED
from sparse_lm.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step.

    activations: bytes that the forward pass keeps for the backward one. working: bytes of the largest layer or of the
    loss while it is computed, and of weights gathered for it. flops: executed, with recomputation and empty slots.
    memory_bytes: moved to and from main memory. collectives: by kind and axes.
    """

    activations: int
    working: int
    flops: int
    memory_bytes: int
    collectives: tuple[Collective, ...]


def estimate(experiment: Experiment, mesh: Mapping[str, int], parameters: int, optimizer: int) -> Estimate:
    """The estimate of a resolved experiment on a mesh. parameters, optimizer: bytes of them on a device."""
    sizes = _Sizes.of(experiment, mesh)
    kept = {"none": sizes.inside, "full": sizes.tokens * sizes.width}.get(experiment.model.remat, sizes.products)
    layers, repeats = experiment.model.num_layers, experiment.train.accumulate
    working = max(sizes.logits, sizes.inside + 2 * sizes.gathered)
    if repeats > 1:
        working += parameters  # the sum of gradients beside those of the microbatch
    activations = layers * kept
    passes = 2 if experiment.model.remat == "none" else 3
    moved = 3 * (parameters + optimizer) + repeats * passes * layers * (2 * sizes.inside + 2 * sizes.gathered)
    return Estimate(
        activations=int(activations),
        working=int(working),
        flops=int(sizes.flops / math.prod(mesh.values())),
        memory_bytes=int(moved + 4 * repeats * sizes.logits),
        collectives=_moves(experiment, mesh, sizes, repeats),
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """tokens: of a device in one microbatch. width: bytes of an activation vector. The rest in bytes: what a layer
    computes (`inside`), of that the results of its products (`products`), its weights as they are used (`gathered`),
    and logits with their gradient. flops: executed by all devices in a step.
    """

    tokens: int
    width: int
    inside: float
    products: float
    gathered: float
    logits: float
    flops: float

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mapping[str, int]) -> _Sizes:
        """Of a resolved experiment on a mesh."""
        model, length = experiment.model, experiment.data.length
        parts = experiment.train.accumulate * math.prod(mesh[axis] for axis in TOKEN_AXES if axis in mesh)
        tokens = max(1, int(experiment.train.batch_size * length / parts))
        element = 2 if model.dtype == "bfloat16" else 4
        cut = mesh["model"]
        hidden, slots, experts = model.d_ff / cut, 0.0, 0.0
        if model.moe is not None:
            slots, experts = _slots(model.moe, mesh["expert"]), _slots(model.moe, 1)
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
        flops = _flops(experiment, experts)
        return cls(tokens, element * model.d_model, inside, products, gathered, logits, flops)


def _slots(moe: MoEConfig, devices: int) -> float:
    """Rows of experts per token: k times the capacity factor; all experts' where nothing is dropped and all have room.

    Without capacity a device has room for what all devices along `expert` could send it, if tokens move.
    """
    dispatcher = DISPATCHERS[moe.dispatcher]
    if not dispatcher.has_capacity:
        return float(moe.top_k * (devices if dispatcher.moves_tokens else 1))
    if moe.dispatcher == "dense" or moe.capacity_factor is None:
        return float(moe.num_experts)
    return min(moe.top_k * moe.capacity_factor, float(moe.num_experts))


def _heads(model: ModelConfig) -> float:
    """Numbers per token in queries, keys, values and what heads see."""
    both = score_widths(model)[0][0] / model.num_heads  # of a key and a value
    return (model.num_heads + model.kv_heads) * both


def _scores(model: ModelConfig, length: int) -> float:
    """Scores per token that exist at once: of a block of queries and one of keys, unless one array holds all.

    Kernels hold theirs on the chip; a block's are counted all the same. See `nn.attend.choose`.
    """
    heads = model.heads
    block = length if heads.implementation == "reference" or model.dropout > 0 else min(heads.block, length)
    return model.num_heads * block**2 / length


def _flops(experiment: Experiment, choices: float) -> float:
    """FLOPs that all devices execute in a step: the model's, empty slots, and the forward pass again with remat."""
    model, length = experiment.model, experiment.data.length
    counts = count(model)
    parts = {name: float(counts.part_flops(name, length)) for name in counts.parts()}
    if model.moe is not None:
        parts["experts"] *= choices / model.moe.top_k
    if model.remat == "full":
        parts = {name: flops * (1 if name == "unembedding" else 4 / 3) for name, flops in parts.items()}
    return experiment.train.batch_size * length * sum(parts.values())


def _moves(experiment: Experiment, mesh: Mapping[str, int], sizes: _Sizes, repeats: int) -> tuple[Collective, ...]:
    """Weights gathered and their gradients scattered over fsdp, gradients summed over data, slots exchanged."""
    model, layers = experiment.model, experiment.model.num_layers
    forward = 1 if model.remat == "none" else 2
    found = []
    element = 2 if model.dtype == "bfloat16" else 4
    counts = count(model)
    table = (counts.embedding.total + counts.unembedding.total) * element / mesh["model"]
    weights = int(layers * sizes.gathered + table)
    if mesh["fsdp"] > 1:
        found.append(Collective("all-gather", repeats * layers * forward, repeats * forward * weights, True, ("fsdp",)))
        found.append(Collective("reduce-scatter", repeats * layers, repeats * weights, True, ("fsdp",)))
    if mesh["data"] > 1:
        found.append(Collective("all-reduce", layers, 4 * weights // element // mesh["fsdp"], True, ("data",)))
    moe = model.moe
    if moe is not None and mesh["expert"] > 1:
        sparse = sum(model.sparse)
        if DISPATCHERS[moe.dispatcher].moves_tokens:
            slots = _slots(moe, 1) * sizes.tokens * sizes.width
            times = 2 * repeats * sparse * (forward + 1)
            found.append(Collective("all-to-all", times, int(times * slots), True, ("expert",)))
        else:
            experts = counts.experts.total * element / mesh["model"]
            found.append(
                Collective("all-gather", repeats * sparse, int(repeats * forward * experts), True, ("expert",))
            )
    if mesh["model"] > 1:
        times = 2 * repeats * layers * (forward + 1)
        found.append(Collective("all-reduce", times, times * sizes.tokens * sizes.width, True, ("model",)))
    return tuple(found)
