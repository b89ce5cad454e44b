"""What the programs may know not to be in a table, without looking it up: bits for many addresses each.

A set bit says that there is none (bpf/absence.h). Of frontends the ledger says so; between
which addresses no flow has a row is found out by looking at all of them.
"""

import array
import struct
import typing

from lbproxy import abi
from lbproxy.core import tables

PAIR_ROWS: typing.Final = abi.constant("NO_FLOWS_ROWS")
_PAIR_SHIFT: typing.Final = abi.constant("NO_FLOWS_SHIFT")
_ADDRESS_ROWS: typing.Final = abi.constant("NO_FRONTENDS_ADDRESSES")
_FRONTEND_ROWS: typing.Final = abi.constant("NO_FRONTENDS_ROWS")
_ADDRESS_SHIFT: typing.Final = abi.constant("NO_FRONTENDS_SHIFT")
_FACTORS: typing.Final = tuple(abi.constant(f"ABSENCE_FACTOR_{number}") for number in range(4))
_BITS: typing.Final = 64  # of a row
_WORD: typing.Final = (1 << _BITS) - 1
MOST: typing.Final = 0xFF  # counted no further: such a bit stays clear until frontends are counted anew
_IS_NONE: typing.Final = b"1".ljust(MOST + 1, b"0")  # of each count the digit of its bit
_ADDRESS: typing.Final = struct.Struct("=4I")
_PAIR: typing.Final = struct.Struct("=4I4I4xxB2x")
_KEY: typing.Final = abi.LAYOUTS["flow_key"]
assert (_PAIR.size, _KEY.offset("src"), _KEY.offset("dst"), _KEY.offset("stage")) == (_KEY.size, 0, 16, 37)
assert PAIR_ROWS * _BITS == 1 << (_BITS - _PAIR_SHIFT)
assert _ADDRESS_ROWS == 1 << (_BITS - _ADDRESS_SHIFT)
assert (_FRONTEND_ROWS - _ADDRESS_ROWS) * _BITS == 1 << 16  # a bit for each port


def address_places(address: bytes) -> tuple[int, int]:
    """The numbers of the two bits for an address of 16 bytes; they are of one row, and may be the same."""
    first, second, third, fourth = _ADDRESS.unpack(address)
    mixed = (first << 32 | second) * _FACTORS[0] & _WORD ^ (third << 32 | fourth) * _FACTORS[1] & _WORD
    hashed = (mixed ^ mixed >> 32) * _FACTORS[1] & _WORD
    row = hashed >> _ADDRESS_SHIFT << 6
    return row | hashed >> _ADDRESS_SHIFT - 6 & 63, row | hashed >> _ADDRESS_SHIFT - 12 & 63


def pair_places(keys: bytes) -> typing.Iterator[int]:
    """The numbers of the bits for the addresses of flow keys, packed in order."""
    # Hashed in place, as address_places does it with one: a look has a hundred thousand of these.
    high_of_src, low_of_src, high_of_dst, low_of_dst = _FACTORS
    for s0, s1, s2, s3, d0, d1, d2, d3, stage in _PAIR.iter_unpack(keys):
        src = (s0 << 32 | s1) * high_of_src & _WORD ^ (s2 << 32 | s3) * low_of_src & _WORD
        dst = (d0 << 32 | d1) * high_of_dst & _WORD ^ (d2 << 32 | d3) * low_of_dst & _WORD
        mixed = src + dst + stage * high_of_src & _WORD
        yield ((mixed ^ mixed >> 32) * low_of_src & _WORD) >> _PAIR_SHIFT


def frontend_places(key: bytes) -> tuple[int, ...]:
    """The numbers of the bits for a frontend: those of its address, or behind all of these its NodePort's."""
    found = tables.frontend_key(key)
    if found.scope & tables.SCOPE_NODE_PORT:
        # As programs read it: a packet has it in network order.
        return (_ADDRESS_ROWS * _BITS + int.from_bytes(found.port, tables.BYTE_ORDER),)
    return address_places(found.addr)


class Pairs:
    """Between which addresses flows have rows, as a look at all of them finds it."""

    def __init__(self, none: bytes = b"") -> None:
        """`none` is what was found before, to be added to."""
        words = array.array("Q", none or b"\xff" * 8 * PAIR_ROWS)
        self._some = array.array("Q", (~word & _WORD for word in words))

    def add(self, keys: bytes) -> None:
        """Take note of flow keys, packed in order."""
        some = self._some
        for place in pair_places(keys):
            some[place >> 6] |= 1 << (place & 63)

    def none(self) -> bytes:
        """A bit for each pair of addresses that has none, as the column `none` of `no_flows` has them."""
        return array.array("Q", (~word & _WORD for word in self._some)).tobytes()


class Frontends:
    """Which bits say that there is no frontend, and the writes that keep them true.

    Until `begin` nothing is said: a table of zeros is what there is then.
    """

    def __init__(self) -> None:
        # Frontends that have the bit. A byte each: of an agent's memory this is a part that shows.
        self._counts = bytearray(_BITS * _FRONTEND_ROWS)
        self._none: array.array[int] | None = None  # as the table will have it after `taken`
        self._taken: set[int] = set()  # rows
        self._freed: set[int] = set()  # bits

    def comes(self, key: bytes) -> None:
        """A frontend will be written that was not there."""
        counts, none = self._counts, self._none
        for place in frontend_places(key):
            if counts[place] < MOST:
                counts[place] += 1
            if none is not None and none[place >> 6] >> (place & 63) & 1:
                none[place >> 6] &= ~(1 << (place & 63))
                self._taken.add(place >> 6)

    def goes(self, key: bytes) -> None:
        """A frontend will be removed."""
        counts = self._counts
        for place in frontend_places(key):
            if counts[place] == MOST:
                continue
            counts[place] -= 1
            if not counts[place]:
                self._freed.add(place)

    def begin(self) -> bytes:
        """Say from now on what is so; all frontends that are there have come.

        Returns what the table is to say first: its column `none`.
        """
        counts = self._counts[::-1].translate(_IS_NONE)  # the lowest bit last, as `int` reads it
        ends = range(len(counts), 0, -_BITS)
        self._none = array.array("Q", (int(counts[end - _BITS : end], 2) for end in ends))
        return self._none.tobytes()

    def taken(self) -> list[tables.Write]:
        """The writes to be made before any frontend's that comes."""
        rows, self._taken = self._taken, set()
        return self._writes(rows)

    def freed(self) -> list[tables.Write]:
        """The writes to be made after those that remove frontends; `taken` was asked before."""
        places, self._freed = self._freed, set()
        if self._none is None:
            return []
        rows = set()
        for place in places:
            if not self._counts[place]:
                self._none[place >> 6] |= 1 << (place & 63)
                rows.add(place >> 6)
        return self._writes(rows)

    def _writes(self, rows: typing.Iterable[int]) -> list[tables.Write]:
        if self._none is None:
            return []
        return [
            tables.Put(
                tables.Table.NO_FRONTENDS,
                tables.row_key(row),
                self._none[row].to_bytes(8, tables.BYTE_ORDER),
            )
            for row in sorted(rows)
        ]
