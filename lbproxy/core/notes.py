"""What the agent knows and the tables do not: what is probed, why backends fail, what is not as it should be.

One JSON document, for the read-side commands. It has a limit: what is beyond that is counted. What
goes wrong comes first, and no kind of entry leaves the others without room.
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


class Mistake(msgspec.Struct, frozen=True, array_like=True):
    """A Service whose annotations about probes are not understood, and why."""

    namespace: str
    name: str
    reason: str


class OfBackend(msgspec.Struct, frozen=True, array_like=True):
    """Which backend something is said of."""

    namespace: str
    name: str
    port_name: str
    protocol: int
    ip: str
    port: int

    @property
    def who(self) -> tuple[str, str, str, int, str, int]:
        """What it is found by."""
        return self.namespace, self.name, self.port_name, self.protocol, self.ip, self.port


class Spared(OfBackend, frozen=True, array_like=True):
    """A backend that this node uses and never probes, whatever is asked for, and why."""

    reason: str


class Trouble(OfBackend, frozen=True, array_like=True):
    """A backend that failed its last probe, or was found down; `since_s` is Unix time.

    `in_a_row` of the `needed` results speak against what it counts as now, `up` or not.
    """

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
    """The document. `probes_off` says why nobody is probed, whatever is asked for; `left_out` is a count.

    `unserved` is why not all is served that is to be, a line each.
    """

    probes_off: str = ""
    asked: tuple[Asked, ...] = ()
    troubles: tuple[Trouble, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    left_out: int = 0
    mistakes: tuple[Mistake, ...] = ()
    spared: tuple[Spared, ...] = ()
    unserved: tuple[str, ...] = ()


NOTHING: typing.Final = Notes()


class Known(typing.NamedTuple):
    """What is to be written down; of each kind in an order in which the first tell enough."""

    probes_off: str = ""
    rejected: Iterable[tuple[tuple[events.Kind, events.ObjectName], str]] = ()
    troubles: Iterable[probing.Trouble] = ()
    mistakes: Iterable[tuple[model.ServiceName, str]] = ()
    spared: Iterable[tuple[probing.User, str]] = ()
    asked: Iterable[tuple[model.ServiceName, Mapping[str, str]]] = ()
    unserved: Iterable[str] = ()


def encode(known: Known, to_unix: Callable[[float], float]) -> bytes:
    """Write down what fits; `to_unix` turns the clock of `troubles` into Unix time."""
    room = _Room(MOST_BYTES - _HEAD - 1024)
    unserved = room.of(known.unserved, _short, 1 / 4)
    rejected = room.of(known.rejected, lambda one: Rejected(one[0][0], str(one[0][1]), _short(one[1])), 1 / 4)
    troubles = room.of(known.troubles, lambda one: _trouble(one, to_unix), 2 / 3)
    mistakes = room.of(known.mistakes, lambda one: Mistake(*one[0], _short(one[1])), 1 / 2)
    spared = room.of(known.spared, lambda one: Spared(*_place(one[0]), one[1]), 1 / 2)
    ports = ((name, port, text) for name, of_ports in known.asked for port, text in of_ports.items())
    asked = room.of(ports, lambda one: Asked(*one[0], one[1], one[2]))
    document = Notes(known.probes_off, asked, troubles, rejected, room.left_out, mistakes, spared, unserved)
    body = msgspec.json.encode(document)
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


_Known = typing.TypeVar("_Known")
_Entry = typing.TypeVar("_Entry", bound=msgspec.Struct | str)


class _Room:
    """So many bytes, and how many entries found none."""

    def __init__(self, free: int) -> None:
        self._free = free
        self.left_out = 0

    def of(
        self, known: Iterable[_Known], entry: Callable[[_Known], _Entry], share: float = 1.0
    ) -> tuple[_Entry, ...]:
        """Take entries until one does not fit into a share of what is free; the rest only count."""
        free = int(self._free * share)
        taken: list[_Entry] = []
        left = iter(known)
        for one in left:
            made = entry(one)
            size = len(msgspec.json.encode(made)) + 1
            if size > free:
                self.left_out += 1 + sum(1 for _ in left)
                break
            free -= size
            self._free -= size
            taken.append(made)
        return tuple(taken)


def _trouble(one: probing.Trouble, to_unix: Callable[[float], float]) -> Trouble:
    since_s = round(to_unix(one.since_s))
    return Trouble(*_place(one.user), one.up, one.in_a_row, one.needed, _short(one.reason), since_s)


def _place(user: probing.User) -> tuple[str, str, str, int, str, int]:
    port, place = user
    ip = addresses.text(place.address)
    return (*port.service, port.port_name, port.protocol.value, ip, place.port)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
