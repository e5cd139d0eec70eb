"""Filters against hand tables and brute force; draws against the probabilities they are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.generate.sample import Sampling, filter_logits, sample
from sparse_lm.mesh import make_mesh

PROBABILITY = np.array([[0.1, 0.4, 0.05, 0.25, 0.2]], np.float32)  # in order: tokens 1, 3, 4, 0, 2
LOGITS = jnp.log(PROBABILITY) + 3.0


def kept(logits_BV, sampling):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(filter_logits(logits_BV, sampling))]


def brute_force(logits, sampling):
    """Token by token in plain Python: the probabilities that one row is drawn from."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    order = order[: sampling.top_k]
    weights = {token: np.exp(scaled[token] - scaled[order[0]]) for token in order}
    total, nucleus, reached = sum(weights.values()), [], 0.0
    for token in order:
        nucleus.append(token)
        reached += weights[token] / total
        if sampling.top_p is not None and reached >= sampling.top_p:
            break
    mass = sum(weights[token] for token in nucleus)
    return np.array([weights[token] / mass if token in nucleus else 0.0 for token in range(len(scaled))])


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(0.0), [1]),
        (Sampling(0.0, top_k=3, top_p=0.9), [1]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.01), [1]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=0.41), [1, 3]),
        (Sampling(top_p=0.84), [1, 3, 4]),
        (Sampling(top_p=0.86), [0, 1, 3, 4]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        # top_k comes first: of 0.4 + 0.25 the first token has 0.615, so that it alone reaches 0.6.
        (Sampling(top_k=2, top_p=0.6), [1]),
        (Sampling(top_k=2, top_p=0.63), [1, 3]),
        # temperature comes before top_p: at 0.5 the probabilities are .59, .23, .15, .04, .01.
        (Sampling(0.5, top_p=0.55), [1]),
        (Sampling(2.0, top_p=0.55), [1, 3, 4]),
    ],
)
def test_tokens_that_stay(sampling, tokens):
    assert kept(LOGITS, sampling) == [tokens]


def test_temperature_divides():
    np.testing.assert_allclose(filter_logits(LOGITS, Sampling(0.25)), 4 * LOGITS, rtol=1e-6)


def test_ties_go_to_the_lower_id():
    equal = jnp.zeros((1, 6))
    assert kept(equal, Sampling(top_k=2)) == [[0, 1]]
    assert kept(equal, Sampling(top_p=0.4)) == [[0, 1, 2]]
    assert sample(equal, Sampling(0.0), jax.random.key(0)).tolist() == [0]


def test_top_p_of_one_keeps_what_rounding_would_lose():
    logits = jnp.concatenate([jnp.zeros((1, 3)), jnp.full((1, 1), -40.0)], axis=1)
    assert kept(logits, Sampling(top_p=1.0)) == [[0, 1, 2, 3]]


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=7, max_size=7),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 2, 5]),
    top_p=st.sampled_from([None, 0.123, 0.5017, 0.8765]),
)
def test_against_brute_force(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    rows = jnp.asarray([logits, logits[::-1]], jnp.float32)
    found = jax.nn.softmax(filter_logits(rows, sampling), axis=-1)
    np.testing.assert_allclose(found[0], brute_force(logits, sampling), atol=2e-6)
    np.testing.assert_allclose(found[1], brute_force(logits[::-1], sampling), atol=2e-6)


def test_frequencies_agree_with_probabilities():
    draws = 4000
    rows = jnp.broadcast_to(LOGITS, (draws, 5))
    sampling = Sampling(0.8, top_k=4)
    tokens = np.asarray(sample(rows, sampling, jax.random.key(7)))
    expected = brute_force(LOGITS[0], sampling) * draws
    counts = np.bincount(tokens, minlength=5)
    assert counts[2] == 0 and expected[2] == 0
    stays = expected > 0
    chi_square = ((counts[stays] - expected[stays]) ** 2 / expected[stays]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; seeded, so that it never flips


def test_rows_draw_apart_and_do_not_depend_on_the_batch():
    rows, key = jnp.broadcast_to(LOGITS, (64, 5)), jax.random.key(3)
    tokens = np.asarray(sample(rows, Sampling(), key))
    assert len(set(tokens.tolist())) > 2
    np.testing.assert_array_equal(sample(rows[:9], Sampling(), key), tokens[:9])
    np.testing.assert_array_equal(sample(rows, Sampling(), key), tokens)
    assert (np.asarray(sample(rows, Sampling(), jax.random.key(4))) != tokens).any()


def test_greedy_ignores_the_key():
    rows = jnp.concatenate([LOGITS, LOGITS[:, ::-1]])
    for seed in range(3):
        tokens = sample(rows, Sampling(0.0), jax.random.key(seed))
        assert tokens.tolist() == [1, 3] and tokens.dtype == jnp.int32


def test_under_a_mesh():
    with jax.set_mesh(make_mesh({"data": -1})):
        found = sample(LOGITS, Sampling(0.7, 3, 0.9), jax.random.key(5))
        assert kept(LOGITS, Sampling(top_k=3)) == [[1, 3, 4]]
    np.testing.assert_array_equal(found, sample(LOGITS, Sampling(0.7, 3, 0.9), jax.random.key(5)))


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("temperature", -0.1, "0 is greedy"),
        ("temperature", float("nan"), "finite"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.01, "at most 1"),
    ],
)
def test_bad_values_name_key_value_and_way_out(key, value, way_out):
    with pytest.raises(ConfigError, match=way_out) as caught:
        Sampling(**{key: value})
    assert caught.value.key == key and caught.value.value is value
