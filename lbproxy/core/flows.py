"""Which rows of the flow table have had their time, and what the others amount to.

A node may have a hundred thousand flows, so rows are not unpacked: the columns
that matter are cut out of whole batches, and each is walked once.
"""

import collections
import itertools
import struct
import typing

from lbproxy import abi
from lbproxy.core import tables

# The programs copy `seen` to a row's partner only about once a tick, so a row may look a tick
# older than its flow is, and the clock may step between two looks. Until both have run out by
# this much neither row goes: a partner must not be missing while the other still serves.
MARGIN_TICKS: typing.Final = 2

_KEY: typing.Final = abi.LAYOUTS["flow_key"]
_FLOW: typing.Final = abi.LAYOUTS["flow"]
_PROTO_AT: typing.Final = _KEY.offset("proto")
_STAGE_AT: typing.Final = _KEY.offset("stage")
# Reads only these of a row.
_SEEN_AND_STATE: typing.Final = struct.Struct(
    "=" + "".join(one.code if one.name in ("seen", "state") else f"{one.size}x" for one in _FLOW.fields)
)
assert _FLOW.offset("seen") < _FLOW.offset("state")
_WORD: typing.Final = 4
_WORDS: typing.Final = _FLOW.size // _WORD
_SEEN_AT: typing.Final = _FLOW.offset("seen") // _WORD
_BACKEND_AT: typing.Final = _FLOW.offset("backend") // _WORD
_ADDR: typing.Final = slice(_FLOW.offset("addr"), _FLOW.offset("addr") + 16)
_PORT: typing.Final = slice(_FLOW.offset("dport"), _FLOW.offset("dport") + 2)
_STATE_AT: typing.Final = _FLOW.offset("state")

_TCP: typing.Final = 6
_UDP: typing.Final = 17
_INGRESS: typing.Final = abi.constant("STAGE_INGRESS")
_ORIGINAL: typing.Final = int(tables.FlowState.ORIGINAL)
_ASSURED: typing.Final = int(tables.FlowState.ASSURED)
_RESET: typing.Final = int(tables.FlowState.RESET)
_FIN: typing.Final = int(tables.FlowState.FIN)
_PEER_FIN: typing.Final = int(tables.FlowState.PEER_FIN)
_BOTH_FIN: typing.Final = _FIN | _PEER_FIN
_TUNNEL: typing.Final = int(tables.FlowState.TUNNEL)
_HELD: typing.Final = int(tables.FlowState.HELD)
_EARLIER: typing.Final = abi.constant("HELD_EARLIER")
_STATES: typing.Final = 1 << max(map(int, tables.FlowState)).bit_length()


class Flows(typing.NamedTuple):
    """A kind of flow that is counted: its protocol number, and whether its client has answered."""

    proto: int
    assured: bool


class Counts:
    """What a look at the whole table found, batch by batch, rows that are to go left out."""

    def __init__(self) -> None:
        self.rows = 0
        self.unassured = 0  # rows
        self.held = 0  # flows that are another proxy's, which are not in `flows`
        self.flows: collections.Counter[Flows] = collections.Counter()


class Deadlines:
    """The tick before which a row of each kind must have been seen last, to be expired now."""

    def __init__(self, settings: tables.Settings, now: int) -> None:
        """`now` in ticks. A timeout of 0 means that nobody has said: such rows stay."""
        self.shortest = 0  # a row seen at or after it is not expired, whatever it is
        self._seen_before: dict[int, list[int]] = {}
        for proto in (_TCP, _UDP, 0):
            ticks = [timeout_ticks(settings, proto, state) for state in range(_STATES)]
            before = [max(0, now - some - MARGIN_TICKS) if some else 0 for some in ticks]
            self._seen_before[proto] = before
            self.shortest = max(self.shortest, *before)

    def seen_before(self, proto: int) -> list[int]:
        """Of a protocol, by state."""
        return self._seen_before.get(proto) or self._seen_before[0]

    def fresh(self, key: bytes, row: bytes) -> bool:
        """Whether one row has not expired."""
        seen, state = _SEEN_AND_STATE.unpack(row)
        return bool(seen >= self.seen_before(key[_PROTO_AT])[state % _STATES])


def timeout_ticks(settings: tables.Settings, proto: int, state: int) -> int:
    """How long a flow in this state may be idle; whatever is neither TCP nor UDP is SCTP."""
    assured = state & _ASSURED
    if proto == _UDP:
        ticks = settings.udp_stream_ticks if assured else settings.udp_new_ticks
        return ticks - _EARLIER if state & _HELD == _HELD and ticks > _EARLIER else ticks
    if proto != _TCP:
        return settings.sctp_established_ticks if assured else settings.sctp_new_ticks
    if state & _RESET or state & _BOTH_FIN == _BOTH_FIN:
        return settings.tcp_closed_ticks
    if state & _BOTH_FIN:
        return settings.tcp_half_closed_ticks
    return settings.tcp_established_ticks if assured else settings.tcp_new_ticks


def held(keys: bytes, rows: bytes) -> dict[bytes, bytes]:
    """Those rows of a batch whose flows are not ours, by key. Keys and rows are packed in order."""
    states = rows[_STATE_AT :: _FLOW.size]
    found = [at for at, state in enumerate(states) if state & _HELD == _HELD]
    return {
        keys[at * _KEY.size : (at + 1) * _KEY.size]: rows[at * _FLOW.size : (at + 1) * _FLOW.size]
        for at in found
    }


def sweep(
    keys: bytes, rows: bytes, deadlines: Deadlines, counts: Counts, most: int | None = None
) -> list[bytes]:
    """The keys of a batch that have expired, so many `most`; the others are counted.

    Keys and rows are packed in order.
    """
    protos, stages = keys[_PROTO_AT :: _KEY.size], keys[_STAGE_AT :: _KEY.size]
    words = memoryview(rows).cast("I")
    states = rows[_STATE_AT :: _FLOW.size]
    found = collections.Counter(zip(protos, stages, states, strict=True))
    expired = _expired(protos, words[_SEEN_AT::_WORDS].tolist(), states, deadlines)[:most]
    found.subtract((protos[at], stages[at], states[at]) for at in expired)
    for (proto, stage, state), count in found.items():
        counts.rows += count
        if not state & _ASSURED:
            counts.unassured += count
        # A flow has two rows, or four: of these one is of its first direction and where that comes in.
        if count and stage == _INGRESS and state & _ORIGINAL:
            if state & _HELD == _HELD:
                counts.held += count
                continue
            counts.flows[Flows(proto, bool(state & _ASSURED))] += count
    return [keys[at * _KEY.size : (at + 1) * _KEY.size] for at in expired]


def open_to(
    keys: bytes, rows: bytes, deadlines: Deadlines, counted: typing.Mapping[int, bytes]
) -> typing.Counter[int]:
    """Count the open flows of a batch to each of these backends, given by id with address and port.

    As the programs do it: by the row of a flow's first direction, unless it goes into a tunnel.
    """
    found: typing.Counter[int] = collections.Counter()
    words = memoryview(rows).cast("I")
    states = rows[_STATE_AT :: _FLOW.size]
    for at, number in enumerate(words[_BACKEND_AT::_WORDS].tolist()):
        if number not in counted or states[at] & (_ORIGINAL | _TUNNEL) != _ORIGINAL or _closed(states[at]):
            continue
        key = keys[at * _KEY.size : (at + 1) * _KEY.size]
        row = rows[at * _FLOW.size : (at + 1) * _FLOW.size]
        if key[_STAGE_AT] == _INGRESS and deadlines.fresh(key, row):
            found[number] += row[_ADDR] + row[_PORT] == counted[number]
    return found


def _closed(state: int) -> bool:
    return bool(state & _RESET) or state & _BOTH_FIN == _BOTH_FIN


def _expired(protos: bytes, seens: list[int], states: bytes, deadlines: Deadlines) -> list[int]:
    if not seens or min(seens) >= deadlines.shortest:
        return []
    before = {proto: deadlines.seen_before(proto) for proto in set(protos)}
    rows = zip(itertools.count(), protos, seens, states)
    return [at for at, proto, seen, state in rows if seen < before[proto][state % _STATES]]
