"""What each backend has open, for services that balance by it: as the programs count it, put right.

The programs count what they see begin and end. What they do not see (flows that expire, a
service that was not counted yet, records that an upgrade brings) is found by counting the
records and rows that are there. Both go on while that is done, so what was found is compared
with the least and the most that may have been open meanwhile; only what is outside is wrong.
"""

import collections
import typing

from lbproxy import abi
from lbproxy.core import tables

_LOAD: typing.Final = abi.LAYOUTS["backend_load"]
_RECORD: typing.Final = abi.LAYOUTS["socket_record"]
_COOKIE, _BACKEND, _ADDR, _PORT = (
    slice(one.offset, one.offset + one.size)
    for name in ("cookie", "backend", "backend_addr", "backend_port")
    for one in _RECORD.fields
    if one.name == name
)
_NO_COOKIE: typing.Final = bytes(8)
_MODULO: typing.Final = 1 << 32

Identities = typing.Mapping[int, bytes]  # of counted backends by id: address and port, as in their rows


class Load(typing.NamedTuple):
    """The counts of one backend, each modulo 2^32."""

    opened: int
    closed: int
    correction: int

    @property
    def open(self) -> int:
        """How much is open; fewer than none where the end of what was never counted was seen."""
        found = (self.opened - self.closed + self.correction) % _MODULO
        return found - _MODULO if found >= _MODULO // 2 else found


def load(row: bytes | None, correction: bytes | None) -> Load:
    """Unpack the two rows of a backend; a row that is not there is zero."""
    opened, closed = _LOAD.unpack(row) if row else (0, 0)
    return Load(opened, closed, int.from_bytes(correction or b"", tables.BYTE_ORDER))


def of_sockets(records: typing.Iterable[bytes], counted: Identities) -> typing.Counter[int]:
    """Count the sockets whose records name one of these backends, by its id."""
    found: typing.Counter[int] = collections.Counter()
    for row in records:
        number = int.from_bytes(row[_BACKEND], tables.BYTE_ORDER)
        if number in counted and row[_COOKIE] != _NO_COOKIE:
            found[number] += counted[number] == row[_ADDR] + row[_PORT]
    return found


def corrections(
    before: typing.Mapping[int, Load], after: typing.Mapping[int, Load], found: typing.Mapping[int, int]
) -> dict[int, int]:
    """Return new corrections, by id, for backends whose count is not what was found between two looks."""
    wrong = {}
    for number, late in after.items():
        early = before.get(number)
        if early is None or early.correction != late.correction:
            continue  # somebody has just cleared it
        least = early.open - (late.closed - early.closed) % _MODULO
        most = early.open + (late.opened - early.opened) % _MODULO
        off = min(0, found.get(number, 0) - least) + max(0, found.get(number, 0) - most)
        if off:
            wrong[number] = (late.correction + off) % _MODULO
    return wrong
