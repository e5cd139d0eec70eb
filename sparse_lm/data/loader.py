"""The data pipeline from its configuration to batches: datasets, the training stream and validation batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import numpy as np

from sparse_lm.batch import Batch
from sparse_lm.config import to_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.data.documents import Corpus, Document, split_documents
from sparse_lm.data.packing import PackedRows, Rows, empty_row, pack, stack_rows
from sparse_lm.data.report import DataReport
from sparse_lm.data.sources import stdlib_documents, text_documents
from sparse_lm.data.synthetic import FactRows, draw_grammar
from sparse_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer, Tokenizer

VALIDATION_SEED = 0  # runs with several seeds are compared on the same validation rows, in the same order


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits of rows of `length + 1` tokens, and what is known about them.

    train, validation: random access to rows (`Batch` of vectors).
    domains: names; `Batch.domains_BL` points into them.
    pad: the id that fills empty rows.
    fingerprint: SHA-256 (hex) of the configuration and the tokens of both splits; where a text lies does not matter.
    entropy: lowest mean loss that is possible on all validation rows, in nats per target, known for synthetic data.
        For a grammar it is what the ideal predictor gets, which knows the tables but neither a document's domain nor
        what came before the part of it that stands in the row.
    entropy_given_domain: the same in expectation for who knows the domain and the full context (grammar only).
    validation_bytes_per_target: bytes predicted per validation target, at most 1 as an end of document is a target
        without a byte: bits per byte = nats per target / (ln 2 * this). None when the data is no text.
    """

    train: Rows
    validation: Rows
    domains: tuple[str, ...]
    vocab_size: int
    pad: int
    fingerprint: str
    tokenizer: Tokenizer
    report: DataReport
    entropy: float | None = None
    entropy_given_domain: float | None = None
    validation_bytes_per_target: float | None = None


def build_dataset(config: DataConfig, seed: int = 0) -> Dataset:
    """The dataset of a configuration. `seed` orders the training documents (draws the training rows, for facts).

    Raises `ConfigError` when there is no text or too little to hold some out, and `DataError` when a file is broken.
    """
    if config.source == "facts":
        return _build_facts(config, seed)
    if config.source == "grammar":
        return _build_grammar(config, seed)
    corpus = stdlib_documents(config.max_bytes) if config.source == "stdlib" else text_documents(config)
    tokenizer = ByteTokenizer()
    domains = tuple(sorted({document.domain for document in corpus.documents}))
    splits = split_documents(corpus.documents, config.validation_fraction)
    arrays = [[np.frombuffer(document.data, np.uint8) for document in split] for split in splits]
    train, validation = _pack(splits, arrays, domains, config, seed, (tokenizer.eos, tokenizer.pad))
    predicted = validation.predicted()
    return Dataset(
        train,
        validation,
        domains,
        tokenizer.vocab_size,
        tokenizer.pad,
        _fingerprint(config, train, validation),
        tokenizer,
        _report(corpus, splits, domains, train, validation),
        validation_bytes_per_target=float((predicted < 256).mean()) if predicted.size else None,
    )


def _build_grammar(config: DataConfig, seed: int) -> Dataset:
    grammar = draw_grammar(config.grammar)
    corpus = grammar.corpus(config.max_bytes)
    splits = split_documents(corpus.documents, config.validation_fraction)
    arrays = [[np.frombuffer(document.data, np.uint8) for document in split] for split in splits]
    # No end of document: its length is fixed, and predicting where it ends would blur the exact entropy.
    train, validation = _pack(splits, arrays, grammar.domains, config, seed, (None, 0))
    return Dataset(
        train,
        validation,
        grammar.domains,
        config.grammar.num_symbols,
        0,
        _fingerprint(config, train, validation),
        SymbolTokenizer(config.grammar.num_symbols),
        _report(corpus, splits, grammar.domains, train, validation),
        entropy=grammar.best_loss(validation),
        entropy_given_domain=float(grammar.entropy_rates().mean()),
    )


def _build_facts(config: DataConfig, seed: int) -> Dataset:
    train = FactRows.train(config.facts, config.length, seed)
    validation = FactRows.validation(config.facts, config.length)
    tokenizer = train.tokenizer
    return Dataset(
        train,
        validation,
        ("facts",),
        tokenizer.vocab_size,
        tokenizer.separator,
        _fingerprint(config, seed),
        tokenizer,
        DataReport(("facts",), validation_rows=len(validation)),
        entropy=0.0,
    )


def _pack(
    splits: Sequence[Sequence[Document]],
    arrays: Sequence[Sequence[np.ndarray]],
    domains: tuple[str, ...],
    config: DataConfig,
    seed: int,
    ids: tuple[int | None, int],
) -> list[PackedRows]:
    packed = []
    for documents, tokens, order in zip(splits, arrays, (seed, VALIDATION_SEED), strict=True):
        index = [domains.index(document.domain) for document in documents]
        packed.append(pack(tokens, index, config.length + 1, eos=ids[0], pad=ids[1], seed=order))
    return packed


def _fingerprint(config: DataConfig, *parts: PackedRows | int) -> str:
    described = to_dict(config)
    del described["path"]  # the text counts, not where it lies
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for part in parts:
        digest.update(b"/")
        if isinstance(part, int):
            digest.update(str(part).encode())
            continue
        for array in (part.tokens, part.starts, part.document_domains):
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _report(
    corpus: Corpus,
    splits: Sequence[Sequence[Document]],
    domains: tuple[str, ...],
    train: PackedRows,
    validation: PackedRows,
) -> DataReport:
    sizes = []
    for split in splits:
        counts = dict.fromkeys(domains, 0)
        for document in split:
            counts[document.domain] += len(document.data)
        sizes.append(tuple(counts.values()))
    return DataReport(
        domains,
        *sizes,
        **dataclasses.asdict(corpus.intake),
        train_rows=len(train),
        validation_rows=len(validation),
        train_padding=train.padding,
        validation_padding=validation.padding,
    )


class TrainLoader:
    """The endless stream of training batches; a batch is a pure function of (dataset, batch size, seed, step).

    Every epoch visits all rows once in an order of its own; batches run on across the end of an epoch. One of several
    processes reads and gets only the rows [len(rows), length + 1] of the global batch that it asks for; the global
    batch is the same however many there are.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, start_step: int = 0, rows: Sequence[int] | None = None
    ):
        """rows: this process's, as indices into the global batch; None is all.

        Raises `ValueError` when a row is not in the batch, there are none, or the step is negative.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._rows = tuple(range(batch_size)) if rows is None else tuple(rows)
        if not self._rows or not all(0 <= row < batch_size for row in self._rows):
            raise ValueError(f"rows={list(self._rows)} must be some of the {batch_size} of the batch, counted from 0")
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must not be negative")
        import grain  # half a second, and only training needs it

        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._step = start_step
        self._stream = grain.MapDataset.source(dataset.train).seed(seed).shuffle().repeat()  # type: ignore[arg-type]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self.batch_at(self._step)
        self._step += 1
        return batch

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the global batch of a step; leaves the stream where it is."""
        return stack_rows([cast(Batch, self._stream[step * self._batch_size + row]) for row in self._rows])

    def state(self) -> dict[str, Any]:
        """Where the stream stands, ready for JSON: `step` is the next one, `epoch` that of its first row."""
        return {
            "step": self._step,
            "epoch": self._step * self._batch_size // len(self._dataset.train),
            "seed": self._seed,
            "batch_size": self._batch_size,
            "fingerprint": self._dataset.fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the number of processes may have changed.

        Raises `ValueError` when a key is missing, or the state belongs to other data, another seed or batch size:
        rows would be repeated or left out without a sign of it.
        """
        for key, here in self.state().items():
            if key not in state:
                raise ValueError(
                    f"data state without {key!r} (it has {', '.join(sorted(state))}): not a loader's state"
                )
            if key not in ("step", "epoch") and state[key] != here:
                raise ValueError(
                    f"data state has {key}={state[key]!r} and this run {key}={here!r}: the stream cannot go on; "
                    f"set {key} back, or start a new run from the checkpoint's parameters alone"
                )
        self._step = int(state["step"])


def validation_batches(
    dataset: Dataset, batch_size: int, num_batches: int, rows: Sequence[int] | None = None
) -> list[Batch]:
    """At most `num_batches` batches of validation rows, the same ones in the same order on every call.

    Where there are more rows than asked for, they are taken at equal distances. The last batch is filled up with empty
    rows (segment 0, no targets). rows: those of each batch that this process wants, None is all. Raises `ValueError`
    when either size is under 1.
    """
    if batch_size < 1 or num_batches < 1:
        raise ValueError(f"batch_size={batch_size} and num_batches={num_batches} must be at least 1")
    available = len(dataset.validation)
    count = min(available, batch_size * num_batches)
    width = np.asarray(dataset.validation[0].tokens_BL).shape[0]

    def row(i: int) -> Batch:
        return dataset.validation[i * available // count] if i < count else empty_row(width, dataset.pad)

    wanted = range(batch_size) if rows is None else rows
    return [stack_rows([row(start + i) for i in wanted]) for start in range(0, count, batch_size)]
