"""Where rows of metrics go: a JSON-lines file that survives crashes and resumes, and TensorBoard scalars."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

Row = Mapping[str, Any]

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class Sink(Protocol):
    """Takes rows; see `MetricsFile` for what a row holds."""

    def append(self, row: Row) -> None:
        """Records one row."""
        ...

    def close(self) -> None:
        """Writes out what is still buffered. A closed sink takes no more rows."""
        ...


class MetricsFile:
    """One JSON object per line, flushed line by line, so that the file can be read while the run goes on.

    A row has `step` (int) and `split` ("train", "validation") and any further keys of scalars, lists and mappings.
    Numbers that are not finite are written as null. A last line that a crash tore is cut off on opening. With
    `active=False` (every process but the first) nothing is written or changed.
    """

    def __init__(self, path: Path | str, active: bool = True):
        self.path, self.active = Path(path), active
        self._stream: IO[str] | None = None
        self._closed = False
        if active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._keep(lambda row: True)

    def append(self, row: Row) -> None:
        """Adds one line and flushes it. Raises `TypeError` naming the key of a value that JSON cannot hold."""
        if self._closed:
            raise ValueError(f"{self.path}: the file was closed; open a new MetricsFile to go on")
        if not self.active:
            return
        line = json.dumps(plain(row), allow_nan=False, separators=(",", ":"))
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        self._stream.write(line + "\n")
        self._stream.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps than `step`, which a resumed run will write again. All or nothing.

        Raises `ValueError` with the line number when the file has an invalid line that is not its last.
        """
        if self.active and self.path.exists():
            self._release()
            self._keep(lambda row: row.get("step", 0) <= step)

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        self._release()
        self._closed = True

    def _release(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _keep(self, wanted) -> None:
        before = self.path.read_bytes()
        lines = [line for line, row in _parse(before, self.path) if wanted(row)]
        after = b"".join(line + b"\n" for line in lines)
        if after != before:
            replace_file(self.path, after)


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics file in order. A torn last line is left out: a crash, or a run that is writing it now.

    Raises `ValueError` with path and line number on any other line that is not a JSON object, and
    `FileNotFoundError` when there is no file.
    """
    path = Path(path)
    return [row for _, row in _parse(path.read_bytes(), path)]


def _parse(data: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = data.split(b"\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    parsed = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
        except ValueError as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors as well
            if i == last:
                break
            raise ValueError(
                f"{path}:{i + 1}: not a row of metrics ({error}); only the last line of a file may be torn. "
                "Remove the line, or the file, to go on"
            ) from error
        parsed.append((line, row))
    return parsed


def replace_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader, or a crash, meets the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any, key: str = "row") -> Any:
    """`value` as JSON can hold it: arrays as lists, NaN and infinities as None. Raises `TypeError` naming the key."""
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{key}={value!r}: {type(value).__name__} is not JSON; pass a number, text, list, mapping or array")


def scalars(row: Row) -> dict[str, float]:
    """The finite numbers of a row by TensorBoard tag: `train/loss`, `validation/losses_by_domain/code`.

    Left out are step, split, text, truth values, lists and the per-layer arrays under `layers`.
    """
    split = row.get("split", "train")
    found = {}
    for key, value in plain(row).items():
        if key in ("step", "layers"):
            continue
        nested = {f"{key}/{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        for name, item in nested.items():
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                found[f"{split}/{name}"] = float(item)
    return found


class TensorBoardSink:
    """Scalars of every row as TensorBoard events under `directory`.

    On a resume, `resume_step` hides the events of later steps that the interrupted run left behind.
    """

    def __init__(self, directory: Path | str, active: bool = True, resume_step: int | None = None):
        self._writer = None
        if active:
            import tensorboardX  # costs half a second, which processes that write nothing need not spend

            purge_step = None if resume_step is None else resume_step + 1
            self._writer = tensorboardX.SummaryWriter(logdir=str(directory), purge_step=purge_step)

    def append(self, row: Row) -> None:
        """Writes the row's scalars at its `step`."""
        if self._writer is not None:
            for tag, value in scalars(row).items():
                self._writer.add_scalar(tag, value, global_step=row["step"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Sinks:
    """Several sinks as one; rows go to each in order. A context manager that closes them all."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = tuple(sinks)

    def append(self, row: Row) -> None:
        """Hands the row to every sink."""
        for sink in self.sinks:
            sink.append(row)

    def close(self) -> None:
        """Closes every sink, also when one of them fails; then raises the first failure."""
        failures = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_sinks(
    run_dir: Path | str, active: bool = True, resume_step: int | None = None, tensorboard: bool = True
) -> Sinks:
    """The sinks of a run directory: metrics.jsonl and tensorboard/.

    active: False on every process but the first, which then writes nothing. resume_step: the step of the checkpoint
    that the run goes on from (None starts afresh); rows of later steps are dropped.
    """
    metrics = MetricsFile(Path(run_dir) / METRICS_NAME, active)
    if resume_step is not None:
        metrics.truncate_after(resume_step)
    if not tensorboard:
        return Sinks([metrics])
    return Sinks([metrics, TensorBoardSink(Path(run_dir) / TENSORBOARD_NAME, active, resume_step)])
