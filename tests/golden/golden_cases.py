"""Tiny trainings whose losses are kept as text. `python tests/golden/golden_cases.py` writes them anew.

A change of these losses is a change of what the project computes. If it is meant, write them anew in the same commit
and say why in its message; if it is not, it is a bug. They are of one CPU: on another one the last digits differ, since
XLA orders sums by the width of the vector unit, which is why they are compared at a relative tolerance. Sooner or later
a token whose best experts nearly tie chooses otherwise there (switch, from step 40 on a Xeon), hence the wider one at
the end.
"""

from __future__ import annotations

from pathlib import Path

import jax

from sparse_lm.data.config import DataConfig, FactsConfig, GrammarConfig
from sparse_lm.data.loader import TrainLoader, build_dataset
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import BalanceConfig, MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.config import TrainConfig
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

HERE = Path(__file__).resolve().parent
STEPS = 50
EARLY, TOLERANCE, LATE_TOLERANCE = 35, 1e-4, 1e-3

GRAMMAR = DataConfig(
    source="grammar",
    length=32,
    grammar=GrammarConfig(num_domains=2, num_symbols=16, branching=3, document_length=48, num_documents=128),
)
FACTS = DataConfig(source="facts", length=24, facts=FactsConfig(num_a=8, num_b=8, num_values=16))
SWITCH = MoEConfig(
    num_experts=4, top_k=1, router=TopK(jitter=0.01), capacity_factor=1.0, balance=BalanceConfig(scope="group")
)
FINE = MoEConfig(
    num_experts=16,
    top_k=4,
    d_expert=8,
    num_shared=1,
    every=1,
    first_dense=1,
    router=TopK(renormalise="before_drop"),
    priority="token",
)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=5)


def case(data: DataConfig, **model) -> Experiment:
    """An experiment of 50 steps of 8 sequences."""
    small = ModelConfig(num_layers=2, d_model=16, num_heads=2, d_ff=32, **model)
    return Experiment(model=small, data=data, optim=OPTIM, train=TrainConfig(steps=STEPS, batch_size=8))


CASES = {
    "dense": case(GRAMMAR),
    "switch": case(GRAMMAR, moe=SWITCH, norm="layernorm", position="learned", activation="relu", dropout=0.1),
    "fine_grained": case(FACTS, moe=FINE),
}


def losses(experiment: Experiment) -> list[float]:
    """The loss of every step, without a mesh, from the parts that the training loop is made of."""
    dataset = build_dataset(experiment.data, experiment.seed)
    model = resolved(experiment, dataset.vocab_size).model
    optimizer = build_optimizer(experiment.optim, experiment.train.steps)
    root = jax.random.key(experiment.seed)
    state = jax.jit(create_state, static_argnums=(1, 2, 3))(root, model, optimizer, DEFAULT)
    step = make_train_step(optimizer, experiment.train.accumulate, len(dataset.domains))
    loader = TrainLoader(dataset, experiment.train.batch_size, experiment.seed)
    found = []
    for i in range(experiment.train.steps):
        state, metrics = step(state, jax.tree.map(jax.numpy.asarray, loader.batch_at(i)), root)
        found.append(float(metrics.parts.loss))
    return found


def path_of(name: str) -> Path:
    """Where the losses of a case are kept, one a line."""
    return HERE / f"{name}.txt"


def main() -> None:
    """Writes the losses of all cases."""
    for name, experiment in CASES.items():
        path_of(name).write_text("".join(f"{loss:.7f}\n" for loss in losses(experiment)))
        print(f"wrote {path_of(name)}")


if __name__ == "__main__":
    main()
