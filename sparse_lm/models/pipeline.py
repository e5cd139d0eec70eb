"""Pipeline parallelism: groups of layers on different devices, through which microbatches flow.

The schedule is GPipe's (Huang et al. 2019, 1811.06965): with S stages and M microbatches a pass has M + S - 1 turns.
In each of them every stage runs its layers on one microbatch and hands it to the next stage; in S - 1 of them a stage
has nothing to do, a share of (S - 1) / (M + S - 1), the bubble. The backward pass is the transpose, turn by turn.

What is not part of a group, namely the embedding, layers of other kinds (the first dense ones, for example), the last
norm and the head, is on all stages, each of which computes it for M / S of the microbatches. So stage s begins and ends
with the microbatches s M / S to (s + 1) M / S: in every turn those that wait move one stage down, to the first one,
and those that are done move down from the last one into the places that this leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.mesh import axis_index, manual_axis_size
from sparse_lm.models.block import Context
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder, row_context
from sparse_lm.models.reports import Reports, concatenate, join
from sparse_lm.models.stack import Carry, Unit, segments
from sparse_lm.nn.dropout import split_keys
from sparse_lm.sharding import staged

Readout = Callable[[Decoder, jax.Array, jax.Array], jax.Array]


class Microbatches(NamedTuple):
    """M microbatches [M, B, L], or one of them [B, L]; see `Batch`. labels: for the readout only.

    key: one for each microbatch [M]; None is evaluation.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    labels: jax.Array
    key: jax.Array | None

    def at(self, number: jax.Array) -> Microbatches:
        """One of them."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), self)

    def context(self, live: jax.Array | bool = True) -> Context:
        """What the layers see of one microbatch; nothing but padding where it is not `live`."""
        return row_context(self.tokens, jnp.where(live, self.segments, 0), self.positions)


def pipelined_segment(config: ModelConfig, stages: int) -> int:
    """Which segment of the stack's plan is cut into stages: that with most layers; the others are outside.

    Raises `ConfigError` where its units (layers, or patterns of layers that repeat) are no multiple of the stages.
    """
    plan = segments(config.layers, config.period)
    place = max(range(len(plan)), key=lambda i: plan[i][0] * len(plan[i][1]))
    repeats, pattern = plan[place]
    if repeats % stages:
        outside = len(config.layers) - repeats * len(pattern)
        raise ConfigError(
            "model.num_layers",
            config.num_layers,
            f"has {repeats} units of {len(pattern)} equal layers each, {outside} layers aside, which mesh.stage="
            f"{stages} does not divide: the kinds of layers have to repeat from stage to stage; choose "
            f"{outside + max(1, repeats // stages) * stages * len(pattern)} layers, or another mesh.stage",
        )
    return place


def pipelined(model: Decoder, inputs: Microbatches, readout: Readout) -> tuple[jax.Array, Reports]:
    """What `readout` makes of each of M microbatches [M, ...], and their reports, as those of one larger batch.

    readout: (model, activations behind the last norm, labels) of a microbatch -> an array. Numbers, noise and reports
    are those that the microbatches have one by one. Raises `ConfigError` where stages divide neither M nor the layers.
    """
    stages, number = manual_axis_size("stage"), len(inputs.tokens)
    place = pipelined_segment(model.config, stages)
    if number % stages:
        raise ConfigError("train.accumulate", number, f"must be a multiple of mesh.stage={stages}")
    shared = jax.tree.map(lambda leaf: leaf, model)  # other modules around the same arrays
    own, shared.stack.units[place] = shared.stack.units[place], nnx.List([])

    def body(own: Unit, shared: tuple[Decoder, Microbatches]):
        return Stage(*shared, own, place, readout).run()

    read, inside, *outside = model.rules.per_stage(body, own, (shared, inputs))
    before, after = (join(staged(part, cut=False), model.rules) for part in outside)
    return read, concatenate([before, staged(inside, cut=False), after])


class Stage(NamedTuple):
    """What one stage does. own: its units of the segment at `place`; those of the others are in the model."""

    model: Decoder
    inputs: Microbatches
    own: Unit
    place: int
    readout: Readout

    def run(self) -> tuple[jax.Array, Reports, Reports, Reports]:
        """What is read of the microbatches that end here, and the reports of layers inside, before and after."""
        rules, number = self.model.rules, len(self.inputs.tokens) // manual_axis_size("stage")
        mine = axis_index("stage") * number + jnp.arange(number)
        _, (stream, before) = jax.lax.scan(lambda _, which: (None, self._before(which)), None, mine)
        stream, inside = self._through(stream)
        _, (read, after) = jax.lax.scan(lambda _, x: (None, self._after(*x)), None, (mine, stream))
        alone = jax.tree.map(lambda leaf: leaf[None], (join(before, rules), join(after, rules)))
        return read, join(inside, rules), *alone

    def _before(self, which: jax.Array) -> tuple[Carry, Reports]:
        """What a microbatch brings to the pipeline."""
        one = self.inputs.at(which)
        context, stack = one.context(), self.model.stack
        embed_key, stack_key = split_keys(one.key, 2)
        x_BLD = self.model.embed(context, embed_key)
        return self._outside(range(self.place), (x_BLD, stack.nothing_carried(x_BLD)), context, stack_key)

    def _after(self, which: jax.Array, carry: Carry) -> tuple[jax.Array, Reports]:
        """What is read of a microbatch that has passed it."""
        one, model = self.inputs.at(which), self.model
        later = range(self.place + 1, len(model.stack.plan))
        carry, reports = self._outside(later, carry, one.context(), split_keys(one.key, 2)[1])
        return self.readout(model, model.normed(carry[0]), one.labels), reports

    def _outside(self, places: range, carry: Carry, context: Context, key: jax.Array | None) -> tuple[Carry, Reports]:
        stack, reports = self.model.stack, []
        keys = stack.layer_keys(key)
        for place in places:
            carry, (report, _) = stack.run(carry, context, (stack.units[place], keys[place], None, None))
            reports.append(report)
        return carry, concatenate(reports)

    def _through(self, stream: Carry) -> tuple[Carry, Reports]:
        """Microbatches that begin here -> those that end here, and reports of all that come by [turns, layers, ...].

        In place t mod P of P the oldest one waits in turn t; when it leaves, one that is done takes the place. A stage
        without a microbatch works on activations of another, all of which it takes for padding, so that nothing that
        is not finite can come of it, and counts nothing.
        """
        stage, stages, number = axis_index("stage"), manual_axis_size("stage"), len(self.inputs.tokens)
        waiting, last = number // stages, stage == stages - 1
        onwards, back = ([(s, s + 1) for s in range(stages - 1)], [(s + 1, s) for s in range(stages - 1)])

        def turn(carry, number_of_turn):
            arrived, stream = carry
            place, which = number_of_turn % waiting, number_of_turn - stage
            oldest = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), stream)
            live = (which >= 0) & (which < number)
            given = _choose(stage == 0, oldest, arrived)
            done, reports = self._group(given, self.inputs.at(jnp.clip(which, 0, number - 1)), live)
            arrived, moved = _permute(done, onwards), _choose(last, done, _permute(oldest, back))
            stream = jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, place, 0), stream, moved)
            return (arrived, stream), jax.tree.map(lambda leaf: jnp.where(live, leaf, 0), reports)

        start = (jax.tree.map(lambda x: x[0], stream), stream)
        (_, stream), reports = jax.lax.scan(turn, start, jnp.arange(number + stages - 1))
        # The first one that ends here did so in turn `stages - 1` after a multiple of P.
        return jax.tree.map(lambda x: jnp.roll(x, -((stages - 1) % waiting), axis=0), stream), reports

    def _group(self, carry: Carry, one: Microbatches, live: jax.Array) -> tuple[Carry, Reports]:
        """This stage's layers on a microbatch."""
        stack, units = self.model.stack, len(jax.tree.leaves(self.own)[0])
        keys = stack.layer_keys(split_keys(one.key, 2)[1])[self.place]
        if keys is not None:
            keys = jax.lax.dynamic_slice_in_dim(keys, axis_index("stage") * units, units)
        carry, (reports, _) = stack.run(carry, one.context(live), (self.own, keys, None, None))
        return carry, reports


def _choose(first: jax.Array | bool, one: Carry, other: Carry) -> Carry:
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)


def _permute(carry: Carry, pairs: list[tuple[int, int]]) -> Carry:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "stage", pairs), carry)
