"""Counts against real parameter trees, numbers worked out by hand, XLA's own count and published models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import Part, count, dense_twin, optimizer_bytes, table
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.sharding import DEFAULT

BASE = ModelConfig(vocab_size=50, num_layers=4, d_model=12, num_heads=3, head_dim=6, d_ff=20)
MOE = MoEConfig(num_experts=6, top_k=2, every=1, d_expert=7)
CONFIGS = {
    "dense": BASE,
    "ungated": BASE.replace(activation="relu"),
    "grouped": BASE.replace(num_kv_heads=1),
    "untied": BASE.replace(tie_embeddings=False),
    "layernorm": BASE.replace(norm="layernorm"),
    "post": BASE.replace(norm_position="post", norm="layernorm"),
    "sinusoidal": BASE.replace(position="sinusoidal", max_length=9),
    "learned": BASE.replace(position="learned", max_length=9),
    "moe": BASE.replace(moe=MOE),
    "moe_ungated": BASE.replace(moe=MOE, activation="gelu"),
    "moe_every": BASE.replace(num_layers=7, moe=dataclasses.replace(MOE, every=3, first_dense=1)),
    "moe_shared": BASE.replace(num_kv_heads=1, moe=dataclasses.replace(MOE, num_shared=2, every=2)),
    "moe_shared_gate": BASE.replace(moe=dataclasses.replace(MOE, num_shared=1, shared_gate="sigmoid", d_shared=5)),
    "moe_shared_mix": BASE.replace(moe=dataclasses.replace(MOE, num_shared=2, shared_gate="mix", d_shared=20)),
    "moe_bias": BASE.replace(moe=dataclasses.replace(MOE, expert_bias=True)),
    "moe_bias_ungated": BASE.replace(activation="relu", moe=dataclasses.replace(MOE, expert_bias=True)),
    "moe_hash": BASE.replace(moe=dataclasses.replace(MOE, router=Hash())),
    "moe_default_width": BASE.replace(moe=MoEConfig(num_experts=3, top_k=3, first_dense=1)),
}
MIXTRAL = ModelConfig(
    vocab_size=32000,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=8, top_k=2, every=1, d_expert=14336),
)


def leaves(config):
    """(path, size) of each parameter of the real model, which is never allocated."""
    tree = jax.eval_shape(lambda key: nnx.state(Decoder(key, config, DEFAULT), nnx.Param), jax.random.key(0))
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size) for path, leaf in paths]


def test_a_state_is_no_parameter():
    assert count(CONFIGS["moe_hash"]).router == Part(0, 0, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_those_of_the_real_tree(name):
    config = CONFIGS[name]
    counts, found = count(config), leaves(config)

    def real(*words, without=()):
        named = [(path, size) for path, size in found if any(word in path for word in words)]
        return sum(size for path, size in named if not any(word in path for word in without))

    assert counts.total == sum(size for _, size in found)
    assert counts.embedding.total == real("embedding/table", without=["unembedding"])
    assert counts.unembedding.total == real("unembedding")
    assert counts.attention.total == real("/attention/")
    assert counts.norms.total == real("norm")
    assert counts.router.total == real("/router/")
    assert counts.experts.total == real("/experts/")
    assert counts.shared.total == real("/shared/")
    assert counts.dense.total == real("/feed_forward/", without=["/router/", "/experts/", "/shared/"])
    assert counts.total - counts.active == counts.experts.total - counts.experts.active
    assert counts.parameter_bytes == 4 * counts.total


def test_learned_positions():
    config = BASE.replace(position="learned", max_length=9)
    counts = count(config)
    assert counts.positions == Part(108, 108, 0)
    assert counts.total == count(BASE).total + 108
    assert counts.non_embedding == count(BASE).non_embedding
    assert counts.flops_per_token(8) == count(BASE).flops_per_token(8)


def test_by_hand():
    """One dense and one sparse layer, width 4, 2 heads of 3, 1 key/value head, swiglu, vocabulary 10."""
    moe = MoEConfig(num_experts=5, top_k=2, d_expert=3, num_shared=1, every=2)
    config = ModelConfig(
        vocab_size=10,
        num_layers=2,
        d_model=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=3,
        d_ff=6,
        moe=moe,
        position="none",
    )
    counts = count(config)
    assert counts.embedding == Part(40, 40, 0)
    assert counts.attention == Part(144, 144, 144)  # 2 layers of 4*6 + 4*3 + 4*3 + 6*4
    assert counts.norms == Part(20, 20, 0)  # 5 of 4
    assert counts.dense == Part(72, 72, 72)  # 3 * 4 * 6
    assert counts.router == Part(20, 20, 20)
    assert counts.experts == Part(180, 72, 72)  # 5 of 3 * 4 * 3, of which 2
    assert counts.shared == Part(36, 36, 36)
    assert counts.unembedding == Part(0, 0, 40)  # tied: multiplied, not stored
    assert (counts.total, counts.active) == (512, 404)
    assert (counts.non_embedding, counts.active_non_embedding) == (472, 364)
    # 6 * (144 + 72 + 20 + 72 + 36 + 40) + 12 * 2 layers * 2 heads * 3 * 8 tokens
    assert counts.flops_per_token(8) == 6 * 384 + 1152 == 3456
    assert counts.forward_flops_per_token(8) == 1152
    assert counts.part_flops("attention", 8) == 6 * 144 + 1152
    assert sum(counts.part_flops(name, 8) for name in counts.parts()) == 3456


def test_mixtral_as_published():
    counts = count(MIXTRAL)
    assert counts.total == pytest.approx(46.70e9, rel=5e-3)
    assert counts.active == pytest.approx(12.88e9, rel=5e-3)


def test_forward_flops_agree_with_the_compiler():
    """Unrolled and wide enough that what is no matrix product (softmax, norms) is small beside it."""
    config = ModelConfig(
        vocab_size=256, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, d_ff=512, scan_layers=False
    )
    length, batch = 64, 2
    model = jax.eval_shape(lambda key: Decoder(key, config, DEFAULT), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    forward = jax.jit(lambda model, tokens, segments, positions: model(tokens, segments, positions)[0])
    cost = forward.lower(model, tokens, tokens, tokens).compile().cost_analysis()
    expected = count(config).forward_flops_per_token(length) * batch * length
    assert cost is not None and cost["flops"] == pytest.approx(expected, rel=0.04)


def test_optimizer_state_is_what_init_makes():
    config = CONFIGS["moe"]
    total = count(config).total

    def size(name):
        return optimizer_bytes(config, build_optimizer(OptimConfig(name=name, warmup_steps=1), 10))

    counters = 16  # numbers of updates
    assert 8 * total <= size("adamw") <= 8 * total + counters
    assert 4 * total <= size("lion") <= 4 * total + counters


def test_adafactor_keeps_rows_and_columns():
    config = ModelConfig(vocab_size=256, num_layers=1, d_model=128, num_heads=1, d_ff=256, activation="relu")
    found = optimizer_bytes(config, build_optimizer(OptimConfig(name="adafactor", warmup_steps=1), 10))
    assert 0 < found < 0.2 * 4 * count(config).total


def test_nothing_is_allocated():
    huge = MIXTRAL.replace(moe__num_experts=4096)
    assert count(huge).total > 2e13
    assert optimizer_bytes(huge, build_optimizer(OptimConfig(), 1000)) >= 8 * count(huge).total


@pytest.mark.parametrize(
    ("moe", "d_ff"),
    [
        (MoEConfig(num_experts=8, top_k=2, every=2), 20),
        (MoEConfig(num_experts=8, top_k=1, every=2), 20),
        (MoEConfig(num_experts=8, top_k=3, d_expert=5, num_shared=1, every=2), 20),
        (MoEConfig(num_experts=8, top_k=3, every=1), 18),  # 20 // 3 = 6, three times
        (MoEConfig(num_experts=8, top_k=1, num_shared=1, every=1), 40),
    ],
)
def test_dense_twin_costs_what_the_sparse_model_costs(moe, d_ff):
    sparse = BASE.replace(moe=moe)
    twin = dense_twin(sparse)
    assert twin == BASE.replace(d_ff=d_ff)
    a, b = count(sparse), count(twin)
    assert a.flops_per_token(16) - a.part_flops("router", 16) == b.flops_per_token(16)
    assert a.active - a.router.active == b.total


def test_dense_twin_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="its own twin"):
        dense_twin(BASE)
    with pytest.raises(ConfigError, match=r"d_expert=7.*14 active.*d_ff=20.*every=1"):
        dense_twin(BASE.replace(moe=dataclasses.replace(MOE, every=2)))


def test_what_is_left_to_the_data_is_named():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=None"):
        count(BASE.replace(vocab_size=None))
    with pytest.raises(ConfigError, match=r"model\.max_length=None"):
        count(BASE.replace(position="learned"))
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        optimizer_bytes(BASE.replace(vocab_size=None), build_optimizer(OptimConfig(), 1000))


def test_table_adds_up():
    config = CONFIGS["moe_shared"]
    rows = {}
    for line in table(config, 32).splitlines()[1:]:
        name, *cells = line.rsplit(maxsplit=2 if line.startswith("without") else 3)
        rows[name.strip()] = [int(cell.replace(",", "")) for cell in cells]
    assert "positions" not in rows and "unembedding (tied)" in rows
    bottom = rows.pop("total")
    counts = count(config)
    assert rows.pop("without embeddings") == [counts.non_embedding, counts.active_non_embedding]
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == bottom
    assert bottom == [counts.total, counts.active, counts.flops_per_token(32)]


def test_table_as_text():
    assert table(ModelConfig(vocab_size=10, num_layers=1, d_model=4, num_heads=2, d_ff=6), 8).splitlines() == [
        "                    parameters  active  FLOPs/token",
        "embedding                   40      40            0",
        "attention                   64      64          768",
        "norms                       12      12            0",
        "dense                       72      72          432",
        "unembedding (tied)           0       0          240",
        "total                      188     188        1,440",
        "without embeddings         148     148",
    ]


ATTENTION = {
    "mixture": BASE.replace(num_heads=4, num_kv_heads=2, attention=Mixture(num_experts=3)),
    "mixture_moe": BASE.replace(num_heads=8, num_kv_heads=2, moe=MOE, attention=Mixture(num_experts=5)),
    "mixture_hash": BASE.replace(num_heads=4, num_kv_heads=1, attention=Mixture(router=Hash())),
    "switch_head": BASE.replace(attention=SwitchHead(num_experts=3)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_experts_are_those_of_the_real_tree(name):
    config = ATTENTION[name]
    counts, found = count(config), leaves(config)
    assert counts.total == sum(size for _, size in found)
    assert counts.attention.total == sum(size for path, size in found if "/attention/" in path)


def test_attention_experts_by_hand():
    """Four layers, width 12, head width 6, 4 heads of a token, 2 key/value heads, 3 experts of which 2."""
    counts = count(ATTENTION["mixture"])
    router, shared, expert = 12 * 3, 2 * 2 * 12 * 6, 2 * 2 * 12 * 6
    active = 4 * (router + shared + 2 * expert)
    assert counts.attention == Part(4 * (router + shared + 3 * expert), active, active)
    assert counts.part_flops("attention", 8) == 6 * active + 12 * 4 * 4 * 6 * 8
    counts = count(ATTENTION["switch_head"])  # 3 heads, each with 3 experts of which 2, for values and for outputs
    one, routers = 12 * 3 * 6, 2 * 12 * 3 * 3
    active = 4 * (2 * one + 2 * 2 * one + routers)
    assert counts.attention == Part(4 * (2 * one + 2 * 3 * one + routers), active, active)


def test_jetmoe_as_published():
    """JetMoE-8B (2404.07413): 8 experts of which 2, in attention and feed-forward; 8.52 and 2.33 billion."""
    jetmoe = ModelConfig(
        vocab_size=32000,
        num_layers=24,
        d_model=2048,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        d_ff=5632,
        attention=Mixture(),
        moe=MoEConfig(num_experts=8, top_k=2, every=1, d_expert=5632),
    )
    counts = count(jetmoe)
    assert counts.total == pytest.approx(8.52e9, rel=1e-2)
    assert counts.active == pytest.approx(2.33e9, rel=1e-2)


@pytest.mark.parametrize("name", ["mixture", "mixture_moe"])
def test_the_twin_of_attention_experts_has_their_active_heads(name):
    sparse = ATTENTION[name]
    twin = dense_twin(sparse)
    assert twin.attention is None and twin.moe is None
    a, b = count(sparse), count(twin)
    router = 4 * 12 * sparse.attention.num_experts  # type: ignore[union-attr]
    assert a.active - a.router.active - router == b.total
    assert a.part_flops("attention", 16) - 6 * router == b.part_flops("attention", 16)


def test_the_twin_of_switch_head_needs_one_expert_per_head():
    with pytest.raises(ConfigError, match=r"model\.attention\.top_k=2.*top_k=1"):
        dense_twin(ATTENTION["switch_head"])
    assert dense_twin(BASE.replace(attention=SwitchHead(top_k=1))) == BASE
