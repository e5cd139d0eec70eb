"""Documents: cleaning them, interleaving their domains under a byte limit, and holding some out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sparse_lm.config import ConfigError

BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """A corpus that cannot be read; the message names the file, the place in it and the way out."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as UTF-8 bytes. Documents of one name (in several domains) fall on the same side of the split."""

    name: str
    domain: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a corpus. `read` yields (document name, raw bytes) and is called at most once, when needed."""

    name: str
    read: Callable[[], Iterable[tuple[str, bytes]]]


@dataclasses.dataclass
class Intake:
    """Running counts of what was read; see `DataReport` for their meaning."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    replaced: int = 0
    skipped: int = 0
    nul: int = 0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in the order in which they were taken, and what was counted meanwhile."""

    documents: tuple[Document, ...]
    intake: Intake


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text (the first 8 bytes of its SHA-256)."""
    # Surrogates occur in file names that are not UTF-8.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def clean(name: str, raw: bytes, invalid_utf8: str, intake: Intake) -> bytes | None:
    """The document as valid UTF-8 without a byte order mark, or None when it is left out; counts both.

    invalid_utf8: `replace`, `skip` or `error`. Raises `DataError` naming document and offset for `error`.
    """
    data = raw.removeprefix(BOM)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "error":
            offset = error.start + len(raw) - len(data)
            raise DataError(
                f"{name}: byte {raw[offset]:#04x} at offset {offset} is not UTF-8; convert the file, "
                "or set data.invalid_utf8 to replace or skip"
            ) from None
        if invalid_utf8 == "skip":
            intake.skipped += 1
            return None
        intake.replaced += 1
        data = data.decode("utf-8", errors="replace").encode("utf-8")
    if not data:
        intake.empty += 1
        return None
    return data


def take_documents(
    files: Mapping[str, Sequence[SourceFile]], invalid_utf8: str = "replace", max_bytes: int | None = None
) -> Corpus:
    """Documents of all domains in turn, one each, until `max_bytes` bytes are taken or all are read.

    Files of a domain come in an order drawn by hash of their name, so that a small limit is no alphabetical slice;
    files beyond the limit are never opened. The document that meets the limit is cut at a character.
    """
    intake = Intake()
    turns = [_documents(domain, files[domain], invalid_utf8, intake) for domain in sorted(files)]
    taken: list[Document] = []
    for document in _in_turn(turns):
        if max_bytes is not None and intake.bytes + len(document.data) >= max_bytes:
            document = _cut(document, max_bytes - intake.bytes)
            turns.clear()
        if document.data:
            taken.append(document)
            intake.documents += 1
            intake.bytes += len(document.data)
            intake.nul += document.data.count(0)
    return Corpus(tuple(taken), intake)


def _in_turn(turns: list[Iterator[Document]]) -> Iterator[Document]:
    """One document of each, again and again, until all are at their end or the list is cleared."""
    while turns:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            else:
                yield document
            if not turns:
                return


def _documents(domain: str, files: Sequence[SourceFile], invalid_utf8: str, intake: Intake) -> Iterator[Document]:
    for file in sorted(files, key=lambda file: (unit_hash(f"order of {file.name}"), file.name)):
        for name, raw in file.read():
            data = clean(name, raw, invalid_utf8, intake)
            if data is not None:
                yield Document(name, domain, data)


def _cut(document: Document, size: int) -> Document:
    # The data is valid UTF-8, so what "ignore" drops is the character that the cut went through.
    return dataclasses.replace(document, data=document.data[:size].decode("utf-8", "ignore").encode("utf-8"))


def split_documents(documents: Sequence[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents, by hash of the name alone: adding a file moves no other.

    Where chance leaves a domain without a validation document, the name of smallest hash among its names moves there,
    provided that another one stays; the same the other way round. Raises `ConfigError` when there are no documents,
    or only one name.
    """
    names: dict[str, list[str]] = {}
    for document in documents:
        names.setdefault(document.domain, []).append(document.name)
    everything = {name for group in names.values() for name in group}
    if len(everything) < 2:
        raise ConfigError(
            "data.validation_fraction",
            validation_fraction,
            f"{len(everything)} document(s) cannot fill both a train and a validation split; split the text over "
            "several files, use jsonl with a record per document, or raise data.max_bytes",
        )
    held_out = {name for name in everything if unit_hash(name) < validation_fraction}
    for group in [names[domain] for domain in sorted(names)] + [sorted(everything)]:
        _even_out(group, held_out)
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def _even_out(group: Sequence[str], held_out: set[str]) -> None:
    ordered = sorted(set(group), key=lambda name: (unit_hash(name), name))
    if len(ordered) < 2:
        return
    if held_out.isdisjoint(ordered):
        held_out.add(ordered[0])
    elif held_out.issuperset(ordered):
        held_out.remove(ordered[-1])
