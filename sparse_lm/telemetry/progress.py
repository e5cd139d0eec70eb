"""Progress of a run for a person: one line that updates itself on a terminal, plain lines in a log file."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import TextIO

from sparse_lm.telemetry.format import compact, duration, percent

_REDRAW_SECONDS = 0.1
_LOG_SECONDS = 5.0
_LOG_RUN_SHARE = 0.05
_LOG_TIME_SHARE = 0.02
_CLEAR_LINE = "\r\x1b[2K"


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a run stands after `step`. What is None is not shown.

    loss: nats per token. eta_seconds: time left. dropped_fraction: share of routed assignments. max_violation: by how
    much the busiest expert exceeds the mean load, as a share of the mean.
    """

    step: int
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    dropped_fraction: float | None = None
    max_violation: float | None = None


class Progress:
    """Shows `Status` after `Status` on `stream`. A context manager; close it so that the last line ends.

    live: redraw one line (None: when the stream is a terminal). Otherwise a log line is written for the first and the
    last step, and in between when 5 % of the steps are done since the last line, or 5 seconds have passed (in long
    runs 2 % of the time so far, so that a day of training makes hundreds of lines and not thousands).
    active: False shows nothing, for every process but the first.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO,
        live: bool | None = None,
        *,
        active: bool = True,
        width: Callable[[], int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        """`width` (columns of the terminal) and `now` (seconds) are there for tests."""
        self._total, self._stream, self._active, self._now = total_steps, stream, active, now
        self._live = bool(getattr(stream, "isatty", lambda: False)()) if live is None else live
        self._width = width or (lambda: _terminal_width(stream))
        self._start = now()
        self._shown: tuple[float, int] | None = None  # time and step of what was last written
        self._line = ""
        self._pending: Status | None = None

    def update(self, status: Status) -> None:
        """Shows the status if it is time to."""
        self._pending = status
        if self._active and self._due(status.step):
            self._show(status)

    def message(self, text: str) -> None:
        """Prints `text` on lines of its own: above the live line, or into the log."""
        if not self._active:
            return
        self._stream.write(f"{_CLEAR_LINE if self._line else ''}{text}\n{self._line}")
        self._stream.flush()

    def close(self) -> None:
        """Shows the newest status if it is not on screen yet, and ends the live line. Closing twice is harmless."""
        if self._active and self._pending is not None and self._shown and self._shown[1] != self._pending.step:
            self._show(self._pending)
        if self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line, self._pending = "", None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _due(self, step: int) -> bool:
        if self._shown is None or step >= self._total:
            return True
        since = self._now() - self._shown[0]
        if self._live:
            return since >= _REDRAW_SECONDS
        patience = max(_LOG_SECONDS, _LOG_TIME_SHARE * (self._now() - self._start))
        return since >= patience or step - self._shown[1] >= _LOG_RUN_SHARE * self._total

    def _show(self, status: Status) -> None:
        self._shown = (self._now(), status.step)
        if self._live:
            # A line as wide as the terminal would wrap on some of them, and \r could not take it back.
            self._line = fit(describe(status, self._total), self._width() - 1)
            self._stream.write(_CLEAR_LINE + self._line)
        else:
            self._stream.write("  ".join(describe(status, self._total)) + "\n")
        self._stream.flush()


def describe(status: Status, total_steps: int) -> list[str]:
    """The parts of a progress line, the most important first."""
    share = percent(min(1.0, status.step / total_steps) if total_steps else 1.0, digits=3)
    parts = [f"step {status.step}/{total_steps} {share}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_second is not None:
        parts.append(f"{compact(status.tokens_per_second)} tok/s")
    if status.eta_seconds is not None:
        parts.append(f"ETA {duration(status.eta_seconds)}")
    if status.dropped_fraction is not None:
        parts.append(f"dropped {percent(status.dropped_fraction)}")
    if status.max_violation is not None:
        parts.append(f"imbalance {status.max_violation:.2f}")
    return parts


def fit(parts: list[str], width: int) -> str:
    """As many whole parts from the left as `width` columns hold; the first is cut if it alone is too long."""
    line = parts[0][: max(0, width)]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += "  " + part
    return line


def _terminal_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # not a terminal after all, or a stream without a descriptor
        return 80
