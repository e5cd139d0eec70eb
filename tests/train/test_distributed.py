"""Who takes part in a training, from flags and environments, and what is said when they do not come together."""

from __future__ import annotations

import socket
import threading

import jax
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.train import distributed
from sparse_lm.train.distributed import Cluster, HostsError, connect, detect, first_node

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "gpu[07-09],cpu1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_alone():
    assert detect({}) is None
    assert detect({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}) is None
    assert detect({"SLURM_NTASKS": "8"}) is None  # inside an allocation, and not started by srun
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert detect(SLURM, kind="none") is None


def test_arguments_come_first():
    assert detect(SLURM, "a.b:1234", 3, 2) == Cluster("a.b:1234", 3, 2)
    assert detect({}, "[::1]:1", 1, 0) == Cluster("[::1]:1", 1, 0)


@pytest.mark.parametrize("environment", [SLURM, {**SLURM, "TPU_WORKER_HOSTNAMES": "a,b"}])
def test_slurm(environment):
    made = detect(environment)
    assert made == Cluster("gpu07:61444", 4, 2)  # 61440 + 4100 modulo 4096
    assert str(made) == "gpu07:61444"


def test_tasks_of_a_slurm_node_take_a_device_each():
    made = detect({**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, kind="slurm")
    assert made is not None and made.local_devices == (1,)


def test_the_runtime_knows_the_workers_of_a_tpu():
    for environment in ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_NUM_SLICES": "2"}):
        assert detect(environment) == Cluster(None, None, None)
    assert detect({}, kind="tpu") == Cluster(None, None, None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,node002", "node001"),
        ("gpu[007-009,012],login", "gpu007"),
        ("gpu[012,007-009]", "gpu012"),
        ("rack1-n[5]", "rack1-n5"),
        ("n[1-2]-ib", "n1-ib"),
    ],
)
def test_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a:1", 2, None), "process=None: --coordinator=HOST:PORT, --processes=N and --process=I belong together"),
        ((None, 2, 0), "coordinator=None: "),
        (("a", 2, 0), "coordinator='a': is HOST:PORT"),
        (("a:b", 2, 0), "coordinator='a:b': is HOST:PORT"),
        (("a:70000", 2, 0), "is HOST:PORT"),
        (("a:1", 0, 0), "processes=0: must be at least 1"),
        (("a:1", 2, 2), "process=2: must be from 0 to 1, as there are processes=2"),
        ((None, None, None, "gke"), "cluster='gke': known: auto, tpu, slurm, none"),
        ((None, None, None, "slurm"), "there is no SLURM_PROCID: start it with srun"),
    ],
)
def test_what_cannot_be(arguments, says):
    with pytest.raises(ConfigError) as caught:
        detect({}, *arguments)
    assert says in str(caught.value)


def refuse(*_, **__):
    raise RuntimeError("no such slice")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def collectives():
    """What connecting sets for the whole process is put back."""
    before = jax.config.jax_cpu_collectives_implementation  # type: ignore[attr-defined]
    yield
    jax.config.update("jax_cpu_collectives_implementation", before)


@pytest.mark.usefixtures("collectives")
def test_what_is_handed_to_the_runtime(port):
    calls = []

    def initialize(*arguments, **options):
        calls.append((arguments, options))

    connect(Cluster(f"localhost:{port}", 2, 0, (1,), 40, 20), initialize)
    connect(Cluster(None, None, None), initialize)
    (arguments, options), (unknown, runtime) = calls
    assert arguments == (f"localhost:{port}", 2, 0) and unknown == (None, None, None)
    assert options == {
        "local_device_ids": (1,),
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 40 + distributed.GRACE,
        "heartbeat_timeout_seconds": 20,
    }
    assert runtime["cluster_detection_method"] is None
    assert jax.config.jax_cpu_collectives_implementation == "gloo"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("collectives")
def test_those_who_do_not_come(port):
    forever = threading.Event()

    def initialize(*_, **__):
        forever.wait(60)

    def says(cluster: Cluster) -> str:
        with pytest.raises(HostsError) as caught:
            connect(cluster, initialize)
        return str(caught.value)

    at = f"localhost:{port}"
    try:
        assert f"process 1 of 2 waited 1 s for the others at {at}: nothing answers there" in says(
            Cluster(at, 2, 1, init_timeout=1)
        )
        assert "fewer than 2 came; start the same command with every --process" in says(
            Cluster(at, 2, 0, init_timeout=1)
        )
        assert "on all workers of the slice" in says(Cluster(None, None, None, init_timeout=1))
        with socket.create_server(("", port)):
            assert "process 0 answers, but not all 3 came" in says(Cluster(at, 3, 1, init_timeout=1))
    finally:
        forever.set()


@pytest.mark.usefixtures("collectives")
def test_addresses_that_cannot_be(port):
    with pytest.raises(HostsError, match=r"coordinator nowhere\.invalid:1 cannot be found"):
        connect(Cluster("nowhere.invalid:1", 2, 1), refuse)
    with socket.create_server(("", port)), pytest.raises(HostsError, match=rf"process 0 cannot listen at \S+:{port}"):
        connect(Cluster(f"localhost:{port}", 2, 0), refuse)
    with pytest.raises(HostsError, match=r"this process cannot join the others at the address .*: no such slice"):
        connect(Cluster(None, None, None), refuse)
