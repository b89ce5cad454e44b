"""Sockets that are connected to a backend which no longer serves, while others do (CT-2, CT-3).

An unconnected UDP socket moves on with its next datagram; a connected one would
talk to nobody for ever. What TCP and SCTP have is theirs to end: never is a
connection of theirs cut because an endpoint left (CT-6, EP-11).
"""

import collections
import typing

from lbproxy import abi
from lbproxy.core import inventory, tables

_RECORD: typing.Final = abi.LAYOUTS["socket_record"]
_SPILL_KEY: typing.Final = abi.LAYOUTS["socket_spill_key"]
_SPILL_PEER: typing.Final = abi.constant("SPILL_PEER")
_KIND_AT: typing.Final = _SPILL_KEY.offset("kind")
_COOKIE: typing.Final = slice(0, 8)
_NO_COOKIE: typing.Final = bytes(8)
# Sockets with the same translation stand or fall together: from the frontend to the backend's id.
_TRANSLATION: typing.Final = slice(_RECORD.offset("frontend_addr"), _RECORD.offset("spilled"))

_BACKEND: typing.Final = abi.LAYOUTS["backend"]
_SERVICE: typing.Final = slice(_BACKEND.offset("service"), _BACKEND.offset("service") + 4)
_STATE_AT: typing.Final = _BACKEND.offset("state")
_PROTO_AT: typing.Final = _BACKEND.offset("proto")
_IDENTITY: typing.Final = slice(0, _PROTO_AT)  # address and port
_UDP: typing.Final = 17
# What counts is the serving condition alone: neither policy nor readiness nor termination.
_SERVING: typing.Final = frozenset(
    map(int, (tables.BackendState.ACTIVE, tables.BackendState.TERMINATING, tables.BackendState.SERVING))
)


class Stale(typing.NamedTuple):
    """A socket by its cookie, and where it is connected to, unless it has moved on meanwhile."""

    cookie: int
    translation: bytes  # equal for sockets that were led from one frontend to one backend

    @property
    def address(self) -> bytes:
        """The backend's address, 16 bytes."""
        return self.translation[16:32]

    @property
    def port(self) -> bytes:
        """The backend's port in network order."""
        return self.translation[34:36]


def concerns_udp(writes: typing.Iterable[tables.Write]) -> bool:
    """Whether any of these writes changes the backends of a UDP port: only then may sockets be stale anew."""
    return any(
        isinstance(write, tables.Put)
        and write.table == tables.Table.BACKENDS
        and write.value[_PROTO_AT] == _UDP
        for write in writes
    )


def stale(rows: inventory.Rows) -> list[Stale]:
    """The sockets to be closed. Among them are some that are not UDP or not connected: let those be."""
    cookies = _sockets(rows)
    doubtful: dict[bytes, bytes] = {}  # translation to service
    for translation in cookies:
        service = _service(rows, translation)
        if service is not None and not _still_served(rows, translation, service):
            doubtful[translation] = service
    if not doubtful:
        return []
    serving = _serving(rows, frozenset(doubtful.values()))
    return [
        Stale(int.from_bytes(cookie, tables.BYTE_ORDER), translation)
        for translation, service in doubtful.items()
        # Where none serves, there is nowhere to go.
        if serving[service] and _identity(translation) not in serving[service]
        for cookie in cookies[translation]
    ]


def _sockets(rows: inventory.Rows) -> dict[bytes, list[bytes]]:
    """The cookies of the sockets that were translated, by translation.

    What an unconnected socket has in the spill map is left out.
    """
    found: dict[bytes, list[bytes]] = collections.defaultdict(list)
    for _, row in rows.rows("sockets"):
        if row[_COOKIE] != _NO_COOKIE:
            found[row[_TRANSLATION]].append(row[_COOKIE])
    for key, row in rows.rows("socket_spill"):
        if key[_KIND_AT] == _SPILL_PEER:
            found[row[_TRANSLATION]].append(row[_COOKIE])
    return found


def _service(rows: inventory.Rows, translation: bytes) -> bytes | None:
    """The UDP service port behind the frontend that was dialled; None where it is gone, or was never one."""
    address, port = translation[:16], translation[32:34]
    found = inventory.frontend_at(rows, address, port, _UDP, lambda _address: True)
    return None if found is None else tables.row_key(found.service)


def _still_served(rows: inventory.Rows, translation: bytes, service: bytes) -> bool:
    row = rows.row(tables.Table.BACKENDS, translation[36:40])
    if row is None or row[_SERVICE] != service or row[_STATE_AT] not in _SERVING:
        return False
    return row[_IDENTITY] == _identity(translation)


def _identity(translation: bytes) -> bytes:
    return translation[16:32] + translation[34:36]


def _serving(rows: inventory.Rows, services: frozenset[bytes]) -> dict[bytes, set[bytes]]:
    found: dict[bytes, set[bytes]] = {service: set() for service in services}
    for _, row in rows.rows(tables.Table.BACKENDS):
        if row[_SERVICE] in found and row[_STATE_AT] in _SERVING:
            found[row[_SERVICE]].add(row[_IDENTITY])
    return found
