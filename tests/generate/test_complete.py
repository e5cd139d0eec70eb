"""A prompt as text becomes a longer text: whole, the same for the same seed, and nothing after the end."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer
from sparse_lm.generate.complete import complete
from sparse_lm.generate.sample import Sampling
from sparse_lm.generate.stream import generate
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder, build_decoder
from sparse_lm.sharding import DEFAULT

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def bytes_model() -> Decoder:
    config = ModelConfig(vocab_size=BYTES.vocab_size, num_layers=1, d_model=8, num_heads=2, d_ff=8)
    return build_decoder(jax.random.key(0), config, DEFAULT)


def test_the_prompt_comes_first_and_the_pieces_are_the_tokens(bytes_model):
    pieces = list(complete(bytes_model, BYTES, "aé", 5, seed=3))
    ids = list(generate(bytes_model, [BYTES.encode("aé")], Sampling(0.8, top_p=0.95), 5, jax.random.key(3), BYTES.eos))
    assert pieces[0] == "aé"
    assert "".join(pieces) == "aé" + BYTES.decode(np.concatenate(ids))


def test_the_same_seed_gives_the_same_text(bytes_model):
    texts = ["".join(complete(bytes_model, BYTES, "ab", 5, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_words_of_a_synthetic_language_have_spaces(bytes_model):
    text = "".join(complete(bytes_model, SymbolTokenizer(264), "3 0", 5))
    words = text.split(" ")
    assert words[:2] == ["3", "0"] and len(words) == 7 and all(0 <= int(word) < 264 for word in words)


def test_a_prompt_that_is_no_text_of_the_tokenizer_is_refused_at_the_call(bytes_model):
    with pytest.raises(ConfigError, match=r"prompt='3 x'.*"):
        complete(bytes_model, SymbolTokenizer(264), "3 x")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        complete(bytes_model, BYTES, "a", 0)


def test_bytes_stop_at_the_end_of_a_document_and_other_tokens_never(bytes_model, monkeypatch):
    asked = []

    def told(model, prompts, sampling, max_new_tokens, key, eos):
        asked.append(eos)
        # A character that is cut off by the end shows when the text is finished.
        return iter([np.array([0xC3]), np.array([ByteTokenizer.eos])] if eos else [np.array([1])])

    monkeypatch.setattr("sparse_lm.generate.complete.generate", told)
    assert list(complete(bytes_model, BYTES, "a")) == ["a", "", "", "\ufffd"]
    assert "".join(complete(bytes_model, SymbolTokenizer(3), "2")) == "2 1"
    assert asked == [ByteTokenizer.eos, None]
