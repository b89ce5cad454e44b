"""Flows through a service: one that the programs opened themselves, and copies of its rows for many more.

Nothing here knows how many rows a flow has or what is in them: the programs write
those of the first flow, and whatever in them is an address and port of one of its
ends becomes the copy's.
"""

import collections.abc
import dataclasses
import struct
import typing

from benchmarks import bed, frames, test_runs
from lbproxy import abi
from lbproxy.core import tables

FIRST_PORT = 1024
_BACKEND_PORT = 8080
TICK_SHIFT = abi.constant("TICK_SHIFT")
_KEY, _ROW = abi.LAYOUTS["flow_key"], abi.LAYOUTS["flow"]
KEY_SIZE = _KEY.size


class Columns(typing.NamedTuple):
    """An end of each copy, each column packed: the address' last word, and the port."""

    words: bytes
    ports: bytes


def columns(words: collections.abc.Sequence[int], ports: collections.abc.Sequence[int]) -> Columns:
    """Pack the ends of so many copies."""
    return Columns(struct.pack(f"!{len(words)}I", *words), struct.pack(f"!{len(ports)}H", *ports))


@dataclasses.dataclass(frozen=True, slots=True)
class Talk:
    """A client's flow to a service, and those like it: flow number i has this client's i-th port, and so on.

    `masquerade` is whom the backend sees, None where that is the client itself.
    """

    service: bed.Service
    proto: int
    client: bytes
    frontend: bytes
    backend: bytes
    masquerade: bytes | None

    def asked(self, number: int) -> frames.Ends:
        """Return the client's packet as it comes in."""
        return frames.Ends(*self._client(number), self.frontend, self.service.node_port)

    def inside(self, number: int) -> frames.Ends:
        """Return it as the kernel routes it."""
        return frames.Ends(*self._client(number), self._backend(number), _BACKEND_PORT)

    def beyond(self, number: int) -> frames.Ends:
        """Return it as it leaves, masqueraded."""
        assert self.masquerade is not None
        port = bed.PORTS.first + number % test_runs.PORTS
        return frames.Ends(self.masquerade, port, self._backend(number), _BACKEND_PORT)

    def _client(self, number: int) -> tuple[bytes, int]:
        return bed.later(self.client, number // test_runs.PORTS), FIRST_PORT + number % test_runs.PORTS

    def _backend(self, number: int) -> bytes:
        # A backend has fewer ports to give than 64k flows need.
        return self.backend if self.masquerade is None else bed.later(self.backend, number // test_runs.PORTS)


Rows = dict[tables.FlowKey, tables.Flow]


def hold(at: bed.Bed, service: bed.Service, family: int, proto: int) -> tuple[Talk, Rows]:
    """Have the programs open a flow to the service's first backend and see it answered; returns its rows too.

    `beyond` of that very flow is in the rows: the port there is the programs' choice.
    """
    side = bed.SIDES[family]
    asked = frames.Ends(side.client, FIRST_PORT, side.node, service.node_port)
    first = side.remote if service.remote else side.pod
    for _ in range(200):
        at.forget_flows()
        inside = _through(at, "tc_from_outside", asked, proto, frames.SYN)
        if inside.dst == first:
            break
    else:
        raise RuntimeError(f"no flow to {service.name} went to its first backend: {inside}")
    beyond = _through(at, "tc_to_any", inside, proto, frames.SYN)
    answer = _through(at, "tc_from_outside", beyond.turned(), proto, frames.SYN_ACK)
    answered = _through(at, "tc_to_any", answer, proto, frames.SYN_ACK)
    if answered != asked.turned():
        raise RuntimeError(f"the answer of {service.name} looks like {answered}")
    _through(at, "tc_to_any", _through(at, "tc_from_outside", asked, proto, frames.ACK), proto, frames.ACK)
    masquerade = beyond.src if beyond != inside else None
    return Talk(service, proto, side.client, side.node, first, masquerade), at.flows()


def _through(at: bed.Bed, program: str, ends: frames.Ends, proto: int, flags: int) -> frames.Ends:
    outcome = at.once(program, "up0", at.frame("up0", ends, proto, flags))
    if outcome.verdict != test_runs.NEXT:
        raise RuntimeError(f"{program} returned {outcome.verdict} for {ends}")
    return frames.read(outcome.frame)


class Copies(typing.NamedTuple):
    """Rows of as many flows as one row was copied for."""

    keys: bytes
    rows: bytearray


def copies(
    rows: Rows, first: frames.Ends, beyond: tuple[bytes, int] | None, at: bed.Bed, talk: Talk, flows: int
) -> list[Copies]:
    """Copy the rows of a flow for the numbers 0 to `flows` - 1 of its talk.

    `first` is its packet as the kernel routes it, `beyond` the source that the backend sees.
    """
    numbers = range(flows)
    ends = [talk.inside(number) for number in numbers]
    of_client = columns([word(end.src) for end in ends], [end.sport for end in ends])
    of_backend = columns([word(end.dst) for end in ends], [end.dport for end in ends])
    becomes = {(first.src, first.sport): of_client, (first.dst, first.dport): of_backend}
    if beyond is not None:
        seen = [talk.beyond(number) for number in numbers]
        becomes[beyond] = columns([word(end.src) for end in seen], [end.sport for end in seen])
    made = []
    for key, row in rows.items():
        ids = b""
        if row.backend:
            service = int.from_bytes(row.service, "little")
            ids = b"".join(
                at.backends[end.dst, end.dport, key.proto, service].to_bytes(4, "little") for end in ends
            )
        made.append(copy(key, row, becomes, flows, ids))
    return made


def copy(
    key: tables.FlowKey,
    row: tables.Flow,
    becomes: collections.abc.Mapping[tuple[bytes, int], Columns],
    count: int,
    backends: bytes = b"",
) -> Copies:
    """Copy one row so many times, with these ends exchanged; `backends` are packed ids, none to keep them."""
    packed = []
    for layout, one, packet in ((_KEY, key, key), (_ROW, row, key.becomes(row))):
        text = bytearray(one.pack() * count)
        for address, port in (("src", "sport"), ("dst", "dport")):
            end = getattr(packet, address), int.from_bytes(getattr(packet, port), "big")
            if end in becomes:
                _fill(text, layout.size, layout.offset(port), becomes[end].ports, 2)
                # A row has but one address, for a source or a destination.
                named = address if layout is _KEY else "addr"
                if layout is _KEY or end[0] == row.addr:
                    _fill(text, layout.size, layout.offset(named) + 12, becomes[end].words, 4)
        packed.append(text)
    if backends:
        _fill(packed[1], _ROW.size, _ROW.offset("backend"), backends, 4)
    return Copies(bytes(packed[0]), packed[1])


def set_seen(rows: bytearray, tick: int) -> None:
    """Have rows say that their flow's last packet was at this time."""
    _fill(rows, _ROW.size, _ROW.offset("seen"), tick.to_bytes(4, "little") * (len(rows) // _ROW.size), 4)


def _fill(text: bytearray, stride: int, offset: int, column: bytes, width: int) -> None:
    for byte in range(width):
        text[offset + byte :: stride] = column[byte::width]


def word(address: bytes) -> int:
    """Return the last word of an address."""
    return int.from_bytes(address[-4:], "big")
