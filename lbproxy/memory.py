"""How little memory the agent keeps: of what lists needed, and of what is freed."""

import ctypes
import gc
import typing

_GC_ALLOCATIONS: typing.Final = 100_000
_M_MMAP_THRESHOLD: typing.Final = -3  # of malloc.h
_M_ARENA_MAX: typing.Final = -8
_MMAP_THRESHOLD: typing.Final = 128 * 1024  # what it is at first


def spare() -> None:
    """Before anything else: have glibc keep little of what is freed, and the collector look seldom.

    The bodies of lists are large, and soon gone. By itself glibc keeps more the larger they were, and a
    heap for each thread. Nothing that an event leaves behind is cyclic: to look seldom is often enough.
    """
    gc.set_threshold(_GC_ALLOCATIONS)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def settle() -> None:
    """Give back what only the first lists needed, and spare the collector what stays."""
    gc.collect()
    gc.freeze()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
