"""The machine: its processor is read where the system tells it, and there is an answer everywhere."""

from __future__ import annotations

import importlib.metadata
import os

from sparse_lm.telemetry.machine import cpu_cores, cpu_model, version


def test_the_cpu_is_read_where_it_stands(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    assert cpu_model(file) == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "absent")
    file.write_text("processor : 0\n")
    assert cpu_model(file)


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cpu_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cpu_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_cores() == 1


def test_a_version_is_that_of_an_installed_package():
    assert version("jax") == importlib.metadata.version("jax")
    assert version("no-such-package-anywhere") is None
