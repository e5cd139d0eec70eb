"""From a prompt as text to its continuation as text: for the mains and for notebooks."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from sparse_lm.config import ConfigError
from sparse_lm.data.tokenizers import ByteTokenizer, Tokenizer
from sparse_lm.generate.sample import Sampling
from sparse_lm.generate.stream import generate
from sparse_lm.generate.text import TextStream
from sparse_lm.models.decoder import Decoder

NUCLEUS = Sampling(0.8, top_p=0.95)


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    sampling: Sampling = NUCLEUS,
    seed: int = 0,
) -> Iterator[str]:
    """The prompt, then pieces of its continuation while they come; `"".join` makes the whole text of them.

    A model of bytes stops at the end of its document. seed: of the draws, the same gives the same text. model: as
    `train.restore.load_model` returns it, on one device: a single sequence cannot be shared by several.
    Raises `ConfigError` at the call when the prompt is no text of the tokenizer, and as `generate`.
    """
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise ConfigError("prompt", prompt, str(error)) from error
    eos = ByteTokenizer.eos if isinstance(tokenizer, ByteTokenizer) else None
    steps = generate(model, [ids], sampling, max_new_tokens, jax.random.key(seed), eos)
    text = TextStream(tokenizer)

    def pieces() -> Iterator[str]:
        yield text.push(ids)
        for step in steps:
            yield text.push(step)
        yield text.finish()

    return pieces()
