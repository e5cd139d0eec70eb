"""What kinds of tokens there are: classes of bytes, symbols of a grammar, roles of facts, places in a document."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from sparse_lm.data.tokenizers import ByteTokenizer, FactTokenizer, Tokenizer

_BYTES = (
    ("lower-case letter", "abcdefghijklmnopqrstuvwxyz"),
    ("upper-case letter", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ("digit", "0123456789"),
    ("space", " "),
    ("line end", "\n\r"),
    ("other whitespace", "\t\v\f"),
    ("bracket", "()[]{}<>"),
    ("quote", "\"'`"),
    ("underscore", "_"),
    ("sentence mark", ".,:;!?"),
    ("operator, other sign", "#$%&*+-/=@\\^|~"),
)
_MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """Names, and which of them every token has (or every id of a vocabulary); -1 is none that is known."""

    names: tuple[str, ...]
    index_M: Int[np.ndarray, "M"]

    def used(self) -> Labels:
        """Without the names that no token has."""
        there, index_M = np.unique(self.index_M, return_inverse=True)
        return Labels(tuple(self.names[i] for i in there), index_M)


def token_classes(tokenizer: Tokenizer) -> Labels:
    """The class of every id. Bytes: what they are as ASCII. Facts: a, b, value. Other ids: each is a class."""
    size = tokenizer.vocab_size
    if isinstance(tokenizer, ByteTokenizer):
        names = (*(name for name, _ in _BYTES), "control byte", "not ASCII", "special token")
        of = {ord(char): i for i, (_, chars) in enumerate(_BYTES) for char in chars}
        other = len(_BYTES)
        ids = [of.get(i, other if i < 128 else other + 1 if i < 256 else other + 2) for i in range(size)]
        return Labels(names, np.array(ids))
    if isinstance(tokenizer, FactTokenizer):
        ends = np.cumsum([tokenizer.num_a, tokenizer.num_b, tokenizer.num_values])
        return Labels(("a", "b", "value", "separator"), np.searchsorted(ends, np.arange(size), side="right"))
    return Labels(tuple(tokenizer.decode([i]) for i in range(size)), np.arange(size))


def position_bins(position_M: Int[np.ndarray, "M"]) -> Labels:
    """Places in a document by powers of two: 0, 1, 2-3, 4-7 and so on."""
    index_M = np.where(position_M > 0, np.floor(np.log2(np.maximum(position_M, 1))).astype(np.int64) + 1, 0)
    spans = [(2 ** (i - 1), 2**i - 1) for i in range(1, int(index_M.max(initial=0)) + 1)]
    return Labels(("0", *(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)), index_M)


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token so that it can be seen: white space as a mark, other bytes that no one can read as hexadecimal."""
    if not isinstance(tokenizer, ByteTokenizer):
        return tokenizer.decode([token]) if token < tokenizer.vocab_size else f"id {token}"
    special = {getattr(ByteTokenizer, name): name for name in ("pad", "bos", "eos", "mask", "sep", "cls")}
    if token >= 256:
        return f"[{special.get(token, token)}]"
    return _MARKS.get(chr(token)) or (chr(token) if 32 < token < 127 else f"0x{token:02x}")


def context(tokenizer: Tokenizer, ids_M: Int[np.ndarray, "M"], at: int, span: tuple[int, int], width: int = 24) -> str:
    """The token `at` in guillemets with up to `width` tokens on each side, none outside of `span` (first, end)."""
    low, high = max(span[0], at - width), min(span[1], at + width + 1)
    if not isinstance(tokenizer, ByteTokenizer):
        near = width // 3  # names of symbols take more room than bytes
        words = [token_name(tokenizer, int(i)) for i in ids_M[max(low, at - near) : min(high, at + near + 1)]]
        place = at - max(low, at - near)
        words[place] = f"«{words[place]}»"
        return " ".join(words)
    before, after = (tokenizer.decode(ids) for ids in (ids_M[low:at], ids_M[at + 1 : high]))
    text = f"{before}«{token_name(tokenizer, int(ids_M[at]))}»{after}"
    return "".join(
        _MARKS.get(char, char) if char != " " else char for char in text if char in _MARKS or char.isprintable()
    )
