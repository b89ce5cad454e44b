"""Ids and extents of the kernel's arrays: who may use which row, and when it is free again.

A row that a frontend led to a moment ago may still be under the eyes of a program
on another CPU. Whatever is given back therefore waits in quarantine before it can
be handed out again: the caller says for how long, by telling the time.
"""

import collections
import typing


class Exhausted(Exception):  # noqa: N818 - a state of the pool, not a fault
    """No row is free; `table` says where, `rows` how many it has."""

    def __init__(self, table: str, rows: int) -> None:
        super().__init__(f"the {table} table is full ({rows} rows): raise it with --map-rows {table}=N")
        self.table = table
        self.rows = rows


class IdPool:
    """Row numbers 1 to rows-1; 0 stands for none."""

    def __init__(self, table: str, rows: int) -> None:
        self.table = table
        self.rows = rows
        self._next = 1
        self._free: collections.deque[int] = collections.deque()
        self.used = 0

    @property
    def left(self) -> int:
        """How many ids can still be taken."""
        return self.rows - self._next + len(self._free)

    def take(self) -> int:
        """An id that nobody holds: one never used before, else the longest unused. Raises Exhausted."""
        if self._next < self.rows:
            number = self._next
            self._next += 1
        elif self._free:
            number = self._free.popleft()
        else:
            raise Exhausted(self.table, self.rows)
        self.used += 1
        return number

    def give_back(self, number: int) -> None:
        """Make an id free for the next `take`."""
        self._free.append(number)
        self.used -= 1

    def restore(self, held: typing.Collection[int]) -> None:
        """Start over with exactly these ids held."""
        self._next = max(held, default=0) + 1
        self._free = collections.deque(n for n in range(1, self._next) if n not in held)
        self.used = len(held)


class Extent(typing.NamedTuple):
    """Consecutive blocks of the slots table."""

    start: int
    blocks: int


class ExtentPool:
    """Extents of the slots table, from block 1 on; block 0 stands for none."""

    def __init__(self, table: str, rows: int) -> None:
        self.table = table
        self.rows = rows
        self._next = 1
        self._free: dict[int, list[int]] = {}  # blocks -> starts
        self.used = 0

    def take(self, blocks: int) -> Extent:
        """An extent of so many blocks that nobody holds. Raises Exhausted."""
        start = self._exact(blocks)
        if start is None and self._next + blocks <= self.rows:
            start, self._next = self._next, self._next + blocks
        if start is None:
            start = self._split(blocks)
        if start is None:
            self._join()
            start = self._split(blocks)
        if start is None:
            raise Exhausted(self.table, self.rows)
        self.used += blocks
        return Extent(start, blocks)

    def give_back(self, extent: Extent) -> None:
        """Make an extent free for the next `take`."""
        self._free.setdefault(extent.blocks, []).append(extent.start)
        self.used -= extent.blocks

    def restore(self, held: typing.Collection[Extent]) -> None:
        """Start over with exactly these extents held; they must not overlap."""
        self._free = {}
        end = 1
        for extent in sorted(held):
            if extent.start > end:
                self._free.setdefault(extent.start - end, []).append(end)
            end = max(end, extent.start + extent.blocks)
        self._next = end
        self.used = sum(extent.blocks for extent in held)

    def _exact(self, blocks: int) -> int | None:
        starts = self._free.get(blocks)
        return starts.pop() if starts else None

    def _split(self, blocks: int) -> int | None:
        """The head of the smallest free extent that is large enough; its tail stays free."""
        large = min((size for size, starts in self._free.items() if starts and size >= blocks), default=None)
        if large is None:
            return None
        start = self._free[large].pop()
        if large > blocks:
            self._free.setdefault(large - blocks, []).append(start + blocks)
        return start

    def _join(self) -> None:
        """Join neighbouring free extents, the untouched end of the table included."""
        pieces = sorted((start, size) for size, starts in self._free.items() for start in starts)
        if self._next < self.rows:
            pieces.append((self._next, self.rows - self._next))
            self._next = self.rows
        self._free = {}
        at = 0
        while at < len(pieces):
            start, size = pieces[at]
            at += 1
            while at < len(pieces) and pieces[at][0] == start + size:
                size += pieces[at][1]
                at += 1
            self._free.setdefault(size, []).append(start)


class Taken:
    """What an attempt has taken from the pools, so that it can be given back if it fails."""

    def __init__(self, services: IdPool, backends: IdPool, extents: ExtentPool) -> None:
        self._services, self._backends, self._extents = services, backends, extents
        self._ids: list[tuple[IdPool, int]] = []
        self._runs: list[Extent] = []

    def service(self) -> int:
        """A service id."""
        return self._id(self._services)

    def backend(self) -> int:
        """A backend id."""
        return self._id(self._backends)

    def extent(self, blocks: int) -> Extent:
        """An extent of slots."""
        self._runs.append(self._extents.take(blocks))
        return self._runs[-1]

    def undo(self) -> None:
        """Give everything back: none of it has been written."""
        for pool, number in self._ids:
            pool.give_back(number)
        for extent in self._runs:
            self._extents.give_back(extent)

    def _id(self, pool: IdPool) -> int:
        number = pool.take()
        self._ids.append((pool, number))
        return number
