"""Freed memory that stays with the process: a training step on CPU asks for the same arrays again, step after step.

The GNU C library gives large arrays back to the system when they are freed, and the system clears every page anew when
it hands them out. Here that is a fifth of the processor time of a step, and nearly half of the time of a layer with 64
experts (LOG.md, 2026-11-29).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

# Of mallopt(3), by name; 2^31 - 1 bytes would not do as a threshold, and -1 is none at all.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))


def keep_freed(environment: Mapping[str, str], library: Any = None) -> bool:
    """Asks the C library to keep what is freed; whether it does.

    Call it before there are threads: those that have allocated before go on in arenas of their own, which are given
    back. Does nothing where the environment configures the allocator (MALLOC_ARENA_MAX, GLIBC_TUNABLES and their
    like), nor without the GNU C library. library: the loaded C library, None for the process's own.
    """
    set_by_user = any(name.startswith("MALLOC_") for name in environment)
    if set_by_user or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None) if library is None else library
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, value) == 1 for name, value in _SETTINGS)
