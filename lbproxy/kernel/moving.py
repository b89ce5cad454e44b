"""Moves flows to a larger table, while packets of theirs go by and others begin: none of them is lost.

Copying would not do. Links are given their programs one after another, so for some milliseconds programs
of both generations run: each has to know the flows that the other begins. So the next generation but one
is wanted, and goes by way of programs that know both tables (`flows_are_moving` in bpf/flow.h):

1. Links are switched to these. Whoever has begun where, rows are found and written in the table before
   (LB_MOVING_BEFORE), the only one that earlier programs know.
2. When none of these runs any more, rows begin in the new table (LB_MOVING_HERE), and what is not there is
   looked for in the one before.
3. When nobody begins rows there any more, its rows are moved, some at a time. What is done to one just then
   is done to it once more: after a grace period nobody uses a row that was found before its copy was there.
4. Links are switched to programs that know the new table alone, which by then has everything.

The programs in between are the same code (LB_MOVING): of those in use the verifier cuts that off. Whoever
is killed on the way leaves what serves; the next start ends it, as any other upgrade.
"""

import typing

from lbproxy import abi
from lbproxy.core import tables
from lbproxy.kernel import grace, libbpf, map_rows

_ROW: typing.Final = tables.row_key(abi.constant("HANDOVER_MOVING"))
_BEFORE: typing.Final = abi.constant("MOVING_BEFORE")
_HERE: typing.Final = abi.constant("MOVING_HERE")
_ROWS: typing.Final = 1 << 16  # so many between two grace periods; 76 bytes each
_STATE: typing.Final = abi.LAYOUTS["flow"].offset("state")


class Moving:
    """The way of flows from one table to another of the same layout."""

    def __init__(self, before_fd: int, flows_fd: int, handover_fd: int) -> None:
        """`handover_fd` is the table by which the programs that know both are told where flows begin."""
        self._before_fd = before_fd
        self._flows_fd = flows_fd
        self._handover_fd = handover_fd

    def begin(self) -> None:
        """Before the first link is switched to programs that know both tables."""
        self._tell(_BEFORE)

    def end(self) -> None:
        """When all are: move what there is. Whoever finds it half done does it again. Raises OSError."""
        grace.wait_for_programs()
        self._tell(_HERE)
        grace.wait_for_programs()
        info = libbpf.map_info(self._before_fd)
        at: bytes | None = None
        while True:
            found = map_rows.batch(self._before_fd, info, _ROWS, at)
            ours = map_rows.insert_all(self._flows_fd, found.keys, found.values, info.key_size)
            grace.wait_for_programs()
            again = map_rows.batch(self._before_fd, info, _ROWS, at)
            if (again.keys, again.values) != (found.keys, found.values):
                self._follow(_rows(found, info, ours), dict(_rows(again, info)))
            if found.position is None:
                return
            at = found.position

    def _tell(self, where: int) -> None:
        map_rows.update(self._handover_fd, _ROW, where.to_bytes(8, tables.BYTE_ORDER))

    def _follow(
        self, copied: typing.Iterable[tuple[bytes, bytes]], now: typing.Mapping[bytes, bytes]
    ) -> None:
        """Do to copies what programs did to their originals, where these had been found first."""
        for key, row in copied:
            original = now.get(key)
            if original == row:
                continue
            copy = map_rows.lookup(self._flows_fd, key, len(row))
            if copy is None:
                continue
            if original is None:
                # Forgotten before there was a copy to be forgotten with it.
                if copy == row:
                    map_rows.delete(self._flows_fd, key)
            elif merged := _merged(row, original, copy):
                map_rows.update(self._flows_fd, key, merged)


def _rows(
    found: map_rows.Batch, info: libbpf.MapInfo, those: typing.Iterable[int] | None = None
) -> typing.Iterator[tuple[bytes, bytes]]:
    """Those rows of a batch, or all."""
    count = len(found.keys) // info.key_size
    for at in range(count) if those is None else those:
        yield (
            found.keys[at * info.key_size : (at + 1) * info.key_size],
            found.values[at * info.value_size : (at + 1) * info.value_size],
        )


def _merged(copied: bytes, original: bytes, copy: bytes) -> bytes | None:
    """What a row is to be that was copied, and then changed where it was, and maybe where it is now.

    None where it is right already, or another flow's: that has less of a state than was copied.
    """
    if copy == copied:
        return original
    missing = original[_STATE] & ~copy[_STATE]
    if not missing or copied[_STATE] & ~copy[_STATE]:
        return None
    return copy[:_STATE] + bytes([copy[_STATE] | missing]) + copy[_STATE + 1 :]
