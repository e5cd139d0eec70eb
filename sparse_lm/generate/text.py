"""Tokens to text while they come: a character whose bytes arrive in several steps is shown once it is whole."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np

from sparse_lm.data.tokenizers import ByteTokenizer, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one sequence piece by piece; the pieces laid end to end are the text of the whole sequence.

    Bytes: special tokens are dropped, broken UTF-8 shows as U+FFFD. Other tokenizers: words with a space between.
    Ids outside the tokenizer's vocabulary, which a model with a wider one may draw, show as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._empty = True

    def push(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text that these ids complete; possibly empty."""
        return "".join(self._one(int(token)) for token in ids)

    def finish(self) -> str:
        """What is left at the end of the sequence: U+FFFD for a character that was cut off, else nothing."""
        return self._bytes.decode(b"", final=True)

    def _one(self, token: int) -> str:
        known = 0 <= token < self._tokenizer.vocab_size
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(self._tokenizer.decode_bytes([token])) if known else self.finish() + REPLACEMENT
        word = self._tokenizer.decode([token]) if known else REPLACEMENT
        space = "" if self._empty else " "
        self._empty = False
        return space + word
