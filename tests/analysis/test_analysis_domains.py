"""A language whose domains are known: the analysis of a trained model has to find them again."""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest

from sparse_lm.analysis.information import lift
from sparse_lm.analysis.run import InFeedForward, Options, analyze
from sparse_lm.data.config import DataConfig, GrammarConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import CheckpointConfig, MeshConfig, TrainConfig
from sparse_lm.train.session import train

DOMAINS, EXPERTS = 3, 4


def experiment(top_k: int) -> Experiment:
    """Four experts for three domains over the same symbols, each symbol with two successors, other ones in each."""
    router = TopK(renormalise="before_drop") if top_k > 1 else TopK()
    moe = MoEConfig(
        EXPERTS, top_k, d_expert=32, every=1, capacity_factor=None, capacity_factor_eval=None, router=router
    )
    grammar = GrammarConfig(num_domains=DOMAINS, num_symbols=16, branching=2, document_length=64, num_documents=2048)
    return Experiment(
        model=ModelConfig(num_layers=2, d_model=32, num_heads=4, d_ff=32, moe=moe),
        data=DataConfig(source="grammar", length=64, validation_fraction=0.1, grammar=grammar),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=20),
        train=TrainConfig(steps=300, batch_size=16, eval_every=300, log_every=50, sample_tokens=0),
        checkpoint=CheckpointConfig(every=100, keep=3, asynchronous=False),
        mesh=MeshConfig(data=jax.device_count()),
    )


@pytest.fixture(scope="module", params=[1, 2], ids=["top_1", "top_2"])
def inside(request, tmp_path_factory) -> InFeedForward:
    workdir = tmp_path_factory.mktemp("runs")
    train(experiment(request.param), workdir, io.StringIO())
    found = analyze(workdir, Options(batches=16, effect_batches=16), lambda line: None).feed_forward
    assert found is not None
    return found


def best_layer(inside: InFeedForward) -> int:
    domain = inside.specialisation[1]
    assert domain.kind == "domain" and domain.names == tuple(f"grammar{i:03}" for i in range(DOMAINS))
    return int(np.argmax([x.excess for x in domain.information]))


@pytest.mark.slow
def test_the_domains_are_found_again(inside):
    best = inside.specialisation[1].information[best_layer(inside)]
    assert best.entropy == pytest.approx(np.log2(DOMAINS), abs=0.1)
    assert best.bits > 4 * best.highest and best.excess > 0.05, best


@pytest.mark.slow
def test_without_the_expert_of_a_domain_that_domain_is_hurt_most(inside):
    layer = best_layer(inside)
    counts_EC = inside.specialisation[1].counts_NEC[layer]
    # Tied most: what a pair adds to the mutual information.
    joint = counts_EC / counts_EC.sum()
    tied_EC = joint * np.log2(np.maximum(lift(counts_EC), 1e-9))
    expert, domain = np.unravel_index(np.argmax(tied_EC), tied_EC.shape)
    assert inside.removal is not None
    hurt_C = inside.removal.change_NEC[layer, expert]
    assert np.argmax(hurt_C) == domain and hurt_C[domain] > 0.05, (tied_EC, hurt_C)
    others = np.delete(hurt_C, domain)
    error = inside.removal.error_NEC[layer, expert, domain]
    assert hurt_C[domain] - others.max() > 2 * error, (hurt_C, error)


@pytest.mark.slow
def test_routers_settle_and_forcing_hurts_who_is_elsewhere(inside):
    saturation = inside.saturation
    assert saturation.steps == (100, 200, 300)
    assert (saturation.share_XN[1] > saturation.chance + 0.1).all() and (saturation.share_XN[-1] == 1).all()
    # One expert for all is worse than the router's choice, whichever it is.
    assert inside.forcing is not None and (inside.forcing.change_NE[best_layer(inside)] > 0).all()
