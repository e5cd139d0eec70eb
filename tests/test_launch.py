"""The launch files: they are valid, and a dry run prints the commands that would start a training."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".yaml")
TRAIN = ("--config=configs/quickstart.py", "--workdir=/shared/my run")


def dry_run(script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """The words of each command that would be run."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **variables}
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def fails(script: str, *arguments: str, **variables: str) -> str:
    command = ["bash", str(LAUNCH / script), *arguments]
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_valid_bash_that_stops_at_errors(script):
    text = (LAUNCH / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True).returncode == 0


def test_all_of_them_are_here():
    assert SCRIPTS == ["local.sh", "slurm.sbatch", "tpu_pod.sh", "xpk.sh"]


def test_processes_on_this_machine():
    where = ["--coordinator=localhost:1234", "--processes=2"]
    assert dry_run("local.sh", "2", *TRAIN, PORT="1234", PYTHON="py") == [
        ["py", "experiments/train.py", *TRAIN, *where, f"--process={i}"] for i in (0, 1)
    ]
    assert "usage: launch/local.sh PROCESSES" in fails("local.sh")


def test_the_worst_status_is_that_of_all(tmp_path):
    """With a Python that ends with the number of its process."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\nlast="${*: -1}"\nexit "${last#--process=}"\n')
    fake.chmod(0o755)
    command = ["bash", str(LAUNCH / "local.sh"), "4", *TRAIN]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], "PYTHON": str(fake)}, timeout=20)
    assert done.returncode == 3


def test_slurm():
    (command,) = dry_run("slurm.sbatch", *TRAIN, PYTHON="py")
    assert command == ["srun", "--kill-on-bad-exit=0", "--label", "py", "experiments/train.py", "--supervise", *TRAIN]
    options = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH ")]
    assert "#SBATCH --ntasks-per-node=1" in options and "#SBATCH --signal=TERM@120" in options
    assert "usage: sbatch launch/slurm.sbatch" in fails("slurm.sbatch")


POD = {"NAME": "moe", "ZONE": "us-central1-a", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}


def test_a_slice_is_requested():
    (command,) = dry_run("tpu_pod.sh", "create", "--spot", PROJECT="lab", **POD)
    assert command == shlex.split(
        "gcloud compute tpus queued-resources create moe --node-id=moe --zone=us-central1-a --project=lab "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    (status,) = dry_run("tpu_pod.sh", "status", **POD)
    assert status[:6] == ["gcloud", "compute", "tpus", "queued-resources", "describe", "moe"]
    (delete,) = dry_run("tpu_pod.sh", "delete", **POD)
    assert delete[4:] == ["delete", "moe", "--zone=us-central1-a", "--force"]


def test_every_host_of_a_slice_is_set_up_and_trains():
    archive, copy, install = dry_run("tpu_pod.sh", "setup", MOUNT="sudo mount a:/b /mnt", **POD)
    assert archive[:2] == ["git", "archive"] and copy[4:7] == ["scp", "sparse_lm.tar.gz", "moe:"]
    assert "--worker=all" in copy and "--worker=all" in install
    assert install[-1].startswith("--command=sudo mount a:/b /mnt && tar xzf sparse_lm.tar.gz && cd sparse_lm && ")
    (train,) = dry_run("tpu_pod.sh", "train", *TRAIN, **POD)
    assert train[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "moe", "--zone=us-central1-a"]
    remote = shlex.split(train[-1].removeprefix("--command="))
    assert remote == ["cd", "sparse_lm", "&&", ".venv/bin/python", "experiments/train.py", "--cluster=tpu",
                      "--supervise", *TRAIN]  # fmt: skip


def test_what_a_slice_lacks_is_named():
    assert "name the zone" in fails("tpu_pod.sh", "create", NAME="moe")
    assert "ACCELERATOR" in fails("tpu_pod.sh", "create", NAME="moe", ZONE="z", DRY_RUN="1")
    assert "launch/tpu_pod.sh create [--spot]" in fails("tpu_pod.sh")
    assert "launch/tpu_pod.sh create [--spot]" in fails("tpu_pod.sh", "fly", **POD)


def test_xpk():
    (command,) = dry_run(
        "xpk.sh", "moe-a", *TRAIN, CLUSTER="pods", ZONE="z", SLICES="2", XPK_ARGS="--spot --priority=high"
    )
    assert command[:-1] == shlex.split(
        "xpk workload create --workload=moe-a --cluster=pods --zone=z --tpu-type=v5litepod-16 --num-slices=2 "
        "--base-docker-image=python:3.11 --script-dir=. --spot --priority=high"
    )
    remote = shlex.split(command[-1].removeprefix("--command=").split("&& ")[1])
    assert remote == ["python", "experiments/train.py", "--cluster=tpu", *TRAIN]
    assert "name the cluster" in fails("xpk.sh", "moe-a", *TRAIN)


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["envs"]["BUCKET"] is None and task["workdir"] == "."
    assert task["file_mounts"]["/shared"] == {"name": "${BUCKET}", "mode": "MOUNT"}
    script = task["run"].replace(".venv/bin/python", "printf '%s\\n'")
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    given = {"ARGS": TRAIN[0], "RUN": "my run", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-euc", script], env=variables | given, capture_output=True, text=True, timeout=20)
    assert done.stdout.splitlines() == [
        "experiments/train.py", *TRAIN, "--supervise", "--coordinator=10.0.0.1:29500", "--processes=2", "--process=1"
    ]  # fmt: skip
