"""The kernel's own connection tracker, as far as flows that it translates are concerned.

What kube-proxy began, its rules have left there: a service's address in the original
direction, and a backend that answers. Such flows are kept as rows of `flows` that lead to
themselves, so that the packet programs pass them on (LB_FLOW_HELD in bpf/abi.h).

Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d, ports 2 bytes in network order.
"""

import struct
import typing
from collections.abc import Iterator

from lbproxy import abi
from lbproxy.core import addresses, flows, model, node_rows, tables

# Attributes of ctnetlink (linux/netfilter/nfnetlink_conntrack.h), and bits of the status.
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _STATUS_MASK = 1, 2, 3, 4, 7, 26
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST, _V6_SRC, _V6_DST = 1, 2, 3, 4
_PROTO_NUMBER, _PROTO_SPORT, _PROTO_DPORT = 1, 2, 3
_PROTOINFO_TCP, _TCP_STATE = 1, 1
_SEEN_REPLY: typing.Final = 0x2
_ASSURED: typing.Final = 0x4
_CONFIRMED: typing.Final = 0x8
_DST_NAT: typing.Final = 0x20
_DYING: typing.Final = 0x200
_FIXED: typing.Final = 4  # bytes of nfgenmsg
_ATTRIBUTE: typing.Final = struct.Struct("=HH")
_NESTED: typing.Final = 0x8000
_AF_INET, _AF_INET6 = 2, 10
_TYPE: typing.Final = 0x3FFF  # without the flags of nesting and byte order

# States of TCP in the tracker (linux/netfilter/nf_conntrack_tcp.h).
_ESTABLISHED, _FIN_WAIT, _CLOSE_WAIT, _LAST_ACK, _TIME_WAIT, _CLOSE = 3, 4, 5, 6, 7, 8

_STATE: typing.Final = tables.FlowState
_HELD: typing.Final = int(_STATE.HELD)
_EARLIER: typing.Final = abi.constant("HELD_EARLIER")
_INGRESS: typing.Final = abi.constant("STAGE_INGRESS")
_EGRESS: typing.Final = abi.constant("STAGE_EGRESS")


class Tuple(typing.NamedTuple):
    """Who sends to whom in one direction."""

    src: bytes
    dst: bytes
    sport: bytes
    dport: bytes


class Entry(typing.NamedTuple):
    """A connection whose destination the kernel translates, by rules or by IPVS."""

    proto: int
    original: Tuple
    reply: Tuple
    status: int
    tcp_state: int
    left_s: int  # until it is forgotten, if nothing comes

    @property
    def over(self) -> bool:
        """Whether it is a connection of TCP that both sides have closed, or one has reset."""
        return self.proto == model.Protocol.TCP and self.tcp_state in (_LAST_ACK, _TIME_WAIT, _CLOSE)

    @property
    def masqueraded(self) -> bool:
        """Whether the backend sees another sender than the client."""
        return (self.reply.dst, self.reply.dport) != (self.original.src, self.original.sport)


class Reserved(typing.NamedTuple):
    """A connection from this node that the tracker does not know, and for how long to enter it."""

    proto: int
    ends: Tuple
    left_s: int


def request(family: int, *, ipvs: bool = False) -> bytes:
    """The payload of a request for all entries whose destination is translated; `family` 2 or 10.

    A kernel that does not know the filter sends others as well, and with `ipvs` all are asked for.
    """
    if ipvs:
        return bytes([family, 0, 0, 0])
    status = b"".join(
        _ATTRIBUTE.pack(8, number) + _DST_NAT.to_bytes(4, "big") for number in (_STATUS, _STATUS_MASK)
    )
    return bytes([family, 0, 0, 0]) + status


def reserved(keys: bytes, rows: bytes, now: int, settings: tables.Settings) -> Iterator[Reserved]:
    """The ports of this node that a batch of rows of `flows` masquerades with: ours, and in use."""
    for key, row in zip(_cut(keys, tables.FlowKey), _cut(rows, tables.Flow), strict=True):
        answer, flow = tables.flow_key(key), tables.flow(row)
        # An answer to a masqueraded flow where it comes in.
        if answer.stage != _INGRESS or flow.state & (_STATE.ORIGINAL | _STATE.RESET) or is_held(flow.state):
            continue
        whole = flows.timeout_ticks(settings, answer.proto, flow.state)
        left = flow.seen + whole - now
        if left > 0:
            ends = Tuple(answer.dst, answer.src, answer.dport, answer.sport)
            # No packet renews what is entered: what comes as late as it may gives the flow its time anew.
            yield Reserved(answer.proto, ends, int((left + whole) * node_rows.TICK_S) + 1)


def reservation(flow: Reserved) -> bytes:
    """The payload of a request to enter such a connection, as one that is established."""
    there, ipv4 = flow.ends, flow.ends.src.startswith(addresses.IPV4_PREFIX)
    back = Tuple(there.dst, there.src, there.dport, there.sport)
    packed = bytes([_AF_INET if ipv4 else _AF_INET6, 0, 0, 0])
    for number, ends in ((_TUPLE_ORIGINAL, there), (_TUPLE_REPLY, back)):
        first, skip = (_V4_SRC, 12) if ipv4 else (_V6_SRC, 0)
        ip = _attribute(first, ends.src[skip:]) + _attribute(first + 1, ends.dst[skip:])
        l4 = _attribute(_PROTO_NUMBER, bytes([flow.proto]))
        l4 += _attribute(_PROTO_SPORT, ends.sport) + _attribute(_PROTO_DPORT, ends.dport)
        packed += _nested(number, _nested(_TUPLE_IP, ip) + _nested(_TUPLE_PROTO, l4))
    status = _SEEN_REPLY | _ASSURED | _CONFIRMED
    packed += _attribute(_STATUS, status.to_bytes(4, "big"))
    packed += _attribute(_TIMEOUT, flow.left_s.to_bytes(4, "big"))
    if flow.proto == model.Protocol.TCP:
        state = _attribute(_TCP_STATE, bytes([_ESTABLISHED]))
        packed += _nested(_PROTOINFO, _nested(_PROTOINFO_TCP, state))
    return packed


def decode(message: bytes, *, ipvs: bool = False) -> Entry | None:
    """Read the payload of one answer; None where it is not about a translated destination.

    What IPVS translates, no bit says (with `ipvs`): it shows in who answers. That needs its sysctl
    net.ipv4.vs.conntrack, which kube-proxy sets.
    """
    found = dict(_attributes(memoryview(message)[_FIXED:]))
    status = int.from_bytes(found.get(_STATUS, b""), "big")
    if not (ipvs or status & _DST_NAT) or status & _DYING:
        return None
    try:
        proto, original = _tuple(found[_TUPLE_ORIGINAL])
        _, reply = _tuple(found[_TUPLE_REPLY])
    except KeyError:  # of a protocol without ports
        return None
    if not status & _DST_NAT and (reply.src, reply.sport) == (original.dst, original.dport):
        return None
    left_s = int.from_bytes(found.get(_TIMEOUT, b""), "big")
    return Entry(proto, original, reply, status, _tcp_state(found.get(_PROTOINFO)), left_s)


def rows(entry: Entry, now: int, settings: tables.Settings, service: int = 0) -> dict[bytes, bytes]:
    """The rows that keep everybody's hands off an entry: of `flows`, by key. `now` is a tick.

    They are over just before the entry is: their packets would be nobody's from then on. One is of
    what the client sends where that comes in, one of the answers where they leave again; and where
    the kernel masquerades, one of the answers where these come in, so that no flow of ours gets the
    same port.
    """
    state = _state(entry)
    mirrored = state & (_STATE.REPLIED | _STATE.ASSURED | _STATE.RESET)
    if state & _STATE.FIN:
        mirrored |= _STATE.PEER_FIN
    if state & _STATE.PEER_FIN:
        mirrored |= _STATE.FIN
    there, back = entry.original, entry.reply
    answers = Tuple(there.dst, there.src, there.dport, there.sport)
    kept = [(there, _INGRESS, state | _STATE.ORIGINAL), (answers, _EGRESS, mirrored)]
    if entry.masqueraded:
        kept.append((back, _INGRESS, mirrored))
    return {
        tables.FlowKey(*ends, entry.proto, stage).pack(): tables.Flow(
            ends.dst if stage == _INGRESS else ends.src,
            ends.sport,
            ends.dport,
            0,
            _seen(entry, now, settings, int(flags)),
            service.to_bytes(3, "little"),
            _HELD | int(flags),
        ).pack()
        for ends, stage, flags in kept
    }


def renewed(entry: Entry, had: bytes, row: bytes, now: int, settings: tables.Settings) -> bytes | None:
    """What a row that is held already is to become, of which `rows` made `row`; None: it may stay.

    Which side has closed a connection the packets have told, and the tracker does not. A row whose
    time is over is anybody's already.
    """
    before, after = tables.flow(had), tables.flow(row)
    if now - before.seen > flows.timeout_ticks(settings, entry.proto, before.state):
        return None
    closed = _STATE.FIN | _STATE.PEER_FIN
    if before.state & closed == closed or before.state & _STATE.RESET:
        return None
    state = before.state | after.state & (_STATE.REPLIED | _STATE.ASSURED)
    seen = _seen(entry, now, settings, state)
    if state == before.state and abs(seen - before.seen) < _EARLIER:
        return None
    return after._replace(state=int(state), seen=seen).pack()


def is_held(state: int) -> bool:
    """Whether `flow.state` is that of a flow which is not ours."""
    return state & _HELD == _HELD


def _seen(entry: Entry, now: int, settings: tables.Settings, state: int) -> int:
    """When a row was seen last that ends with the entry; of the future only where clocks round."""
    left = int(entry.left_s / node_rows.TICK_S) - _EARLIER
    return max(0, min(now, now + left - flows.timeout_ticks(settings, entry.proto, _HELD | state)))


def _state(entry: Entry) -> tables.FlowState:
    state = _STATE(0)
    if entry.status & _SEEN_REPLY:
        state |= _STATE.REPLIED
    if entry.status & _ASSURED or entry.tcp_state >= _ESTABLISHED:
        state |= _STATE.REPLIED | _STATE.ASSURED
    if entry.tcp_state in (_LAST_ACK, _TIME_WAIT):
        state |= _STATE.FIN | _STATE.PEER_FIN
    elif entry.tcp_state in (_FIN_WAIT, _CLOSE_WAIT):
        state |= _STATE.FIN
    elif entry.tcp_state == _CLOSE:
        state |= _STATE.RESET
    return state


def _tuple(packed: memoryview) -> tuple[int, Tuple]:
    """A direction's protocol and ends. Raises KeyError where it has no ports."""
    parts = dict(_attributes(packed))
    ip, proto = dict(_attributes(parts[_TUPLE_IP])), dict(_attributes(parts[_TUPLE_PROTO]))
    if _V4_SRC in ip:
        src, dst = (addresses.IPV4_PREFIX + bytes(ip[number]) for number in (_V4_SRC, _V4_DST))
    else:
        src, dst = bytes(ip[_V6_SRC]), bytes(ip[_V6_DST])
    ports = bytes(proto[_PROTO_SPORT]), bytes(proto[_PROTO_DPORT])
    return proto[_PROTO_NUMBER][0], Tuple(src, dst, *ports)


def _tcp_state(packed: memoryview | None) -> int:
    tcp = dict(_attributes(packed)).get(_PROTOINFO_TCP) if packed else None
    state = dict(_attributes(tcp)).get(_TCP_STATE) if tcp else None
    return state[0] if state else 0


def _cut(packed: bytes, kind: type[tables.FlowKey] | type[tables.Flow]) -> Iterator[bytes]:
    size = abi.LAYOUTS["flow_key" if kind is tables.FlowKey else "flow"].size
    return (packed[at : at + size] for at in range(0, len(packed), size))


def _attribute(number: int, value: bytes) -> bytes:
    packed = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), number) + value
    return packed + bytes(-len(packed) % 4)


def _nested(number: int, value: bytes) -> bytes:
    return _attribute(number | _NESTED, value)


def _attributes(packed: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(packed):
        length, number = _ATTRIBUTE.unpack_from(packed, at)
        if length < _ATTRIBUTE.size:
            return
        yield number & _TYPE, packed[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
