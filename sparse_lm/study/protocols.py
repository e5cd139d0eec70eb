"""Base experiments that studies share: what data and which model at each scale. Studies change what they are about.

- `facts`: a table of random facts; what counts is how much a model can store, which experts buy (configs/facts.py).
- `text`: bytes of the machine's own sources, documentation and licenses; at the paper scale your corpus in data/corpus.
- `domains`: a language of four Markov chains with known entropy, one chain per row.

toy takes seconds per run on two cores, small minutes on a GPU, paper the sizes of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparse_lm.data.config import DataConfig, FactsConfig, GrammarConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.study.study import SCALES, Scale, ScaleName
from sparse_lm.train.config import CheckpointConfig, TrainConfig

SEEDS = (3, 5, 3)  # toy, small, paper
_MOE = MoEConfig(num_experts=8, top_k=1, capacity_factor=2.0, capacity_factor_eval=2.0)
_PAPER_DATA = DataConfig(source="text", path="data/corpus", length=512)
_Scales = Mapping[ScaleName, Scale]


def moe(**fields: Any) -> dict[str, Any]:
    """Changes of `model.moe`: `moe(num_experts=4)` is `{"model__moe__num_experts": 4}`."""
    return {f"model__moe__{name}": value for name, value in fields.items()}


def full_width(base: Experiment) -> int:
    """As wide as the base's dense layers: for experts of which each token uses several at that width."""
    return base.model.d_ff


def share_of_width(divisor: int) -> Callable[[Experiment], int]:
    """A part of the width of the base's dense layers."""

    def width(base: Experiment) -> int:
        return base.model.d_ff // divisor

    width.__name__ = f"d_ff / {divisor}"
    return width


def facts(seeds: tuple[int, int, int] = SEEDS, changes: Mapping[str, Any] | None = None) -> _Scales:
    """4,096 facts for a model that cannot hold them when dense (toy), 65,536 (small), 1,048,576 (paper).

    changes: of the base experiment at every scale, see `Config.replace`.
    """
    toy = Experiment(
        model=_model(2, 32, 2, 32),
        data=DataConfig(source="facts", length=63, facts=FactsConfig(num_a=64, num_b=64, num_values=64)),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50),
        train=_train(800, 32, 8),
        checkpoint=_checkpoint(400),
    )
    small = toy.replace(
        model=_model(2, 64, 4, 64),
        data=DataConfig(source="facts", length=126, facts=FactsConfig(num_a=256, num_b=256, num_values=128)),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=200),
        train=_train(20_000, 128, 8),
        checkpoint=_checkpoint(4000),
    )
    paper = small.replace(
        model=_model(4, 256, 4, 256),
        data=DataConfig(source="facts", length=255, facts=FactsConfig(num_a=1024, num_b=1024, num_values=256)),
        train=_train(100_000, 512, 8),
        checkpoint=_checkpoint(10_000),
    )
    return _scales((toy, small, paper), seeds, changes)


def text(seeds: tuple[int, int, int] = SEEDS, changes: Mapping[str, Any] | None = None) -> _Scales:
    """Bytes: 0.8M of them (toy), 160M (small), 26G at the size of the papers' base models (paper)."""
    toy = Experiment(
        model=_model(2, 64, 4, 128),
        data=DataConfig(source="stdlib", length=128, max_bytes=4_000_000),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50),
        train=_train(400, 16, 16),
        checkpoint=_checkpoint(200),
    )
    small = toy.replace(
        model=_model(6, 256, 4, 1024).replace(dtype="bfloat16"),
        data=DataConfig(source="stdlib", length=256),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=500),
        train=_train(10_000, 64, 32),
        checkpoint=_checkpoint(2500),
    )
    return _scales((toy, small, _paper()), seeds, changes)


def domains(seeds: tuple[int, int, int] = SEEDS, changes: Mapping[str, Any] | None = None) -> _Scales:
    """Four languages, one per row (toy, small); your corpus, whose first-level folders are domains (paper)."""
    chains = GrammarConfig(num_domains=4, num_symbols=16, branching=4, order=2, document_length=65, num_documents=8192)
    toy = Experiment(
        model=_model(2, 64, 4, 64),
        data=DataConfig(source="grammar", length=64, grammar=chains),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50),
        train=_train(600, 16, 16),
        checkpoint=_checkpoint(300),
    )
    more = chains.replace(num_domains=16, num_symbols=32, document_length=129, num_documents=65_536)
    small = toy.replace(
        model=_model(4, 128, 4, 256),
        data=DataConfig(source="grammar", length=128, grammar=more),
        train=_train(10_000, 64, 32),
        checkpoint=_checkpoint(2500),
    )
    return _scales((toy, small, _paper()), seeds, changes)


def _paper() -> Experiment:
    return Experiment(
        model=_model(12, 768, 12, 3072).replace(dtype="bfloat16", remat="full"),
        data=_PAPER_DATA,
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        train=_train(100_000, 512, 64),
        checkpoint=_checkpoint(5000),
    )


def _model(layers: int, width: int, heads: int, hidden: int) -> ModelConfig:
    return ModelConfig(num_layers=layers, d_model=width, num_heads=heads, d_ff=hidden, activation="gelu", moe=_MOE)


def _train(steps: int, batch: int, eval_batches: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=batch, eval_every=max(1, steps // 8), eval_batches=eval_batches, log_every=10
    )


def _checkpoint(every: int) -> CheckpointConfig:
    return CheckpointConfig(every=every, keep=1, best=False)


def _scales(bases: tuple[Experiment, ...], seeds: tuple[int, int, int], changes: Mapping[str, Any] | None) -> _Scales:
    changed = [base.replace(**(changes or {})) for base in bases]
    return {name: Scale(base, count) for name, base, count in zip(SCALES, changed, seeds, strict=True)}
