"""Run directories with made-up but plausible numbers, for tests of the report and for looking at it.

`python tests/telemetry/telemetry_fake_run.py DIRECTORY` writes a few kinds of run there, each with its report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from sparse_lm.telemetry.report import write_report
from sparse_lm.telemetry.sinks import MetricsFile

DOMAINS = ("code", "documentation", "licences", "tests")


def layer_statistics(rng, share: float, layers: int, experts: int) -> dict:
    """Routing statistics of one step; `share` is how much of training is over. Expert 1 of layer 1 dies."""
    spread = 0.8 * np.exp(-4 * share) + 0.1
    weights = np.exp(spread * np.linspace(-1, 1, experts) + 0.05 * rng.normal(size=(layers, experts)))
    weights[0, min(1, experts - 1)] *= max(0.01, 1 - 2 * share)
    load = weights / weights.sum(axis=1, keepdims=True)
    centers = (np.arange(20) + 0.5) / 20
    gates = np.stack([np.exp(-(((centers - 0.4 - 0.5 * share) / (0.15 + 0.02 * n)) ** 2)) for n in range(layers)])
    return {
        "load": np.round(load, 5),
        "dropped": np.maximum(0, load * experts - 1.25).mean(axis=1),
        "entropy": np.log(experts) * (1 - 0.6 * share - 0.02 * np.arange(layers)),
        "gate_histogram": np.round(1000 * gates),
        "dropped_by_position": np.linspace(0, 0.2 * np.exp(-3 * share), 16),
    }


def train_rows(steps: int, layers: int, experts: int, seed: int = 0) -> list[dict]:
    """One row a step; `layers=0` is a dense model. Every `steps`/200-th row carries per-layer statistics."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        share = step / steps
        row = {"step": step, "split": "train", "loss": 2.1 + 2.4 * np.exp(-8 * share) + 0.08 * rng.normal()}
        row |= {"tokens_per_second": 41_000 + 900 * rng.normal(), "learning_rate": 3e-4 * min(1, 10 * share)}
        row |= {"gradient_norm": np.exp(0.4 * rng.normal() - share), "mfu": 0.31, "step_seconds": 0.1}
        row |= {"nonfinite_steps": 0, "seconds": 0.1 * step}
        if layers:
            statistics = layer_statistics(rng, share, layers, experts)
            load = statistics["load"] * experts
            row |= {"dropped_fraction": statistics["dropped"].mean(), "max_violation": (load.max(axis=1) - 1).mean()}
            row |= {"load_balance": 1 + 0.4 * np.exp(-5 * share) + 0.01 * rng.normal(), "router_z": 2.0 + share}
            row["router_entropy"] = statistics["entropy"].mean()
            if step % max(1, steps // 200) == 0:
                row["layers"] = statistics
        rows.append(row)
    return rows


def validation_rows(steps: int, every: int, domains=DOMAINS, best: float | None = 2.0) -> list[dict]:
    """One row every `every` steps."""
    rows = []
    for step in range(every, steps + 1, every):
        loss = 2.15 + 2.4 * np.exp(-8 * step / steps)
        by_domain = {name: loss + 0.2 * i - 0.3 for i, name in enumerate(domains)}
        gap = None if best is None else loss - best
        row = {"step": step, "split": "validation", "loss": loss, "bits_per_byte": loss / 2.6, "entropy_gap": gap}
        rows.append({**row, "losses_by_domain": by_domain, "dropped_fraction": 0.01, "max_violation": 0.2})
    return rows


def info(steps: int) -> dict:
    """A config.json."""
    model = {"layers": 6, "width": 256, "moe": {"kind": "top_k", "experts": 8, "top_k": 2, "balance": None}}
    return {
        "config": {"seed": 0, "train": {"steps": steps, "batch_size": 16}, "model": model, "mesh": {"data": -1}},
        "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11.9"},
        "git": {"commit": "0123abc", "dirty": False},
        "device": {"platform": "cpu", "count": 1},
        "data": {"fingerprint": "f00d", "domains": list(DOMAINS), "report": ["4096 documents", "0 bytes invalid"]},
        "parameters": {"total": 12_345_678, "active": 4_567_890, "flops_per_token": 27_407_340},
    }


def write_run(directory: Path, train: list[dict], validation: list[dict], steps: int) -> Path:
    """Writes config.json and metrics.jsonl; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(info(steps)))
    metrics = MetricsFile(directory / "metrics.jsonl")
    for row in sorted([*train, *validation], key=lambda row: row["step"]):
        metrics.append(row)
    metrics.close()
    return directory


def main(directory: Path) -> None:
    """Writes runs of several kinds with their reports."""
    runs = {
        "sparse": (train_rows(2000, 2, 8), validation_rows(2000, 100), 2000),
        "dense": (train_rows(2000, 0, 0), validation_rows(2000, 200, best=None), 2000),
        "three": (train_rows(3, 2, 4), [], 1000),
        "wide": (train_rows(5000, 6, 32), validation_rows(5000, 500), 10000),
        "many": (train_rows(400, 24, 256), validation_rows(400, 100, [f"domain {i}" for i in range(12)]), 400),
    }
    for name, (train, validation, steps) in runs.items():
        path = write_report(write_run(directory / name, train, validation, steps))
        print(path, f"{path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
