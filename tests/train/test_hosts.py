"""What processes do together, as far as one process can show it; real ones are in test_train_together.py."""

from __future__ import annotations

import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from sparse_lm.config import ConfigError
from sparse_lm.sharding import DEFAULT, put
from sparse_lm.train import hosts


@pytest.fixture
def two(monkeypatch):
    """This process believes that it is the first of two, and the other one says what `two` was told to say."""
    others: list[object] = []

    def gathered(mine):
        return np.stack([mine, others[0] if others else mine])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    return others


@pytest.mark.parametrize(
    ("sizes", "halves"),
    [
        ({"data": 8}, [range(8), range(8, 16)]),
        ({"fsdp": 2, "expert": 4}, [range(8), range(8, 16)]),
        ({"data": 4, "model": 2}, [range(8), range(8, 16)]),
        ({"model": 8}, [range(16), range(16)]),
    ],
)
def test_rows_of_the_first_and_the_last_four_devices(mesh_of, sizes, halves):
    mesh = mesh_of(**sizes)
    devices = mesh.devices.flat
    found = [hosts.process_rows(mesh, DEFAULT, 16, part) for part in (devices[:4], devices[4:])]
    assert found == [tuple(half) for half in halves]
    assert hosts.process_rows(mesh, DEFAULT, 16) == tuple(range(16))  # all devices are this process's


def test_rows_of_devices_that_are_not_neighbours(mesh_of):
    mesh = mesh_of(data=4)
    assert hosts.process_rows(mesh, DEFAULT, 8, [mesh.devices.flat[i] for i in (3, 1)]) == (2, 3, 6, 7)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "expert": 2, "model": 2}])
def test_placed_rows_are_those_of_a_whole_array(mesh_of, sizes):
    mesh, x = mesh_of(**sizes), np.arange(16 * 3).reshape(16, 3)
    placed, whole = hosts.place(mesh, DEFAULT, x, tuple(range(16)), 16), put(mesh, DEFAULT, x, "B.")
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding == whole.sharding


def test_a_process_places_only_what_it_holds(mesh_of, monkeypatch):
    """Rows 2, 3, 6 and 7 stand one after the other in the process's part."""
    mesh, x = mesh_of(data=4), np.arange(8 * 3).reshape(8, 3)
    parts = []

    def make(shape, sharding, callback):
        for index in sharding.devices_indices_map(shape).values():
            if index[0].start in (2, 6):
                np.testing.assert_array_equal(callback(index), x[index])
                parts.append(index)
        return shape

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    assert hosts.place(mesh, DEFAULT, x[[2, 3, 6, 7]], (2, 3, 6, 7), 8) == (8, 3)
    assert len(parts) == 2


def test_alone_everything_is_agreed():
    hosts.agree({"config": object()})
    assert hosts.is_first()


def test_agreement_names_the_key_and_who_differs(two):
    hosts.agree({"config": "a", "data": "b"})
    kept = []
    real = multihost_utils.process_allgather
    multihost_utils.process_allgather = lambda mine: kept.append(mine) or real(mine)
    hosts.agree({"config": "a", "data": "c"})
    two.append(kept[0])
    hosts.agree({"config": "a", "data": "c"})
    with pytest.raises(
        ConfigError, match=r"data='b': process 0 and process 1 differ in it; start all with one command"
    ):
        hosts.agree({"config": "a", "data": "b"})
    with pytest.raises(ConfigError, match=r"config='x': process 0 and process 1"):
        hosts.agree({"config": "x", "data": "b"})


def test_a_file_that_all_see_and_one_that_this_one_does_not(tmp_path):
    (tmp_path / "there").touch()
    hosts.see(tmp_path / "there", 0)
    with pytest.raises(ConfigError, match=r"workdir=.*process 0 does not see the absent that process 0 has written"):
        hosts.see(tmp_path / "absent", 0)


def test_fetched_arrays_are_whole(mesh_of):
    x = np.arange(16).reshape(8, 2)
    found = hosts.fetch({"a": put(mesh_of(data=8), DEFAULT, x, "B."), "b": None})
    assert isinstance(found["a"], np.ndarray) and found["b"] is None
    np.testing.assert_array_equal(found["a"], x)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_stops_at_its_next_step(number, monkeypatch):
    usual: list[int] = []
    original = signal.signal(number, lambda number, _: usual.append(number))
    mine = signal.getsignal(number)
    try:
        with hosts.stop_requests() as stop:
            assert not stop(3)
            os.kill(os.getpid(), number)
            assert stop(4) and stop(5)
            os.kill(os.getpid(), number)  # the same request, passed on
            assert usual == []
            monkeypatch.setattr(hosts, "AGAIN_SECONDS", 0.0)
            os.kill(os.getpid(), number)  # somebody does not want to wait
            assert usual == [number]
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, original)


def test_of_several_processes_the_runtime_decides(two, monkeypatch):
    asked, term = [], []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or step == 9)
    before = signal.signal(signal.SIGTERM, lambda number, _: term.append(number))
    try:
        with hosts.stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert term == [signal.SIGTERM]  # the runtime's handler was left in place
            os.kill(os.getpid(), signal.SIGINT)
            assert term == [signal.SIGTERM] * 2  # and hears of Ctrl-C as well
            assert [stop(step) for step in (7, 8, 9)] == [False, False, True]
        assert asked == [7, 8, 9]
    finally:
        signal.signal(signal.SIGTERM, before)
