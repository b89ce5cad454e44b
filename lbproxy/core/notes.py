"""What the agent knows and the tables do not: which Services are probed, why backends fail, what is rejected.

One JSON document, for the read-side commands. It has a limit: what is beyond that is counted.
"""

import typing
import zlib
from collections.abc import Callable, Iterable, Mapping

import msgspec

from lbproxy.core import addresses, events, model, probing

MOST_BYTES: typing.Final = 1 << 17  # of a document with its head
_HEAD: typing.Final = 8  # its length and CRC-32: a row that is being written is not taken for a document
_LONGEST_REASON: typing.Final = 200


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A port of a Service whose annotation asks for a probe, and the probe in words."""

    namespace: str
    name: str
    port_name: str
    probe: str


class Trouble(msgspec.Struct, frozen=True, array_like=True):
    """A backend that failed its last probe, or was found down; `since_s` is Unix time.

    `in_a_row` of the `needed` results speak against what it counts as now, `up` or not.
    """

    namespace: str
    name: str
    port_name: str
    protocol: int
    ip: str
    port: int
    up: bool
    in_a_row: int
    needed: int
    reason: str
    since_s: int


class Rejected(msgspec.Struct, frozen=True, array_like=True):
    """An object that can not be understood, and why."""

    kind: str
    name: str
    reason: str


class Notes(msgspec.Struct, frozen=True, omit_defaults=True):
    """The document. `probes_off` says why nobody is probed, whatever is asked for; `left_out` is a count."""

    probes_off: str = ""
    asked: tuple[Asked, ...] = ()
    troubles: tuple[Trouble, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    left_out: int = 0


NOTHING: typing.Final = Notes()


def encode(
    probes_off: str,
    asked: Iterable[tuple[model.ServiceName, Mapping[str, str]]],
    troubles: Iterable[probing.Trouble],
    rejected: Iterable[tuple[tuple[events.Kind, events.ObjectName], str]],
    to_unix: Callable[[float], float],
) -> bytes:
    """Write down what fits; `to_unix` turns the clock of `troubles` into Unix time."""
    room = _Room(MOST_BYTES - _HEAD - 1024)
    # In order of their use: few are rejected or fail, and where many do the first tell enough.
    rejections = room.of(Rejected(kind, str(name), _short(why)) for (kind, name), why in rejected)
    ports = room.of(Asked(*name, port, text) for name, ports in asked for port, text in ports.items())
    failing = room.of(_trouble(one, to_unix) for one in troubles)
    body = msgspec.json.encode(Notes(probes_off, ports, failing, rejections, room.left_out))
    return len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


def decode(row: bytes) -> Notes | None:
    """Read a document; None where it is half written, or none."""
    length = int.from_bytes(row[:4], "little")
    body = row[_HEAD : _HEAD + length]
    if len(body) != length or zlib.crc32(body) != int.from_bytes(row[4:_HEAD], "little"):
        return None
    try:
        return msgspec.json.decode(body, type=Notes)
    except msgspec.DecodeError:
        return None


_Entry = typing.TypeVar("_Entry", bound=msgspec.Struct)


class _Room:
    """So many bytes, and how many entries found none."""

    def __init__(self, free: int) -> None:
        self._free = free
        self.left_out = 0

    def of(self, entries: Iterable[_Entry]) -> tuple[_Entry, ...]:
        taken = []
        for entry in entries:
            size = len(msgspec.json.encode(entry)) + 1
            if size > self._free:
                self.left_out += 1
                continue
            self._free -= size
            taken.append(entry)
        return tuple(taken)


def _trouble(one: probing.Trouble, to_unix: Callable[[float], float]) -> Trouble:
    port, place = one.user
    return Trouble(
        port.service.namespace,
        port.service.name,
        port.port_name,
        port.protocol.value,
        addresses.text(place.address),
        place.port,
        one.up,
        one.in_a_row,
        one.needed,
        _short(one.reason),
        round(to_unix(one.since_s)),
    )


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
