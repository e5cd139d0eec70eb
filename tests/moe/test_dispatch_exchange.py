"""The ragged exchange against a loop over devices, its gradient, and what the collective of GPUs and TPUs is told."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.dispatch import exchange as module
from sparse_lm.moe.dispatch.exchange import exchange, move
from sparse_lm.moe.dispatch.traffic import Moves, Traffic
from sparse_lm.sharding import DEFAULT

N, ROWS, ROOM, WIDTH = 4, 6, 24, 3
SIZES = {
    "mixed": [[1, 2, 0, 3], [0, 0, 0, 0], [2, 1, 1, 1], [0, 6, 0, 0]],
    "all_to_one": [[0, 0, 6, 0]] * 4,
    "nothing": [[0] * 4] * 4,
    "to_myself": np.diag([6, 1, 0, 3]).tolist(),
    "even": [[1, 1, 1, 1]] * 4,
}


def looped(x, size):
    """x: [N, ROWS, ...]. Device j gets from every i in turn what i has for it; zeros behind."""
    out = np.zeros((N, ROOM, *x.shape[2:]), x.dtype)
    for j in range(N):
        parts = [x[i, sum(size[i][:j]) : sum(size[i][: j + 1])] for i in range(N)]
        joined = np.concatenate(parts)
        out[j, : len(joined)] = joined
    return out


def rows_of(seed, size):
    """Random rows, as many as each device sends; what stands behind them must go nowhere, so it is large."""
    x = np.random.default_rng(seed).normal(size=(N, ROWS, WIDTH)).astype(np.float32)
    for i in range(N):
        x[i, sum(size[i]) :] = 1e9
    return x


@pytest.fixture(scope="module")
def mesh(mesh_of):
    return mesh_of(expert=N)


@functools.cache
def program(function):
    """The function on every device's part of arrays [N, ...]; compiled once for all tables."""

    def body(_, parts, __):
        return jax.tree.map(lambda y: y[None], function(*(part[0] for part in parts)))

    return jax.jit(lambda stored: DEFAULT.per_device(body, {}, stored, None))


def on_devices(mesh, function, *arrays):
    with jax.set_mesh(mesh):
        stored = tuple(DEFAULT.constrain(jnp.asarray(x), "G" + "." * (x.ndim - 1)) for x in arrays)
        return program(function)(stored)


def there(x_RD, size_NN):
    """Values and gradient of an exchange of which every element counts differently."""
    weight = jnp.sin(jnp.arange(ROOM * WIDTH, dtype=jnp.float32)).reshape(ROOM, WIDTH)
    y, pull = jax.vjp(lambda x: exchange(x, Moves.of(size_NN), ROOM), x_RD)
    return y, pull(jnp.zeros_like(y) + weight + jax.lax.axis_index("expert"))[0]


def table(size):
    """The same table on every device."""
    return np.broadcast_to(np.asarray(size, np.int32), (N, N, N))


@pytest.mark.parametrize("name", SIZES)
def test_rows_arrive_sorted_by_sender_and_gradients_take_the_way_back(name, mesh):
    size, x = SIZES[name], rows_of(0, SIZES[name])
    got, gradient = on_devices(mesh, there, x, table(size))
    np.testing.assert_array_equal(got, looped(x, size))
    # The weight of each sent element is where it went; what was not sent has none.
    weight = np.sin(np.arange(ROOM * WIDTH, dtype=np.float32)).reshape(ROOM, WIDTH) + np.arange(N)[:, None, None]
    expected = np.zeros_like(x)
    for i in range(N):
        for j in range(N):
            at, to = sum(size[i][:j]), sum(size[before][j] for before in range(i))
            expected[i, at : at + size[i][j]] = weight[j, to : to + size[i][j]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_there_and_back_is_the_identity(mesh):
    size, x = SIZES["mixed"], rows_of(1, SIZES["mixed"])

    def both(x_RD, size_NN):
        moves = Moves.of(size_NN)
        return exchange(exchange(x_RD, moves, ROOM), moves.back, ROWS)

    got = on_devices(mesh, both, x, table(size))
    np.testing.assert_array_equal(got, np.where(x < 1e8, x, 0))


def test_numbers_move_like_rows(mesh):
    size = SIZES["mixed"]
    x = np.arange(N * ROWS, dtype=np.int32).reshape(N, ROWS, 1)
    got = on_devices(mesh, lambda x, size_NN: move(x, Moves.of(size_NN), ROOM), x, table(size))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, looped(x, size))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_windows_together_are_all_rows_in_turn(platform, mesh, monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: platform)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", as_documented)
    size, room = SIZES["all_to_one"], 5
    x, whole = rows_of(3, size), looped(rows_of(3, size), size)

    def one(number):
        def there_and_back(x_RD, size_NN):
            here = jnp.zeros((N, 1), jnp.int32)  # what arrives does not matter for the exchange
            moves = Traffic(Moves.of(size_NN), here).window(number * room, room).moves
            y_RD = exchange(x_RD, moves, room)
            return y_RD, exchange(y_RD, moves.back, ROWS)

        return there_and_back

    seen = [on_devices(mesh, one(number), x, table(size)) for number in range(5)]  # 24 rows for one device
    np.testing.assert_array_equal(np.concatenate([there for there, _ in seen], axis=1)[:, :ROOM], whole)
    np.testing.assert_array_equal(sum(back for _, back in seen), np.where(x < 1e8, x, 0))


def as_documented(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups
):
    """What the documentation of `jax.lax.ragged_all_to_all` says, slice by slice."""
    everyone, starts, sizes, places = (
        jax.lax.all_gather(x, axis_name, axis_index_groups=axis_index_groups)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    here = jax.lax.axis_index(axis_name) % N
    row = jnp.arange(output.shape[0])
    for sender in range(N):
        number = row - places[sender, here]
        # Both sides have to say the same size.
        agreed = jnp.where(sizes[sender, here] == recv_sizes[sender], recv_sizes[sender], -(10**6))
        taken = everyone[sender].at[starts[sender, here] + number].get(mode="clip")
        output = jnp.where(((number >= 0) & (number < agreed))[:, None], taken, output)
    return output


def test_the_collective_of_accelerators_is_told_the_same(mesh, monkeypatch):
    called = []

    def stand_in(*arguments, **options):
        called.append(options)
        return as_documented(*arguments, **options)

    monkeypatch.setattr(module, "platform", lambda: "tpu")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", stand_in)

    def by_collective(x_RD, size_NN):
        return there(x_RD, size_NN)

    for size in SIZES.values():
        x = rows_of(2, size)
        got = on_devices(mesh, by_collective, x, table(size))
        np.testing.assert_array_equal(got[0], looped(x, size))
        np.testing.assert_allclose(got[1], on_devices(mesh, there, x, table(size))[1], rtol=1e-6)
    assert called == [{"axis_name": "expert", "axis_index_groups": None}] * 2  # traced once


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_runs_of_devices_exchange_among_themselves(platform, mesh_of, monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: platform)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", as_documented)
    first, second = ((rows_of(seed, SIZES[name]), SIZES[name]) for seed, name in enumerate(("mixed", "all_to_one")))
    rows, tables = np.concatenate([first[0], second[0]]), np.concatenate([table(first[1]), table(second[1])])
    got = on_devices(mesh_of(expert=2 * N), lambda x_RD, size_NN: move(x_RD, Moves.of(size_NN), ROOM), rows, tables)
    np.testing.assert_array_equal(got, np.concatenate([looped(*first), looped(*second)]))
