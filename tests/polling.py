"""Wait for a state instead of for a while."""

import asyncio
import collections.abc
import time
import typing

T = typing.TypeVar("T")
PAUSE_S = 0.01
# Only a test that fails waits this long. Many labs at once make a change slow, and that is no failure.
TIMEOUT_S = 60.0


def eventually(
    check: collections.abc.Callable[[], T], timeout_s: float = TIMEOUT_S, what: str = "the expected state"
) -> T:
    """Call `check` until it returns something true, and return that; AssertionError if it never does."""
    deadline = time.monotonic() + timeout_s
    while not (result := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"no sign of {what} in {timeout_s} s: {result!r}")
        time.sleep(PAUSE_S)
    return result


async def eventually_async(
    check: collections.abc.Callable[[], T], timeout_s: float = TIMEOUT_S, what: str = "the expected state"
) -> T:
    """Do as `eventually` does, while other tasks run."""
    deadline = time.monotonic() + timeout_s
    while not (result := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"no sign of {what} in {timeout_s} s: {result!r}")
        await asyncio.sleep(PAUSE_S)
    return result
