"""Decoding with a cache gives what the whole sequence gives at once, alone or in a batch, on any mesh."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.generate.sample import Sampling
from sparse_lm.generate.stream import for_generation, generate
from sparse_lm.models.config import DepthConfig, ModelConfig
from sparse_lm.models.decoder import Decoder, build_decoder
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.sharding import DEFAULT

GREEDY, KEY = Sampling(0.0), jax.random.key(11)
# Training drops: one slot per expert and group of 4 tokens. A generating model must not.
SPARSE = MoEConfig(num_experts=4, top_k=2, every=2, group_size=4, capacity_factor=0.5, capacity_factor_eval=0.5)
BASE = ModelConfig(vocab_size=24, num_layers=2, d_model=16, num_heads=4, d_ff=16, max_length=40)
CONFIGS = {
    "rope": BASE,
    "gqa_unrolled": BASE.replace(num_kv_heads=2, scan_layers=False),
    "sinusoidal_post": BASE.replace(position="sinusoidal", norm_position="post", num_kv_heads=1),
    "moe": BASE.replace(moe=SPARSE),
    "attention_mixture": BASE.replace(num_kv_heads=2, moe=SPARSE, attention=Mixture(num_experts=3)),
    "attention_switch_head": BASE.replace(attention=SwitchHead(num_experts=3), norm_position="post"),
    "bigram": BASE.replace(moe=dataclasses.replace(SPARSE, router=Hash(mode="bigram"))),
    "moe_learned": BASE.replace(
        position="learned",
        norm="layernorm",
        tie_embeddings=False,
        num_kv_heads=2,
        scan_layers=False,
        moe=dataclasses.replace(SPARSE, every=1, priority="token", num_shared=1, dispatcher="einsum"),
    ),
    # Every second block is skipped by the tokens of which the predictor says so: a later token must not see these.
    "depth": BASE.replace(num_layers=4, depth=DepthConfig()),
    "depth_moe": BASE.replace(
        moe=dataclasses.replace(SPARSE, every=1, group_size=None), depth=DepthConfig(every=1, predictor="mlp")
    ),
}
PROMPTS = [np.array([3, 1, 4, 1, 5, 9, 2]), np.array([6]), np.array([22, 0, 8]), np.array([7] * 18)]


def build(name) -> Decoder:
    return build_decoder(jax.random.key(0), CONFIGS[name], DEFAULT)


decoder = functools.cache(build)  # without a mesh


@jax.jit
def forward(model, tokens, segments, positions):
    return model(tokens, segments, positions)[0]


@jax.jit
def extend(model, tokens, segments, positions, start, cache):
    return model.extend(tokens, segments, positions, start, cache)


def tokens_of(model, prompts, sampling=GREEDY, max_new_tokens=6, key=KEY, eos=None):
    return np.stack(list(generate(model, prompts, sampling, max_new_tokens, key, eos)), axis=1)


def at_once(model, sequences):
    """Logits [L, V] of each sequence by one forward pass without a cache, padded to 4 rows of 24 behind the tokens."""
    tokens, segments = np.zeros((2, 4, 24), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    logits = np.asarray(forward(model, tokens, segments, np.broadcast_to(np.arange(24), (4, 24))))
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_the_whole(name):
    """Two rows, one with 3 places of padding before it; a chunk of 5 tokens, then one by one."""
    model = for_generation(decoder(name))
    length, padding = 9, np.array([0, 3])
    rows = np.asarray(jax.random.randint(jax.random.key(2), (2, length), 0, 24))
    segments = jnp.asarray((np.arange(length + 2) >= padding[:, None]).astype(np.int32))
    positions = jnp.asarray(np.maximum(np.arange(length) - padding[:, None], 0))
    cache, found = model.empty_cache(2, length + 2), []
    for start, stop in itertools.pairwise([0, 5, 6, 7, 8, 9]):
        part = slice(start, stop)
        logits, cache = extend(model, rows[:, part], segments, positions[:, part], np.asarray(start), cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    for row, whole in enumerate(at_once(model, [rows[0], rows[1, 3:]])):
        np.testing.assert_allclose(found[row, padding[row] :], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_follows_the_argmax_and_ignores_its_neighbours(name):
    model = decoder(name)
    together = tokens_of(model, PROMPTS)
    assert together.shape == (4, 6) and together.dtype == np.int32
    sequences = [[*prompt, *row[:-1]] for prompt, row in zip(PROMPTS, together, strict=True)]
    for row, logits in enumerate(at_once(for_generation(model), sequences)):
        np.testing.assert_array_equal(np.argmax(logits[-6:], axis=-1), together[row])
    np.testing.assert_array_equal(tokens_of(model, PROMPTS[2:3])[0], together[2])


def test_a_seed_gives_the_same_tokens_also_for_a_part_of_the_batch():
    model, sampling = decoder("moe"), Sampling(1.5, top_k=20)
    first = tokens_of(model, PROMPTS, sampling)
    np.testing.assert_array_equal(tokens_of(model, PROMPTS, sampling), first)
    np.testing.assert_array_equal(tokens_of(model, PROMPTS[:2], sampling), first[:2])
    assert (tokens_of(model, PROMPTS, sampling, key=jax.random.key(12)) != first).any()
    twins = tokens_of(model, [PROMPTS[0]] * 2, sampling)
    assert (twins[0] != twins[1]).any(), "rows must not share their noise"


@pytest.mark.parametrize("sizes", [{"expert": 2, "model": 2}, {"fsdp": 2, "data": 2}])
def test_a_mesh_changes_nothing(mesh_of, sizes):
    sampling = Sampling(0.9, top_p=0.9)
    alone = tokens_of(decoder("moe"), PROMPTS, sampling)
    with jax.set_mesh(mesh_of(**sizes)):
        np.testing.assert_array_equal(tokens_of(build("moe"), PROMPTS, sampling), alone)


def test_batch_that_a_mesh_cannot_share(mesh_of):
    with jax.set_mesh(mesh_of(data=2)), pytest.raises(ConfigError, match=r"3.*2 devices"):
        generate(build("rope"), PROMPTS[:3], GREEDY, 2, KEY)


def test_nothing_is_dropped_and_the_model_is_left_alone():
    model = decoder("moe_learned")
    dropless = for_generation(model)
    leaves, same = jax.tree.leaves(model), jax.tree.leaves(dropless)
    assert len(leaves) == len(same) and all(a is b for a, b in zip(leaves, same, strict=True))
    assert model.config.moe == CONFIGS["moe_learned"].moe
    tokens = jnp.full((2, 8), 5)  # equal tokens choose equal experts: the worst case for capacity
    inputs = tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(8), (2, 8))
    statistics = jax.jit(lambda model: model(*inputs)[1].feed_forward.dispatch.dropped)
    assert (statistics(model) > 0).all() and (statistics(dropless) == 0).all()
    expected = CONFIGS["moe_learned"].replace(moe__capacity_factor_eval=None, moe__group_size=None)
    assert dropless.config == expected
    layers = [block.feed_forward for unit in dropless.stack.units for block in unit.blocks]
    assert [layer.config.group_size for layer in layers if isinstance(layer, MoE)] == [None]


def test_a_dense_model_is_itself():
    model = decoder("rope")
    assert for_generation(model) is model


@pytest.mark.parametrize("priority", ["probability", "first_choice"])
def test_routing_by_later_tokens_is_refused(priority):
    moe = dataclasses.replace(SPARSE, priority=priority, allow_non_causal=True)
    model = jax.eval_shape(lambda: Decoder(KEY, BASE.replace(moe=moe), DEFAULT))
    with pytest.raises(ConfigError, match=rf"priority={priority}.*other tokens.*priority=token"):
        for_generation(model)
    with pytest.raises(ConfigError, match="other tokens"):
        generate(model, PROMPTS, GREEDY, 2, KEY)


def test_eos_ends_a_row_and_all_rows_end_the_stream():
    model = decoder("gqa_unrolled")
    free = tokens_of(model, PROMPTS)
    eos = int(free[0][2])
    ends = [int(np.flatnonzero(row == eos)[0]) if eos in row else 6 for row in free]
    stopped = tokens_of(model, PROMPTS, eos=eos)
    assert ends[0] <= 2 and stopped.shape[1] == min(6, max(ends) + 1)
    for row, end in enumerate(ends):
        shown = min(end, stopped.shape[1])
        np.testing.assert_array_equal(stopped[row, :shown], free[row, :shown])
        assert (stopped[row, shown:] == eos).all()
    alone = tokens_of(model, PROMPTS[:1], eos=eos)
    assert alone.shape == (1, ends[0] + 1) and alone[0, -1] == eos


def test_an_empty_prompt_starts_from_eos():
    model = decoder("rope")
    empty = tokens_of(model, [np.array([], np.int32)], eos=21)
    np.testing.assert_array_equal(empty, tokens_of(model, [np.array([21])], eos=21))


def test_tokens_come_one_step_at_a_time():
    steps = generate(decoder("rope"), PROMPTS, GREEDY, 6, KEY)
    first = next(steps)
    assert first.shape == (4,)
    np.testing.assert_array_equal(np.stack([first, next(steps)], axis=1), tokens_of(decoder("rope"), PROMPTS)[:, :2])


def test_learned_positions_reach_exactly_to_the_table():
    model, prompt = decoder("moe_learned"), [np.arange(20)]
    assert tokens_of(model, prompt, max_new_tokens=21).shape == (1, 21)  # the last token needs no position
    with pytest.raises(ConfigError, match="40 learned positions; ask for at most 21"):
        generate(model, prompt, GREEDY, 22, KEY)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate(model, [np.zeros(41, np.int32)], GREEDY, 1, KEY)


@pytest.mark.parametrize(
    ("changes", "key", "way_out"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens", "at least 1"),
        ({"prompts": []}, "prompts", "none"),
        ({"prompts": [np.array([], int)]}, "prompts[0]", "no eos"),
        ({"prompts": [np.array([1]), np.array([1, 24])]}, "prompts[1]", "no token of the model"),
        ({"prompts": [np.array([-1])]}, "prompts[0]", "no token of the model"),
        ({"prompts": [np.array([[1]])]}, "prompts[0]", "vector of token ids"),
        ({"prompts": [np.array([1.0])]}, "prompts[0]", "vector of token ids"),
        ({"eos": 24}, "eos", "None never stops"),
    ],
)
def test_refusals_come_at_the_call(changes, key, way_out):
    arguments = {"prompts": PROMPTS, "sampling": GREEDY, "max_new_tokens": 3, "key": KEY, "eos": None} | changes
    with pytest.raises(ConfigError, match=way_out) as caught:
        generate(decoder("rope"), **arguments)
    assert caught.value.key == key
