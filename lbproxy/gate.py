"""Lets many write to the kernel's tables at once, or one alone who puts others in their place."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Gate:
    """Whoever wants to be alone waits for those inside; those who come after wait for whoever that is."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._inside = 0
        self._alone = False  # somebody is, or waits to be

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Write, while others may. Not to be entered twice by one task: it may wait for itself."""
        await self._until(lambda: not self._alone)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._changed.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Until the end of this nobody writes."""
        await self._until(lambda: not self._alone)
        self._alone = True
        try:
            await self._until(lambda: not self._inside)
            yield
        finally:
            self._alone = False
            self._changed.set()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            # Whoever waits already is woken by the next `set` all the same.
            self._changed.clear()
            await self._changed.wait()
