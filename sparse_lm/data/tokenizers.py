"""Tokenizers: text to ids and back. Bytes for real text; readable names for the ids of synthetic languages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What generation and evaluation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [tokens], of a text; no special tokens are added."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Readable text of some ids."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte, then the special tokens below and two reserved ids (262, 263): 264 is a multiple of 8."""

    vocab_size: int = 264
    pad: ClassVar[int] = 256
    bos: ClassVar[int] = 257
    eos: ClassVar[int] = 258
    mask: ClassVar[int] = 259
    sep: ClassVar[int] = 260
    cls: ClassVar[int] = 261

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids, int32 [bytes], of a text (as UTF-8) or of bytes; no special tokens are added.

        Raises `UnicodeEncodeError` when a text holds a lone surrogate, which UTF-8 cannot say.
        """
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of some ids; special tokens are dropped. Raises `ValueError` on an id outside the vocabulary."""
        array = _checked(ids, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some ids; special tokens are dropped and broken UTF-8 shows as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class SymbolTokenizer:
    """Symbols of a synthetic language as decimal numbers with spaces between: `3 0 17`."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [symbols]. Raises `ValueError` on a word that is no number, or outside the alphabet."""
        return _checked([int(word) for word in text.split()], self.vocab_size)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The numbers, in order. Raises `ValueError` on an id outside the alphabet."""
        return " ".join(str(i) for i in _checked(ids, self.vocab_size))


@dataclasses.dataclass(frozen=True)
class FactTokenizer:
    """Ids of facts by role: `a3 b17 v9`, and `|` for the separator (the last id)."""

    num_a: int
    num_b: int
    num_values: int

    @property
    def vocab_size(self) -> int:
        """The three ranges and the separator."""
        return self.num_a + self.num_b + self.num_values + 1

    @property
    def separator(self) -> int:
        """The id that starts a row."""
        return self.vocab_size - 1

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [words]. Raises `ValueError` on a word that names no id."""
        return np.asarray([self._id(word) for word in text.split()], np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The words, in order. Raises `ValueError` on an id outside the vocabulary."""
        return " ".join(self._word(int(i)) for i in _checked(ids, self.vocab_size))

    def _roles(self) -> dict[str, tuple[int, int]]:
        return {
            "a": (0, self.num_a),
            "b": (self.num_a, self.num_b),
            "v": (self.num_a + self.num_b, self.num_values),
        }

    def _id(self, word: str) -> int:
        if word == "|":
            return self.separator
        first, count = self._roles().get(word[0], (0, 0))
        if not word[1:].isdecimal() or int(word[1:]) >= count:
            raise ValueError(
                f"{word!r} names no token; known: a0..a{self.num_a - 1}, b0..b{self.num_b - 1}, "
                f"v0..v{self.num_values - 1} and |"
            )
        return first + int(word[1:])

    def _word(self, token: int) -> str:
        for role, (first, count) in self._roles().items():
            if first <= token < first + count:
                return f"{role}{token - first}"
        return "|"


def _checked(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"token id {int(outside[0])} is outside the vocabulary of {vocab_size} ids")
    return array.astype(np.int32)
