"""Expert parallelism without a capacity: experts stay, and exactly the rows that there are go to them and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_lm.mesh import varying
from sparse_lm.moe.dispatch.base import in_chunks
from sparse_lm.moe.dispatch.dropless import Dropless, experts_on_rows, loads, sorted_routes
from sparse_lm.moe.dispatch.exchange import exchange, move
from sparse_lm.moe.dispatch.gather import permuted
from sparse_lm.moe.dispatch.hot import Hot, sharing
from sparse_lm.moe.dispatch.traffic import Traffic
from sparse_lm.moe.grouped import Kernel, before

FURTHER = "further_windows"  # the name scope of the loop over them, for whoever reads compiled programs
PART = 4  # a further window has this part of the first one's room, so that it adds little to what is held


class RaggedAllToAll(Dropless):
    """Sorts by destination, tells all devices the counts, exchanges, sorts by expert, and takes the same way back.

    All devices may choose the experts of one, which then has to compute what all of them have: nothing is dropped,
    whatever the mesh. It has room for `exchange_room` times its even share, and takes what is more in further, smaller
    windows, so that loads change how long it takes and nothing else. With `exchange_chunks` above 1 it does
    all of that for a part of every group's tokens at a time. `hot_copies`: see `dispatch.hot`.
    """

    moves_tokens = True

    def local(self, experts, x_GSD, decision, ids_GS, key):
        """See `Dispatcher.local`."""
        if sharing(experts.num_experts, self.hot_copies) == 1:  # this device has all experts
            return super().local(experts, x_GSD, decision, ids_GS, key)
        # Nothing is dropped, so that the tokens of a chunk know nothing of the others.
        tokens = (x_GSD, decision, ids_GS)
        return in_chunks(lambda part: self._chunk(experts, part, key), tokens, self.exchange_chunks)

    def _chunk(self, experts, tokens, key):
        x_GSD, decision, ids_GS = tokens
        rows = decision.expert_GSK.size
        hot = Hot.of(decision, experts.num_experts, self.hot_copies)
        choice = hot.renumbered(decision)
        count_X = loads(choice, hot.each * hot.devices)
        routes = sorted_routes(choice, count_X, before(count_X), rows)
        most = hot.room(rows)
        room = min(most, math.ceil(self.exchange_room * rows))
        drops = key is not None and experts.dropout_rate > 0
        facts = Facts(
            Traffic.of(count_X), hot.numbered(), routes.ids(ids_GS)[0] if drops else None, key if drops else None
        )
        # Declared to differ before and not in a window, so that gradients are summed over devices once, behind all.
        experts, x_AD = jax.tree.map(varying, (hot.with_copies(experts), routes.to_slots(x_GSD)[0]))
        y_AD = _window((self.kernel, room), experts, x_AD, facts, 0)
        if room < most:
            with jax.named_scope(FURTHER):
                y_AD = _further((self.kernel, room, -(-room // PART)), experts, x_AD, y_AD, facts)
            assert isinstance(y_AD, jax.Array)
        return routes.combine(y_AD[None]), decision.expert_GSK >= 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Facts:
    """Of all rows A that this device sends, sorted by destination and expert.

    number_E: which of all experts those are that it computes. ids_A, key: for expert dropout, the token of each row; or
    None.
    """

    traffic: Traffic
    number_E: Int[Array, "E"]
    ids_A: Int[Array, "A"] | None
    key: jax.Array | None


def _window(how: tuple[Kernel, int], experts, x_AD: jax.Array, facts: Facts, start: jax.Array | int) -> jax.Array:
    """What the experts make of the rows in one window, for those of this device; 0 for rows that are not in it.

    how: (kernel, rows of the window).
    """
    kernel, room = how
    traffic = facts.traffic.window(start, room)
    layout = kernel.layout(jnp.sum(traffic.arriving_NE, axis=0), room)
    row_Q = traffic.rows_in(layout, room)
    x_RD, from_R = permuted(exchange(x_AD, traffic.moves, room), row_Q, layout.rows)
    ids_R = None
    if facts.ids_A is not None:
        ids_Q = move(facts.ids_A[:, None], traffic.moves, room)[:, 0]
        ids_R = ids_Q.at[from_R].get(mode="fill", fill_value=0) * experts.num_experts
        ids_R += facts.number_E.at[layout.expert_R].get(mode="clip")
    y_RD = experts_on_rows(experts, x_RD, (layout, kernel), ids_R, facts.key)
    y_QD, _ = permuted(y_RD, from_R, room)
    return exchange(y_QD, traffic.moves.back, x_AD.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(how, experts, x_AD, y_AD, facts):
    """y_AD with the rows of all windows but the first, in a loop that ends with the last row of the fullest device.

    how: (kernel, rows of the first window, rows of each other). The gradient computes a window anew before it takes it
    back: a loop of unknown length can keep nothing.
    """

    def more(start, y_AD):
        return y_AD + _window((how[0], how[2]), experts, x_AD, facts, start)

    return _over_windows(how, facts, more, y_AD)


def _further_forward(how, experts, x_AD, y_AD, facts):
    return _further(how, experts, x_AD, y_AD, facts), (experts, x_AD, facts)


def _further_backward(how, saved, dy_AD):
    experts, x_AD, facts = saved

    def more(start, gradients):
        window = functools.partial(_window, (how[0], how[2]), facts=facts, start=start)
        return jax.tree.map(jnp.add, gradients, jax.vjp(window, experts, x_AD)[1](dy_AD))

    nothing = jax.tree.map(lambda leaf: varying(jnp.zeros_like(leaf)), (experts, x_AD))
    return *_over_windows(how, facts, more, nothing), dy_AD, None


def _over_windows(how, facts: Facts, more: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """`carry = more(first row, carry)` for all windows but the first."""
    _, first, room = how
    number = jnp.maximum(facts.traffic.most - first + room - 1, 0) // room
    return jax.lax.fori_loop(0, number, lambda turn, carry: more(first + turn * room, carry), carry)


_further.defvjp(_further_forward, _further_backward)
