"""Tables of traffic by hand, and windows that hold every row once, whatever the loads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.moe.dispatch.traffic import Moves, Traffic
from sparse_lm.moe.grouped import Layout
from sparse_lm.sharding import DEFAULT


def test_received_rows_go_to_their_expert_by_sender():
    # Two senders, two own experts: 2 and 1 rows from the first, 1 and 2 from the second.
    traffic = Traffic(Moves.of(jnp.zeros((2, 2), jnp.int32)), jnp.asarray([[2, 1], [1, 2]]))
    side_by_side = Layout.of(jnp.asarray([3, 3]), size=1, total=8)
    np.testing.assert_array_equal(traffic.rows_in(side_by_side, 8), [0, 1, 3, 2, 4, 5, 8, 8])
    blocks = Layout.of(jnp.asarray([3, 3]), size=4, total=4)
    np.testing.assert_array_equal(traffic.rows_in(blocks, 8), [0, 1, 4, 2, 5, 6, 16, 16])


def test_moves_by_hand():
    moves = Moves.of(jnp.asarray([[1, 2], [3, 0]]))
    np.testing.assert_array_equal(moves.from_NN, [[0, 1], [0, 3]])
    np.testing.assert_array_equal(moves.to_NN, [[0, 0], [1, 2]])
    np.testing.assert_array_equal(moves.back.size_NN, [[1, 3], [2, 0]])
    np.testing.assert_array_equal(moves.back.from_NN, [[0, 1], [0, 2]])
    np.testing.assert_array_equal(moves.back.to_NN, [[0, 0], [1, 3]])


def test_a_window_by_hand():
    # To the first device 1 and 3 rows, to the second 2 and 0; it has two experts, of which this shows the first device.
    traffic = Traffic(Moves.of(jnp.asarray([[1, 2], [3, 0]])), jnp.asarray([[0, 1], [2, 1]]))
    second = traffic.window(2, room=2)  # the last two rows that the first device receives, none of the second's
    np.testing.assert_array_equal(second.moves.size_NN, [[0, 0], [2, 0]])
    np.testing.assert_array_equal(second.moves.from_NN, [[1, 3], [1, 3]])
    np.testing.assert_array_equal(second.moves.to_NN, [[0, 0], [0, 0]])
    np.testing.assert_array_equal(second.arriving_NE, [[0, 0], [1, 1]])


@given(st.lists(st.integers(0, 9), min_size=18, max_size=18), st.integers(1, 12))
def test_every_row_is_in_one_window_on_both_sides(counts, room):
    count_NNE = np.asarray(counts).reshape(3, 3, 2)  # from, to, expert
    moves = Moves.of(jnp.asarray(count_NNE.sum(2)))
    traffic = Traffic(moves, jnp.asarray(count_NNE[:, 1]))
    assert int(traffic.most) == count_NNE.sum((0, 2)).max()
    total = -(-int(traffic.most) // room)
    sent = [[] for _ in range(3)]
    arrived = np.zeros_like(count_NNE[:, 1])
    for number in range(total + 1):
        window = traffic.window(number * room, room)
        size, start, to = (np.asarray(one) for one in (window.moves.size_NN, window.moves.from_NN, window.moves.to_NN))
        assert size.min() >= 0 and (size.sum(0) <= room).all() and (number < total or size.sum() == 0)
        assert (np.diff(to, axis=0) >= 0).all() and (np.diff(start, axis=1) >= 0).all()
        np.testing.assert_array_equal(to[size > 0], (np.cumsum(size, 0) - size)[size > 0])
        np.testing.assert_array_equal(np.asarray(window.arriving_NE).sum(1), size[:, 1])
        for sender in range(3):
            for receiver in range(3):
                sent[sender] += range(start[sender, receiver], start[sender, receiver] + size[sender, receiver])
        arrived += np.asarray(window.arriving_NE)
    assert [sorted(rows) for rows in sent] == [list(range(n)) for n in count_NNE.sum((1, 2))]
    np.testing.assert_array_equal(arrived, count_NNE[:, 1])


def test_all_devices_know_the_longest_list_of_the_mesh(mesh_of):
    """The loads of the other half of the mesh count: a loop with exchanges ends everywhere at once."""

    def body(_, count_GX, __):
        return Traffic.of(count_GX[0]).most[None]

    counts = jnp.asarray([[1, 0], [0, 1], [9, 0], [0, 0]], jnp.int32)
    with jax.set_mesh(mesh_of(data=2, expert=2)):
        stored = DEFAULT.constrain(counts, "G.")
        found = jax.jit(lambda stored: DEFAULT.per_device(body, {}, stored, None))(stored)
    np.testing.assert_array_equal(found, [9, 9, 9, 9])
