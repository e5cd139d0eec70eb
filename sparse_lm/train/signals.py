"""Who hears of SIGTERM and Ctrl-C for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C go to `handler` meanwhile; nowhere but in the main thread, as in a notebook's worker."""
    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
