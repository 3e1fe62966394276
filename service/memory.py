"""How the C library keeps memory: large tensors come and go with every call."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Bytes. glibc takes no larger threshold. Above it each tensor is mapped and unmapped, which costs a page fault for
# every 4 KiB: a tensor of 600 KB then takes three times as long to arrive.
_MMAP_THRESHOLD = 32 << 20
# Bytes that may lie free at the end of the heap before they are given back: a few of the largest requests.
_TRIM_THRESHOLD = 256 << 20


def keep_freed_tensors() -> None:
    """Have malloc keep what a request frees for the next one; where the C library is not glibc, do nothing."""
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def give_back() -> None:
    """Have the C library give freed memory back to the system; where it is not glibc, do nothing."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
