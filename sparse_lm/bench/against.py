"""Our train step against the one of Hugging Face transformers' Mixtral, of the same model, in turn on the same device.

The other side is a process of another Python environment (`hf_mixtral.py`), so that torch is no part of this one. While
one side computes the other waits: for its pipe, or for its turn.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax

from sparse_lm.bench.harness import Comparison, Options, paired
from sparse_lm.bench.steps import stepper
from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.mesh import make_mesh, platform
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import count
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.telemetry.peak import matmul_peak
from sparse_lm.train.config import TrainConfig
from sparse_lm.train.loop import TrainingError

SCRIPT = Path(__file__).parent / "hf_mixtral.py"
REPEATS, QUICK_REPEATS = 5, 1
DISPATCHERS = ("dropless", "gather")
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies the weights of an expert for every token
# By default torch's threads wait for each other in a loop, which on cores that others use too costs them whole time
# slices: steps of 10 ms then took up to 4 s. Asleep they take nothing from this process either.
# It keeps freed memory as this process does, see `sparse_lm.memory`.
ENVIRONMENT = ("OMP_WAIT_POLICY=PASSIVE", "MALLOC_MMAP_MAX_=0", f"MALLOC_TRIM_THRESHOLD_={2**62}", "MALLOC_ARENA_MAX=1")
PROBES = 2  # steps, after the first, by which the fastest of them is chosen


class OtherSideError(TrainingError):
    """The other side's process failed; the message has its last words."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model, all of whose layers are sparse, and of the batch: rows of `length` tokens."""

    d_model: int = 512
    num_layers: int = 4
    num_experts: int = 8
    top_k: int = 2
    d_expert: int = 2048
    num_heads: int = 8
    vocab_size: int = 32_000
    length: int = 512
    batch: int = 8


# On a GPU: 3.7B parameters, of which a token uses 1.2B. Weights, gradients and moments take 58 GB on each side.
CARD = Sizes(d_model=2048, num_layers=12, d_expert=5632, num_heads=16, length=2048, batch=4)
QUICK = Sizes(d_model=64, num_layers=2, d_expert=128, num_heads=4, vocab_size=256, length=64, batch=2)


class Remote:
    """The other side's process: says `ready` once, then answers a line by a line of JSON. Use it as a context.

    Raises `OtherSideError` when it ends, or answers something else.
    """

    def __init__(self, command: list[str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close(); a file never fills up, as a pipe that nobody reads does
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def __enter__(self) -> Remote:
        try:
            self.ready = self._answer()
        except OtherSideError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, word: str) -> dict[str, Any]:
        """Sends `step` or `peak` and waits for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say more
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            try:  # one that is about to end says why
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._errors.seek(0)
            words = self._errors.read()[-2000:]
            raise OtherSideError(f"the other side answered {line!r} and ended; its last words:\n{words}") from None


def train_step_against(options: Options) -> list[Comparison]:
    """A row for each of `DISPATCHERS`: ours against the fastest of the other side's `IMPLEMENTATIONS`.

    Both sides take the same number of useful FLOPs on the same number of tokens, with AdamW, clipped gradients, a
    load-balance loss and float32 weights; bfloat16 is that of the products. The peak is the larger one of the two
    frameworks' own matrix products, measured before and after. Raises `ConfigError` when `options.python` is no Python,
    and `OtherSideError` when its process fails, as without torch and transformers.
    """
    sizes = QUICK if options.quick else CARD if device() == "cuda" else Sizes()
    if options.batch is not None:
        sizes = dataclasses.replace(sizes, batch=options.batch)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    dtype = options.dtype
    name, others = fastest(options.python, sizes, dtype)
    with Remote(command_of(options.python, sizes, dtype, name)) as remote:
        peaks = [matmul_peak(dtype), remote.ask("peak")["peak"]]
        label = f"transformers {remote.ready['transformers']} {name}{others}"
        rows = [_compare(sizes, dtype, dispatcher, (remote, label), repeats) for dispatcher in DISPATCHERS]
        peak = max(*peaks, matmul_peak(dtype), remote.ask("peak")["peak"])
    return [dataclasses.replace(row, peak=peak) for row in rows]


def device() -> str:
    """Where both sides compute, as torch calls it."""
    return "cuda" if platform() == "gpu" else "cpu"


def fastest(python: str | None, sizes: Sizes, dtype: str) -> tuple[str, str]:
    """The quickest of `IMPLEMENTATIONS`, and how many times longer the others take, in words for the table."""
    seconds = {}
    for name in IMPLEMENTATIONS:
        with Remote(command_of(python, sizes, dtype, name)) as remote:
            remote.ask("step")  # the first is slower
            seconds[name] = min(remote.ask("step")["seconds"] for _ in range(PROBES))
    best = min(seconds, key=seconds.__getitem__)
    others = [f"{name} x{value / seconds[best]:.2f}" for name, value in seconds.items() if name != best]
    return best, f" ({', '.join(others)})" if others else ""


def command_of(python: str | None, sizes: Sizes, dtype: str, implementation: str) -> list[str]:
    """How the other side is started. Raises `ConfigError` when `python` is not a file."""
    if python is None or not Path(python).is_file():
        raise ConfigError("python", python, "must be the python of an environment with torch and transformers")
    options = {**dataclasses.asdict(sizes), "dtype": dtype, "experts": implementation, "device": device()}
    return ["env", *ENVIRONMENT, python, "-P", str(SCRIPT), *(f"--{name}={value}" for name, value in options.items())]


def experiment_of(sizes: Sizes, dtype: str, dispatcher: str) -> Experiment:
    """Our side's model and training: Mixtral's router and block, as many parameters as the other side's."""
    moe = MoEConfig(
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        d_expert=sizes.d_expert,
        every=1,
        router=TopK(gate="softmax_after"),
        capacity_factor=None if dispatcher == "dropless" else 1.25,
        capacity_factor_eval=None,
        dispatcher=dispatcher,  # type: ignore[arg-type]
    )
    model = ModelConfig(
        vocab_size=sizes.vocab_size,
        num_layers=sizes.num_layers,
        d_model=sizes.d_model,
        num_heads=sizes.num_heads,
        d_ff=sizes.d_expert,
        tie_embeddings=False,
        dtype=dtype,  # type: ignore[arg-type]
        scan_layers=False,  # as on the other side; a loop stacks what it keeps, which takes time on a CPU
        moe=moe,
    )
    return Experiment(
        model=model,
        data=DataConfig(length=sizes.length),
        optim=OptimConfig(learning_rate=1e-4),
        train=TrainConfig(steps=1000, batch_size=sizes.batch),
    )


def _compare(sizes: Sizes, dtype: str, dispatcher: str, against: tuple[Remote, str], repeats: int) -> Comparison:
    remote, label = against
    experiment = experiment_of(sizes, dtype, dispatcher)
    mesh = make_mesh({}, jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        times = paired(stepper(experiment, mesh), lambda: remote.ask("step"), repeats)
    tokens = sizes.batch * sizes.length
    flops = tokens * count(experiment.model).flops_per_token(sizes.length)
    return Comparison(f"{dispatcher} {dtype}", label, times, tokens, flops, flops, peak=1.0)
