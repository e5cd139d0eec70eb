"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sparse_lm.bench.against import train_step_against
from sparse_lm.bench.experts import experts
from sparse_lm.bench.harness import Options, Report, Row, report, system_load
from sparse_lm.bench.layers import moe_layer
from sparse_lm.bench.startup import startup
from sparse_lm.bench.steps import train_step
from sparse_lm.config import ConfigError, closest


class Benchmark(NamedTuple):
    """measure: raises `ConfigError` on options that it cannot serve. about: what is compared, in a line."""

    measure: Callable[[Options], Sequence[Row]]
    about: str


def step(options: Options) -> Sequence[Row]:
    """The train step against what the options name: see `Options.against`."""
    return train_step(options) if options.against is None else train_step_against(options)


# `startup` first: its processes need the accelerator, which this one holds from its first computation on.
BENCHMARKS = {
    "startup": Benchmark(startup, "from nothing to the first train step: a cold compilation cache against a warm one"),
    "moe_layer": Benchmark(moe_layer, "forward and backward of the MoE layer against a dense layer of the same FLOPs"),
    "train_step": Benchmark(step, "the train step of --config against its dense twin, or Mixtral's with --against=hf"),
    "experts": Benchmark(experts, "forward and backward of the MoE layer with 8 to 512 experts at the same FLOPs"),
}


def run_benchmark(name: str, options: Options) -> Report:
    """Runs one benchmark. Raises `ConfigError` on an unknown name, and what the benchmark raises."""
    if name not in BENCHMARKS:
        raise ConfigError("benchmark", name, closest(name, BENCHMARKS))
    load = system_load()
    return report(name, BENCHMARKS[name].measure(options), load)


def summary() -> str:
    """A line for each benchmark: its name and what it compares."""
    width = max(map(len, BENCHMARKS))
    return "\n".join(f"{name:{width}}  {benchmark.about}" for name, benchmark in BENCHMARKS.items())
