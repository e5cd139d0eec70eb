"""What became of a corpus: how much was read, dropped, repaired, held out and padded."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of one built dataset. For a synthetic language a symbol counts as a byte; for facts only rows are counted.

    documents, bytes: kept, both splits together.
    empty: documents without a byte, left out.
    replaced, skipped: documents with undecodable bytes that were repaired by U+FFFD, or left out.
    nul: NUL bytes (kept).
    domains, train_bytes, validation_bytes: bytes of each domain, in the same order.
    train_rows: None where rows are made on the fly without end.
    train_padding, validation_padding: tokens of the last row that are no data.
    """

    domains: tuple[str, ...]
    train_bytes: tuple[int, ...] = ()
    validation_bytes: tuple[int, ...] = ()
    documents: int = 0
    bytes: int = 0
    empty: int = 0
    replaced: int = 0
    skipped: int = 0
    nul: int = 0
    train_rows: int | None = None
    validation_rows: int = 0
    train_padding: int = 0
    validation_padding: int = 0

    def lines(self) -> list[str]:
        """A summary to print: totals, one line per domain, and the oddities that there were."""
        rows = "endless" if self.train_rows is None else f"{self.train_rows:,}"
        out = [
            f"{self.documents:,} documents, {self.bytes:,} bytes; rows: {rows} train "
            f"({self.train_padding:,} padding tokens), {self.validation_rows:,} validation "
            f"({self.validation_padding:,} padding tokens)"
        ]
        for name, train, held_out in zip(self.domains, self.train_bytes, self.validation_bytes, strict=False):
            out.append(f"  {name}: {train:,} bytes train, {held_out:,} validation")
        oddities = {
            "empty documents left out": self.empty,
            "documents with undecodable bytes replaced": self.replaced,
            "documents with undecodable bytes left out": self.skipped,
            "NUL bytes kept": self.nul,
        }
        found = [f"{count:,} {what}" for what, count in oddities.items() if count]
        return [*out, f"  {'; '.join(found)}"] if found else out
