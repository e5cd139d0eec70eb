"""Configuration of the data pipeline."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_lm.config import Config, ConfigError, option

MAX_TABLE = 2**22  # entries of a grammar's table of successors: 32 MB, and as much again for probabilities


@dataclasses.dataclass(frozen=True)
class GrammarConfig(Config):
    """A multi-domain language whose entropy is known exactly: each domain is its own Markov chain over its symbols.

    num_domains: chains; a document stays in one.
    num_symbols: alphabet shared by all domains (the same symbol means something else in each).
    branching: successors that a context may have.
    order: symbols of context that decide the successor's distribution.
    seed: draws the tables.
    """

    num_domains: int = option(4, ge=1)
    num_symbols: int = option(32, ge=2, le=256)
    branching: int = option(4, ge=1)
    order: int = option(1, ge=1, le=3)
    document_length: int = option(256, ge=8)
    num_documents: int = option(4096, ge=16)
    seed: int = option(0, ge=0)

    def check(self) -> None:
        """Raises `ConfigError` when there are more successors than symbols, or the tables would not fit in memory."""
        if self.branching > self.num_symbols:
            raise ConfigError("branching", self.branching, f"must be at most num_symbols={self.num_symbols}")
        entries = self.num_domains * self.num_symbols**self.order * self.branching
        if entries > MAX_TABLE:
            raise ConfigError(
                "order", self.order, f"tables of {entries} entries, over {MAX_TABLE}; lower it or num_symbols"
            )


@dataclasses.dataclass(frozen=True)
class FactsConfig(Config):
    """A table of facts: triples (a, b, v) with v = table[a, b] drawn once at random; only v is predicted.

    What a model stores, not what it computes, decides its loss: 0 nats is reached by knowing the whole table, and
    log(num_values) by knowing nothing.
    """

    num_a: int = option(64, ge=2)
    num_b: int = option(64, ge=2)
    num_values: int = option(128, ge=2)
    seed: int = option(0, ge=0)


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """What to train on, and how it is cut into rows.

    source: `stdlib` (the running Python's own sources, documentation and license texts: present on every machine),
        `text` (files under `path`: txt, md, py, jsonl, each optionally .gz), `grammar` or `facts` (synthetic).
    length: tokens that the model sees in a row; a stored row has one more.
    validation_fraction: share of the files (documents for synthetic data) held out, chosen by hash of their name.
    max_bytes: stop reading a corpus after this many bytes of text, documents interleaved over domains; None is all.
    invalid_utf8: what happens to undecodable bytes of a text file: `replace` them by U+FFFD, `skip` the document, or
        `error`. Whatever happens is counted in the data report.
    jsonl_field: the field of a jsonl record that holds the text.
    """

    source: Literal["stdlib", "text", "grammar", "facts"] = "stdlib"
    path: str | None = None
    length: int = option(256, ge=2)
    validation_fraction: float = option(0.05, gt=0, lt=1)
    max_bytes: int | None = option(None, ge=1)
    invalid_utf8: Literal["replace", "skip", "error"] = "replace"
    jsonl_field: str = "text"
    grammar: GrammarConfig = GrammarConfig()
    facts: FactsConfig = FactsConfig()

    def check(self) -> None:
        """Raises `ConfigError` when `path` and `source` do not go together."""
        if (self.source == "text") != (self.path is not None):
            raise ConfigError("path", self.path, "data.source=text needs a path, and only data.source=text reads one")
        if self.source == "facts" and self.length % 3:
            raise ConfigError("length", self.length, "a row of facts holds whole triples: choose a multiple of 3")
