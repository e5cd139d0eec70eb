"""Every router learns a language of several domains better than when its decisions are shuffled, for three seeds.

The control is the same layer, router and training, but the experts of every token are moved on by a random number:
what is chosen no longer depends on the token. Loads are those of the last steps of training.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm.config import python_file
from sparse_lm.data.config import DataConfig, GrammarConfig
from sparse_lm.data.loader import TrainLoader, build_dataset, validation_batches
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.balance import max_violation
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import ROUTERS, Router, RouterConfig
from sparse_lm.moe.types import Soft
from sparse_lm.objectives.causal import causal_loss, count
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

SEEDS, STEPS, LAST, ROWS, EXPERTS = 3, 300, 50, 16, 8
GRAMMAR = GrammarConfig(num_domains=4, num_symbols=16, branching=2, document_length=64, num_documents=1024)
DATA = DataConfig(source="grammar", length=32, validation_fraction=0.1, grammar=GRAMMAR)


@dataclasses.dataclass(frozen=True)
class Shuffled(RouterConfig):
    """A router whose decisions are made random."""

    kind = "shuffled"
    inner: RouterConfig

    @property
    def fixed_slots(self):
        return self.inner.fixed_slots

    def build(self, key, shape, rules):
        return ShuffledRouter(self.inner.build(key, shape, rules), shape.num_experts)


class ShuffledRouter(Router):
    def __init__(self, inner: Router, num_experts: int):
        self.inner, self.num_experts = inner, num_experts

    def __call__(self, inputs, key):
        decision, scores = self.inner(inputs, key)
        noise = jax.random.key(7) if key is None else jax.random.fold_in(key, 7)
        shift_GS = jax.random.randint(noise, inputs.mask_GS.shape, 0, self.num_experts)
        if isinstance(decision, Soft):
            index_GSE = (jnp.arange(self.num_experts) + shift_GS[..., None]) % self.num_experts
            return jax.tree.map(lambda x: jnp.take_along_axis(x, index_GSE[..., None], axis=2), decision), scores
        moved_GSK = (decision.expert_GSK + shift_GS[..., None]) % self.num_experts
        return dataclasses.replace(decision, expert_GSK=jnp.where(decision.expert_GSK >= 0, moved_GSK, -1)), scores

    def updated(self, stats):
        new = jax.tree.map(lambda leaf: leaf, self)
        new.inner = self.inner.updated(stats)
        return new


@dataclasses.dataclass(frozen=True)
class Learned:
    """loss: nats of each seed. violation: MaxVio over the last steps. active: experts per token over them."""

    loss: np.ndarray
    violation: np.ndarray
    active: np.ndarray


@functools.cache
def variants() -> dict[str, MoEConfig]:
    path = Path(__file__).parents[2] / "configs" / "routers.py"
    module = python_file(path)
    assert module is not None
    return module.layers()


@functools.cache
def dataset():
    return build_dataset(DATA, 0)


def train(moe: MoEConfig) -> Learned:
    """Three seeds at once."""
    config = ModelConfig(vocab_size=dataset().vocab_size, num_layers=2, d_model=32, num_heads=2, d_ff=32, moe=moe)
    optimizer = optax.adam(3e-3)
    step = make_train_step(optimizer, 1, GRAMMAR.num_domains)
    seeds = jax.random.split(jax.random.key(0), SEEDS)
    state = jax.jit(jax.vmap(lambda key: create_state(key, config, optimizer, DEFAULT)))(seeds)
    run = jax.jit(jax.vmap(step, (0, None, 0)), donate_argnums=0)
    loader, loads, active = TrainLoader(dataset(), ROWS, 0), [], []
    for number in range(STEPS):
        state, metrics = run(state, jax.tree.map(jnp.asarray, next(loader)), seeds)
        if number >= STEPS - LAST:
            stats = metrics.parts.stats
            loads.append(stats.router.load_UE)
            active.append(jnp.sum(stats.router.load_UE, (1, 2, 3)) / jnp.sum(stats.router.tokens_U, (1, 2)))

    def evaluate(model, batch):
        parts = causal_loss(model, batch, None, count(batch), moe.losses, GRAMMAR.num_domains)[1]
        return jnp.sum(parts.domain_loss), jnp.sum(parts.domain_targets)

    evaluate = jax.jit(jax.vmap(evaluate, (0, None)))
    held_out = validation_batches(dataset(), ROWS, 8)
    nats, targets = zip(*(evaluate(state.model, jax.tree.map(jnp.asarray, batch)) for batch in held_out), strict=True)
    violation = max_violation(jnp.sum(jnp.stack(loads), axis=0)[:, 0, 0])
    return Learned(np.sum(nats, 0) / np.sum(targets, 0), np.asarray(violation), np.mean(active, 0))


# The largest MaxVio that a paper's own means of balance may leave; None where it has none: hashed loads follow the
# frequencies of the tokens, and Llama 4 states no loss.
VIOLATION = {
    "base": 0.01,  # every expert takes the same number of tokens, but for groups with padding
    "expert_choice": 0.01,
    "expert_choice_capped": 0.5,  # slots stay empty
    "soft": 0.0,
    "deepseek_v3": 0.1,  # 0.04 in Wang et al. 2024, table 2
    "noisy_top_k": 0.14,  # Shazeer et al. 2017, table 6: the fullest expert has 1.14 of the mean
    "s_base": 0.5,
    "hash": None,
    "hash_bigram": None,
    "llama4": None,
}
BY_LOSS = 0.75  # with a load-balance or importance loss: no expert gets twice its share


@pytest.mark.slow
@pytest.mark.parametrize("name", variants())
def test_router_learns_better_than_its_shuffled_control(name, monkeypatch, record_property):
    monkeypatch.setitem(ROUTERS, "shuffled", Shuffled)
    moe = variants()[name].replace(num_experts=EXPERTS, num_shared=0, shared_gate="none", every=2)
    learned, control = train(moe), train(moe.replace(router=Shuffled(moe.router)))
    record_property("loss", f"{learned.loss.round(3)} against {control.loss.round(3)}, MaxVio {learned.violation}")
    assert np.all(learned.loss < control.loss), (learned, control)
    limit = VIOLATION.get(name, BY_LOSS)
    assert limit is None or np.all(learned.violation <= limit + 1e-6), learned.violation
    if name == "remoe":
        np.testing.assert_allclose(learned.active, moe.top_k, rtol=0.1)


def test_every_kind_of_router_learns():
    assert {moe.router.kind for moe in variants().values()} == set(ROUTERS)
    assert set(VIOLATION) <= set(variants())
