"""Synthetic languages with a known best loss: a grammar (Markov chains, one per domain) and a table of facts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import numpy as np

from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError
from sparse_lm.data.config import FactsConfig, GrammarConfig
from sparse_lm.data.documents import Corpus, Document, Intake
from sparse_lm.data.packing import PackedRows, make_batch
from sparse_lm.data.tokenizers import FactTokenizer

VALIDATION_FACT_ROWS = 4096
ENDLESS = 2**31 - 1  # rows of an epoch of facts: more than any run reads
POWER_ITERATIONS = 50_000


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Markov chains over the contexts of `order` symbols, one chain per domain. Drawn by `draw_grammar`.

    A context is the number whose digits in base `num_symbols` are its symbols, the latest one last.
    successors: int64 [domains, contexts, branching], distinct symbols per context.
    probabilities: float64, the same shape; rows sum to 1.
    stationary: float64 [domains, contexts], the distribution that documents start from and therefore keep: a part
        cut out anywhere follows the same law as one at the start.
    """

    config: GrammarConfig
    successors: np.ndarray
    probabilities: np.ndarray
    stationary: np.ndarray

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of their numbers."""
        return tuple(f"grammar{i:03d}" for i in range(self.config.num_domains))

    def corpus(self, max_bytes: int | None = None) -> Corpus:
        """Documents of `document_length` symbols (a byte each), the domain of each drawn uniformly.

        Only as many whole documents as `max_bytes` holds, but two at least.
        """
        count = self.config.num_documents
        if max_bytes is not None:
            count = min(count, max(2, max_bytes // self.config.document_length))
        # All documents are drawn in any case, so that a limit changes how many there are and not what they say.
        domains, symbols = self._draw(np.random.default_rng([self.config.seed, 1]))
        documents = tuple(
            Document(f"grammar/{i}", self.domains[domains[i]], symbols[i].tobytes()) for i in range(count)
        )
        size = count * self.config.document_length
        return Corpus(documents, Intake(documents=count, bytes=size))

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        domains = rng.integers(config.num_domains, size=config.num_documents)
        cumulative = np.cumsum(self.stationary, axis=1)
        draws = rng.random(config.num_documents)
        contexts = np.empty(config.num_documents, np.int64)
        for domain in range(config.num_domains):
            mine = domains == domain
            contexts[mine] = np.searchsorted(cumulative[domain], draws[mine] * cumulative[domain, -1], "right")
        # The draw can meet the last sum by rounding.
        contexts = np.minimum(contexts, self.stationary.shape[1] - 1)
        symbols = np.empty((config.num_documents, config.document_length), np.uint8)
        for place in range(config.order):
            symbols[:, place] = contexts // config.num_symbols ** (config.order - 1 - place) % config.num_symbols
        steps = np.cumsum(self.probabilities, axis=2)
        for place in range(config.order, config.document_length):
            draws = rng.random(config.num_documents)
            slot = (draws[:, None] >= steps[domains, contexts]).sum(1)
            slot = np.minimum(slot, config.branching - 1)
            symbols[:, place] = self.successors[domains, contexts, slot]
            contexts = self.shift(contexts, symbols[:, place])
        return domains, symbols

    def shift(self, contexts: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The contexts that follow when these symbols are read."""
        return contexts % self.config.num_symbols ** (self.config.order - 1) * self.config.num_symbols + symbols

    def entropy_rates(self) -> np.ndarray:
        """Nats per symbol of each domain, [domains], for who knows the domain and the full context.

        The stationary mean of the entropy of the successors (Shannon 1948, section 7).
        """
        logs = np.log(np.where(self.probabilities > 0, self.probabilities, 1.0))
        return -(self.stationary[..., None] * self.probabilities * logs).sum((1, 2))

    def best_loss(self, rows: PackedRows) -> float:
        """Mean nats per target that the ideal predictor gets on these rows.

        It knows the tables, and of a document nothing but the symbols before in the same row: the posterior over the
        domains starts uniform and is updated by Bayes' rule with every symbol; contexts that reach back before the
        part follow the stationary distribution. A part w1..wn thus costs
        log sum_d p(w1 | d) - log sum_d p(w1..wn | d), as its first symbol is no target.
        The figure is the loss on these very rows, so it scatters about its expectation as any measured loss does.
        Raises `ConfigError` when no row has a target.
        """
        tokens, begins = rows.tokens[: rows.total].astype(np.int64), rows.part_starts()
        if len(begins) == len(tokens):
            raise ConfigError("data.length", rows.width - 1, "no validation row has a target; use more documents")
        first, whole = self.part_log_likelihoods(tokens, begins)
        # The uniform prior stands in both sums and cancels.
        nats = np.logaddexp.reduce(first, axis=0) - np.logaddexp.reduce(whole, axis=0)
        return float(nats.sum() / (len(tokens) - len(begins)))

    def part_log_likelihoods(self, tokens: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood of the first symbol and of the whole of each part, given the domain, both [domains, parts].

        tokens: int64 [tokens]; begins: int64 [parts], from 0, where the parts start.
        """
        order, base = self.config.order, self.config.num_symbols
        place = np.arange(len(tokens)) - np.repeat(begins, np.diff(begins, append=len(tokens)))
        contexts = np.zeros(len(tokens), np.int64)
        for back in range(order, 0, -1):
            contexts[back:] = contexts[back:] * base + tokens[:-back]
        inner = np.flatnonzero(place >= order)
        known = np.minimum(np.diff(begins, append=len(tokens)), order)
        first, whole = [], []
        for domain in range(self.config.num_domains):
            costs = np.zeros(len(tokens))
            hit = self.successors[domain, contexts[inner]] == tokens[inner, None]
            with np.errstate(divide="ignore"):
                costs[inner] = np.log((self.probabilities[domain, contexts[inner]] * hit).sum(1))
                first.append(np.log(self._marginal(domain, 1)[tokens[begins]]))
                whole.append(np.add.reduceat(costs, begins))
                for length in range(1, order + 1):
                    mine = np.flatnonzero(known == length)
                    heads = np.zeros(len(mine), np.int64)
                    for offset in range(length):
                        heads = heads * base + tokens[begins[mine] + offset]
                    whole[-1][mine] += np.log(self._marginal(domain, length)[heads])
        return np.stack(first), np.stack(whole)

    def _marginal(self, domain: int, length: int) -> np.ndarray:
        """Stationary probability of every string of `length` <= order symbols."""
        return self.stationary[domain].reshape(self.config.num_symbols**length, -1).sum(1)


def draw_grammar(config: GrammarConfig) -> Grammar:
    """Draws the tables of a grammar from its seed.

    Of the contexts that differ in the oldest symbol alone, each of the `branching` successors makes a permutation:
    every context has as many ways in as ways out, so none is transient and all symbols occur in all domains.
    Probabilities are Dirichlet(1). Raises `ConfigError` when a chain mixes too slowly to find its stationary
    distribution.
    """
    rng = np.random.default_rng([config.seed, 0])
    base, suffixes = config.num_symbols, config.num_symbols ** (config.order - 1)
    shape = config.num_domains, suffixes, base
    identity = np.broadcast_to(np.arange(base), shape)
    oldest, symbols = rng.permuted(identity, axis=2), rng.permuted(identity, axis=2)
    offsets = rng.permuted(identity, axis=2)[..., : config.branching]
    columns = (oldest[..., None] + offsets[:, :, None, :]) % base
    successors = np.take_along_axis(symbols, columns.reshape(*shape[:2], -1), axis=2).reshape(columns.shape)
    # [domain, suffix, oldest, slot] to [domain, context, slot], where the oldest symbol is the leading digit.
    successors = successors.swapaxes(1, 2).reshape(config.num_domains, base * suffixes, config.branching)
    probabilities = rng.dirichlet(np.ones(config.branching), size=successors.shape[:2])
    follow = np.arange(base * suffixes)[:, None] % suffixes * base + successors
    stationary = [_stationary(follow[d], probabilities[d], config) for d in range(config.num_domains)]
    return Grammar(config, successors, probabilities, np.stack(stationary))


def _stationary(follow: np.ndarray, probabilities: np.ndarray, config: GrammarConfig) -> np.ndarray:
    """A stationary distribution by power iteration from the uniform one.

    A periodic chain converges too: with as many ways in as out, its cyclic classes are of one size, and the uniform
    distribution gives each the mass that it keeps.
    """
    state = np.full(len(follow), 1 / len(follow))
    for _ in range(POWER_ITERATIONS):
        flow = np.bincount(follow.ravel(), (state[:, None] * probabilities).ravel(), len(follow))
        if np.abs(flow - state).sum() < 1e-13:
            return state / state.sum()
        state = flow
    raise ConfigError("data.grammar.seed", config.seed, "this chain mixes too slowly; take another seed or branching")


@dataclasses.dataclass(frozen=True, eq=False)
class FactRows:
    """Rows of facts, made on access from (stream, index): a separator, then triples a, b, table[a, b].

    a and b are uniform. Every triple is a document of its own, so that attention cannot copy from an earlier one, and
    only its value is a target.
    table: int64 [num_a, num_b]. stream: seeds of the rows.
    """

    config: FactsConfig
    table: np.ndarray
    triples: int
    stream: tuple[int, ...]
    size: int

    @classmethod
    def train(cls, config: FactsConfig, length: int, seed: int) -> Self:
        """The endless training rows (length / 3 triples each) of a seed."""
        return cls(config, fact_table(config), length // 3, (config.seed, 0, seed), ENDLESS)

    @classmethod
    def validation(cls, config: FactsConfig, length: int) -> Self:
        """Validation rows: the same table, another stream, the same rows for every training seed."""
        return cls(config, fact_table(config), length // 3, (config.seed, 1), VALIDATION_FACT_ROWS)

    @property
    def tokenizer(self) -> FactTokenizer:
        """The layout of the ids, with readable names."""
        return FactTokenizer(self.config.num_a, self.config.num_b, self.config.num_values)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        rng = np.random.default_rng([*self.stream, index])
        a = rng.integers(self.config.num_a, size=self.triples)
        b = rng.integers(self.config.num_b, size=self.triples)
        tokens = np.full(3 * self.triples + 1, self.tokenizer.separator, np.int32)
        tokens[1::3] = a
        tokens[2::3] = self.config.num_a + b
        tokens[3::3] = self.config.num_a + self.config.num_b + self.table[a, b]
        return make_batch(tokens, *self._frame)

    @functools.cached_property
    def _frame(self) -> np.ndarray:
        """What all rows have in common: segments, positions, targets and domains, int32 [4, tokens]."""
        columns = np.zeros((4, 3 * self.triples + 1), np.int32)
        columns[0, 0] = 1
        columns[0, 1:] = np.repeat(np.arange(2, self.triples + 2), 3)
        columns[1, 1:] = np.tile(np.arange(3), self.triples)
        columns[2] = columns[1] == 2
        columns.setflags(write=False)
        return columns


def fact_table(config: FactsConfig) -> np.ndarray:
    """The facts, int64 [num_a, num_b]: values drawn uniformly from the table's own seed."""
    return np.random.default_rng([config.seed, 2]).integers(config.num_values, size=(config.num_a, config.num_b))
