"""The monotonic clock as BPF programs read it, which rows and events are stamped with.

In a time namespace a process has another one, by an offset that never changes while it lives
there (time_namespaces(7)): compared with that, every row would be older or younger than it is.
"""

import functools
import pathlib
import time
import typing

_OFFSETS: typing.Final = pathlib.Path("/proc/self/timens_offsets")
_CLOCK_MONOTONIC_COARSE: typing.Final = 6


def monotonic_s() -> float:
    """Seconds."""
    return time.monotonic() - offset_ns() / 1e9


def monotonic_ns() -> int:
    """Nanoseconds."""
    return time.monotonic_ns() - offset_ns()


def coarse_ns() -> int:
    """As of the last tick of the timer: what flows are stamped with."""
    return time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE) - offset_ns()


@functools.cache
def offset_ns() -> int:
    """How far this process's monotonic clock is ahead of the kernel's; 0 but in a time namespace."""
    try:
        return parse(_OFFSETS.read_text(encoding="ascii"))
    except OSError:
        return 0  # a kernel without time namespaces


def parse(text: str) -> int:
    """The monotonic clock's offset, in ns, as a text of timens_offsets has it: seconds and nanoseconds."""
    for line in text.splitlines():
        name, *numbers = line.split()
        # By number on kernels before 5.7.
        if name in ("monotonic", "1"):
            seconds, nanoseconds = map(int, numbers)
            return seconds * 1_000_000_000 + nanoseconds
    return 0
