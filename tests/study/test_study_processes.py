"""Processes side by side: each has its shard, statuses are kept, signals are passed on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import study_cases

from sparse_lm.config import ConfigError
from sparse_lm.study.plan import make_plan
from sparse_lm.study.processes import check_side_by_side, run_processes
from sparse_lm.study.runner import Shard
from sparse_lm.study.study import SCALES, Scale

NOTE = "import sys, pathlib; pathlib.Path(sys.argv[1], sys.argv[2].split('=')[1].replace('/', 'of')).touch()"


def test_every_part_is_started_once(tmp_path):
    command = [sys.executable, "-c", NOTE, str(tmp_path)]
    assert run_processes(command, Shard(1, 2), 2, os.environ) == (0, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1of4", "3of4"]


@pytest.mark.parametrize(("number", "given", "threads"), [(1, {}, 6), (2, {}, 3), (8, {}, 1), (2, {"NPROC": "5"}, 5)])
def test_processes_share_the_cores(number, given, threads, monkeypatch):
    """The status says how many threads XLA would take."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    command = [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['NPROC']))"]
    assert run_processes(command, Shard(), number, given) == (threads, False)


def test_the_worst_status_is_kept():
    command = [sys.executable, "-c", "import sys; sys.exit(3 if sys.argv[1].startswith('--shard=1/') else 0)"]
    assert run_processes(command, Shard(), 2, os.environ) == (3, False)


def test_a_signal_reaches_the_processes(tmp_path):
    # Each says that it is ready, and ends with 0 only if a SIGTERM comes.
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
        f"pathlib.Path({str(tmp_path)!r}, sys.argv[1][-3]).touch(); time.sleep(60); sys.exit(9)"
    )

    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_processes([sys.executable, "-c", code], Shard(), 2, os.environ) == (0, True)
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before


def test_equal_time_wants_the_machine_for_itself():
    study = study_cases.study()
    base = study.scales["toy"].base.replace(optim__schedule="constant")
    timed = make_plan(study_cases.study(budget="time", scales=dict.fromkeys(SCALES, Scale(base, 1))), "toy")
    check_side_by_side(study_cases.plan(), "parallel", 4)
    for key, value in (("parallel", 2), ("ray", "local")):
        with pytest.raises(ConfigError, match=f"{key}={value!r}: equal wall time"):
            check_side_by_side(timed, key, value)
