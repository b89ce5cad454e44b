"""In a time namespace rows are as old as they are outside of it."""

import collections.abc
import json
import pathlib
import subprocess
import sys
import time
import typing

import pytest

from lbproxy import flow_table, kernel_clock

AHEAD_S = 1_000_000
ASK = """
import json, time
from lbproxy import flow_table, kernel_clock
now = [kernel_clock.monotonic_s(), kernel_clock.monotonic_ns(), kernel_clock.coarse_ns(), flow_table.tick()]
print(json.dumps([time.monotonic(), now]))
"""
CLOCKS: tuple[collections.abc.Callable[[], float], ...] = (
    time.monotonic,
    time.monotonic_ns,
    lambda: time.clock_gettime_ns(6),
    flow_table.tick,
)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/timens_offsets").exists(), reason="a kernel without time namespaces"
)
def test_the_kernels_clock_is_found_in_a_time_namespace() -> None:
    assert kernel_clock.offset_ns() == 0
    elsewhere = ["unshare", "--fork", "--time", "--monotonic", str(AHEAD_S)]
    before = [clock() for clock in CLOCKS]
    told = subprocess.run(
        [*elsewhere, sys.executable, "-c", ASK], check=True, capture_output=True, text=True
    ).stdout
    after = [clock() for clock in CLOCKS]
    own_s, found = typing.cast("tuple[float, list[float]]", json.loads(told))
    assert own_s > before[0] + AHEAD_S
    assert all(low <= value <= high for low, value, high in zip(before, found, after, strict=True))


@pytest.mark.parametrize(
    ("text", "offset_ns"),
    [
        ("monotonic           0         0\nboottime            0         0\n", 0),
        ("monotonic          -2         500000000\nboottime            7         0\n", -1_500_000_000),
        ("1 3 4\n7 0 0\n", 3_000_000_004),
        ("boottime            7         0\n", 0),
    ],
)
def test_offsets_are_seconds_and_nanoseconds(text: str, offset_ns: int) -> None:
    assert kernel_clock.parse(text) == offset_ns
