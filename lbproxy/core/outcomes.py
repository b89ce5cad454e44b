"""What became of TCP connections to a backend: of this node's sockets, and of clients elsewhere.

Whoever is elsewhere may be kept from a backend by a firewall or a policy that nobody here knows of, or never
have meant to connect: so the two are counted apart.
"""

import typing

from lbproxy import abi
from lbproxy.core import tables

if typing.TYPE_CHECKING:
    from lbproxy.core import inventory

ELSEWHERE: typing.Final = abi.constant("HEALTH_ELSEWHERE")
"""In the key of a row: it is of clients elsewhere."""

_LAYOUT: typing.Final = abi.LAYOUTS["backend_health"]
_WRAP: typing.Final = 1 << 32
_US: typing.Final = 1e-6


class Outcomes(typing.NamedTuple):
    """Counts since the backend is known, and the round-trip time of late.

    `handshake_us` is the sum of what the `established` ones took from SYN to SYN-ACK.
    """

    handshake_us: int = 0
    established: int = 0
    refused: int = 0
    unanswered: int = 0  # no answer to the SYN for a second, or no way there
    resets: int = 0  # open ones that the backend has reset
    lost: int = 0  # open ones that nobody acknowledged any more
    srtt_us: int = 0  # 0 where nothing was measured

    @property
    def failed(self) -> int:
        """All that went wrong."""
        return self.refused + self.unanswered + self.resets + self.lost

    @property
    def attempts(self) -> int:
        """Connections that were tried and whose handshake has ended, or should have."""
        return self.established + self.refused + self.unanswered

    @property
    def handshake_s(self) -> float:
        """What a handshake took on average, in seconds; 0 where there was none."""
        return self.handshake_us / self.established * _US if self.established else 0.0

    def is_before(self, later: "Outcomes") -> bool:
        """Whether some count is below what it was: no count gains half of what wraps between two looks."""
        counts = zip(self[1:6], later[1:6], strict=True)
        return any((now - then) % _WRAP >= _WRAP // 2 for now, then in counts)

    def since(self, earlier: "Outcomes") -> "Outcomes":
        """What has been counted since; counts in the kernel wrap."""
        counts = [(now - then) % _WRAP for now, then in zip(self[1:6], earlier[1:6], strict=True)]
        return Outcomes._make((self.handshake_us - earlier.handshake_us, *counts, self.srtt_us))


class Fared(typing.NamedTuple):
    """Those of this node's sockets, its pods' among them, and those whose packets came in."""

    node: Outcomes = Outcomes()
    elsewhere: Outcomes = Outcomes()

    @property
    def everyone(self) -> Outcomes:
        """All together; the round-trip time is that of this node where there is one."""
        counts = [
            (here + there) % _WRAP for here, there in zip(self.node[1:6], self.elsewhere[1:6], strict=True)
        ]
        handshake_us = self.node.handshake_us + self.elsewhere.handshake_us
        return Outcomes._make((handshake_us, *counts, self.node.srtt_us or self.elsewhere.srtt_us))


REASONS: typing.Final = ("refused", "unanswered", "resets", "lost")
"""The fields of `Outcomes` that count failures."""


def unpack(row: bytes | memoryview) -> Outcomes:
    """A row of backend_health."""
    return Outcomes(*_LAYOUT.unpack(row))


def of_node(rows: "inventory.Rows", number: int) -> Outcomes:
    """Those of this node's sockets with a backend, by id; all 0 where none has connected to it."""
    return _row(rows, number)


def of_backend(rows: "inventory.Rows", number: int) -> Fared:
    """All there are of a backend, by id."""
    return Fared(_row(rows, number), _row(rows, number | ELSEWHERE))


def every(rows: "inventory.Rows") -> dict[int, Fared]:
    """Those of all backends, by id."""
    found: dict[int, Fared] = {}
    for key, row in rows.rows(tables.Table.BACKEND_HEALTH):
        number = int.from_bytes(key, tables.BYTE_ORDER)
        here = number & ~ELSEWHERE
        known = found.get(here, NOTHING_YET)
        new = unpack(row)
        found[here] = known._replace(elsewhere=new) if number & ELSEWHERE else known._replace(node=new)
    return found


def keys(number: int) -> tuple[bytes, bytes]:
    """The rows that a backend may have."""
    return tables.row_key(number), tables.row_key(number | ELSEWHERE)


def _row(rows: "inventory.Rows", number: int) -> Outcomes:
    row = rows.row(tables.Table.BACKEND_HEALTH, tables.row_key(number))
    return unpack(row) if row is not None else Outcomes()


NOTHING_YET: typing.Final = Fared()

if Outcomes._fields != _LAYOUT.names:
    raise TypeError(f"Outcomes has fields {Outcomes._fields}, bpf/abi.h says {_LAYOUT.names}")
