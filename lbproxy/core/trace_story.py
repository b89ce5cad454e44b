"""From events to a story: one line for each step of a connection, and in the end what became of it.

An event is a piece of evidence. A packet that went into lbproxy's program and did not come out
behind it was dropped, answered, or sent on inside another; what follows on that CPU says which.
"""

import dataclasses
import enum
import typing

import msgspec

from lbproxy.core import addresses
from lbproxy.core import trace_events as events

# A packet is through lbproxy's program in microseconds; what is not seen behind it by then is not to come.
PASSED_ON_WITHIN_NS: typing.Final = 100_000_000


class Verdict(enum.StrEnum):
    """What became of a connection, as far as it was seen."""

    BALANCED = "balanced"
    REFUSED = "refused"
    DROPPED = "dropped"
    UNTOUCHED = "untouched"
    UNANSWERED = "unanswered"
    UNKNOWN = "unknown"


class Line(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One step: when (seconds since the first), of which connection, where it was seen, and what it means.

    `source` and `destination` are as they were before lbproxy's program, `new_source` and
    `new_destination` what it made of them, where that is something else.
    """

    time_s: float
    connection: int
    where: str
    event: str
    text: str
    source: str = ""
    destination: str = ""
    new_source: str = ""
    new_destination: str = ""
    protocol: str = ""
    service: str = ""
    process: str = ""
    pid: int = 0
    error: str = ""
    round_trip_ms: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    length: int = 0


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a connection came to."""

    connection: int
    event: str = "verdict"
    verdict: str
    text: str
    reason: str = ""  # why, as the tables are now
    source: str
    destination: str
    protocol: str
    service: str = ""
    backend: str = ""
    masqueraded_as: str = ""
    flow: str = ""  # its row in the table of flows


class Names(typing.Protocol):
    """What things are called; asked at most once for each."""

    def service(self, end: events.End, protocol: int) -> str:
        """The service that an address and port belong to; empty for none."""
        ...

    def backend(self, end: events.End) -> str:
        """Where a backend is, in words; empty where it is not known."""
        ...

    def device(self, ifindex: int) -> str:
        """A device's name."""
        ...

    def owner(self, netns: int) -> str:
        """Whose a network namespace is: the node's, or a pod's."""
        ...

    def begins_nothing(self, *, by_socket: bool) -> str:
        """Why lbproxy begins no flow now; empty where it does."""
        ...


@dataclasses.dataclass(slots=True)
class Connection:
    """What has been seen of one."""

    number: int
    protocol: int
    source: events.End | None
    dialled: events.End
    began_ns: int
    by_socket: bool
    owner: str = ""
    backend: events.End | None = None
    masquerade: events.End | None = None
    tunnel: str = ""
    error: int = 0
    established: bool = False
    answered: bool = False  # something came back from the backend
    released: bool = False
    timed_out: bool = False
    failed: bool = False
    refused: str = ""  # by whom, in words
    dropped: str = ""  # where, in words
    ended: str = ""
    left_for: str = ""  # why it was left alone, though it is a service's

    @property
    def is_of_lbproxy(self) -> bool:
        """Whether it was lbproxy, and no backend or network, that decided against it."""
        by_backend = self.refused.startswith("by ")
        return bool(self.error or self.dropped or (self.refused and not by_backend)) or (
            not self.tunnel and not self.failed and self.backend in (None, self.dialled)
        )


class Story:
    """Puts events in order and in words; nothing is printed, and no clock is read, here."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._first_ns: int | None = None
        self._of_id: dict[int, Connection] = {}
        self._inside: dict[int, events.Event] = {}  # packets in lbproxy's program, by CPU
        self.connections: list[Connection] = []  # in order of appearance

    def hear(self, event: events.Event) -> list[Line]:
        """What there is to say now."""
        if self._first_ns is None:
            self._first_ns = event.time_ns
        if event.kind is events.Kind.BEFORE:
            lines = self._missing(event.cpu, event)
            self._inside[event.cpu] = event
            return lines
        if event.kind is events.Kind.AFTER:
            before = self._inside.get(event.cpu)
            if before is None or (before.id, before.sequence) != (event.id, event.sequence):
                return []  # the other half was lost
            del self._inside[event.cpu]
            return [self._passed(before, event)]
        connection = self._of_socket(event)
        return [self._socket(connection, event)] if connection is not None else []

    def settle(self, now_ns: int | None = None) -> list[Line]:
        """What there is to say of packets that did not come out in time; without `now_ns`, of all."""
        late = [
            cpu
            for cpu, event in self._inside.items()
            if now_ns is None or now_ns - event.time_ns > PASSED_ON_WITHIN_NS
        ]
        return [line for cpu in late for line in self._missing(cpu, None)]

    # --- sockets ---

    def _of_socket(self, event: events.Event) -> Connection | None:
        known = self._of_id.get(event.id)
        if event.kind not in (events.Kind.CONNECT, events.Kind.SENDMSG):
            return known
        # A socket that dials again is another connection.
        return self._begin(event, None, event.outer, by_socket=True)

    def _begin(
        self, event: events.Event, source: events.End | None, dialled: events.End, *, by_socket: bool
    ) -> Connection:
        begun = Connection(
            len(self.connections) + 1, event.protocol, source, dialled, event.time_ns, by_socket=by_socket
        )
        self.connections.append(begun)
        self._of_id[event.id] = begun
        return begun

    def _socket(self, connection: Connection, event: events.Event) -> Line:
        match event.kind:
            case events.Kind.CONNECT | events.Kind.SENDMSG:
                return self._dialled(connection, event)
            case events.Kind.SYN:
                connection.source = event.source
                text = f"sends its SYN from {event.source} to {event.destination}"
                return self._line(connection, event, "socket", "syn", text, ends=event.ends)
            case events.Kind.ESTABLISHED:
                connection.established = connection.answered = True
                after_ms = (event.time_ns - connection.began_ns) / 1e6
                text = f"established {after_ms:.2f} ms after connect()"
                text += f", round trip {event.rtt_us / 1000:.2f} ms" if event.rtt_us else ""
                return self._line(connection, event, "socket", "established", text, ends=event.ends)
            case events.Kind.TIMEOUT:
                connection.timed_out = event.last
                text = (
                    "no answer, and gives up"
                    if event.last
                    else f"no answer: sends again, for the {_ordinal(event.tries + 1)} time"
                )
                return self._line(connection, event, "socket", "no-answer", text)
            case events.Kind.STATE:
                return self._state(connection, event)
        connection.released = True
        return self._line(connection, event, "socket", "release", "the application closes its socket")

    def _dialled(self, connection: Connection, event: events.Event) -> Line:
        service = self._names.service(event.outer, event.protocol)
        connection.owner = owner = self._names.owner(event.netns)
        connection.error = event.error
        who = f"{event.process or 'a process'}[{event.pid}] {owner}"
        verb = "dials" if event.kind is events.Kind.CONNECT else "sends to"
        name = f" ({service})" if service else ""
        text = f"{who} {verb} {event.outer}/{events.protocol_name(event.protocol)}{name}"
        if event.error:
            kind, error = "refused", events.error_name(event.error)
            connection.refused = "at the socket"
            text += f": refused with {error}"
        elif event.outer != event.destination:
            kind, error = "chosen", ""
            connection.backend = event.destination
            where = self._names.backend(event.destination)
            text += f": led to {event.destination}{f' ({where})' if where else ''}"
        else:
            kind, error = "untouched", ""
            connection.backend = event.destination
            text += ": left as it is"
            if service:
                connection.left_for = self._names.begins_nothing(by_socket=True)
                text += f", for {connection.left_for}" if connection.left_for else ""
        return self._line(
            connection,
            event,
            "socket",
            kind,
            text,
            destination=str(event.outer),
            new_destination=str(event.destination) if event.outer != event.destination else "",
            service=service,
            process=event.process,
            pid=event.pid,
            error=error,
        )

    def _state(self, connection: Connection, event: events.Event) -> Line:
        moved = f"sent {event.sent_bytes} bytes, received {event.received_bytes}"
        if event.old_state == events.SYN_SENT:
            connection.failed = True
            if not event.tries and connection.released:
                kind, text = "given-up", "not established: the application has given up"
            elif not event.tries:
                connection.timed_out = True
                kind, text = "timed-out", "not established: nobody answered"
            else:
                kind, text = "refused", f"not established: refused by {connection.backend or 'its peer'}"
                connection.refused = (
                    f"by {connection.backend} itself" if connection.backend else "by its peer"
                )
        elif event.new_state == events.CLOSE:
            kind = "cut"
            text = f"closed at once, by a reset or by timeouts: {moved}"
            if connection.released:
                text = f"the application closes it at once: {moved}"
        elif event.new_state == events.FIN_WAIT1:
            kind, text = "closing", f"this side closes first: {moved}"
        else:
            kind, text = "peer-closing", f"the peer closes first: {moved}"
        connection.ended = connection.ended or kind
        return self._line(
            connection,
            event,
            "socket",
            kind,
            text,
            round_trip_ms=round(event.rtt_us / 1000, 3),
            sent_bytes=event.sent_bytes,
            received_bytes=event.received_bytes,
        )

    # --- packets ---

    def _of_packet(self, event: events.Event) -> Connection:
        known = self._of_id.get(event.id)
        return known or self._begin(event, event.source, event.destination, by_socket=False)

    def _passed(self, before: events.Event, after: events.Event) -> Line:
        connection = self._of_packet(before)
        self._learn(connection, before, after)
        changed = before.ends != after.ends
        text = f"{_packet(before)} {'leaves' if before.egress else 'comes in'}"
        if before.shape is not events.Shape.PLAIN and after.shape is events.Shape.PLAIN:
            text += f", taken out of the packet around it: {_way(after)}"
        elif changed:
            text += f" as {_way(after)}" if before.egress else f", goes on as {_way(after)}"
        else:
            text += " as it is" if before.egress else ", goes on as it is"
        return self._packet_line(connection, before, "packet", text, after if changed else None)

    def _learn(self, connection: Connection, before: events.Event, after: events.Event) -> None:
        forwards = before.source == connection.source or before.destination == connection.dialled
        if before.shape is events.Shape.QUOTED:
            return
        if forwards and not before.egress and before.destination != after.destination:
            connection.backend = connection.backend or after.destination
        if before.egress and before.destination == connection.backend and before.source != after.source:
            connection.masquerade = after.source
        back = before.source == (connection.backend or connection.dialled)
        if back:
            connection.answered = True
            if before.tcp_flags & _SYN_ACK == _SYN_ACK:
                connection.established = True
            if before.tcp_flags & _RST and not connection.established:
                connection.refused = connection.refused or f"by {before.source} itself"
        if before.tcp_flags & _FIN and not connection.ended:
            connection.ended = "peer-closing" if back else "client-closing"

    def _missing(self, cpu: int, then: events.Event | None) -> list[Line]:
        """What became of the packet that was last given to lbproxy on a CPU; `then` is what came next."""
        before = self._inside.pop(cpu, None)
        if before is None:
            return []
        connection = self._of_packet(before)
        then = then if then is not None and then.id == before.id else None
        kind, text = "not-passed-on", f"{_packet(before)} {'would leave' if before.egress else 'comes in'}"
        if before.shape is events.Shape.QUOTED:
            text += ", and lbproxy does not pass it on"
            return [self._packet_line(connection, before, kind, text, None)]
        if then is not None and then.shape is events.Shape.TUNNELLED and then.ends == before.ends:
            kind = "tunnelled"
            connection.tunnel = addresses.text(then.outer.address)
            text += f", goes on inside another packet to {connection.tunnel}"
        elif then is not None and then.shape is events.Shape.QUOTED:
            kind, connection.refused = "answered", "with an ICMP error"
            text += ": answered with an ICMP error"
        elif then is not None and then.ends == before.ends[::-1] and then.tcp_flags & _RST:
            kind, connection.refused = "answered", "with a RST"
            text += ": answered with a RST"
        else:
            where = self._where(before)
            connection.dropped = (
                connection.dropped or f"{'leaving' if before.egress else 'coming in'} at {where}"
            )
            text += ", and lbproxy does not pass it on"
        return [self._packet_line(connection, before, kind, text, None)]

    def _where(self, event: events.Event) -> str:
        return self._names.device(event.ifindex)

    def _packet_line(
        self,
        connection: Connection,
        before: events.Event,
        kind: str,
        text: str,
        after: events.Event | None,
    ) -> Line:
        where = f"{self._where(before)} {'out' if before.egress else 'in'}"
        return self._line(
            connection,
            before,
            where,
            kind,
            text,
            ends=before.ends,
            length=before.length,
            new_source=str(after.source) if after and after.source != before.source else "",
            new_destination=str(after.destination)
            if after and after.destination != before.destination
            else "",
        )

    # --- the end ---

    def outcome(self, connection: Connection) -> Outcome:
        """What it came to; the reason, and the row of its flow, are for whoever can read the tables."""
        service = self._names.service(connection.dialled, connection.protocol)
        if service and not connection.by_socket and connection.backend in (None, connection.dialled):
            connection.left_for = self._names.begins_nothing(by_socket=False)
        verdict, text = _verdict(connection, service)
        led = connection.backend if connection.backend != connection.dialled else None
        return Outcome(
            connection=connection.number,
            verdict=verdict.value,
            text=text,
            source=str(connection.source) if connection.source else connection.owner,
            destination=str(connection.dialled),
            protocol=events.protocol_name(connection.protocol),
            service=service,
            backend=str(led) if led else "",
            masqueraded_as=str(connection.masquerade) if connection.masquerade else "",
        )

    def _line(
        self,
        connection: Connection,
        event: events.Event,
        where: str,
        kind: str,
        text: str,
        *,
        ends: tuple[events.End, events.End] | None = None,
        **more: typing.Any,
    ) -> Line:
        if ends is not None:
            more |= {"source": str(ends[0]), "destination": str(ends[1])}
        return Line(
            time_s=round((event.time_ns - (self._first_ns or 0)) / 1e9, 6),
            connection=connection.number,
            where=where,
            event=kind,
            text=text,
            protocol=events.protocol_name(connection.protocol),
            **more,
        )


def _packet(event: events.Event) -> str:
    if event.shape is events.Shape.QUOTED:
        return f"{events.icmp_name(event.icmp_type)} about {_way(event)}"
    if event.shape is events.Shape.TUNNELLED:
        return f"{_way(event)} inside another packet"
    flags = events.flag_names(event.tcp_flags)
    return f"{_way(event)}{f' {flags}' if flags else ''}"


def _way(event: events.Event) -> str:
    return f"{event.source} → {event.destination}"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def _verdict(of: Connection, service: str) -> tuple[Verdict, str]:
    """Judge by what weighs most: a refusal, then what was lost, then whether anybody answered."""
    led = of.backend is not None and of.backend != of.dialled
    to = f"led to {of.backend}" if led else "left as it is"
    if of.left_for and not led:
        to += f", for {of.left_for}"
    if of.masquerade:
        to += f", masqueraded as {of.masquerade}"
    if of.error:
        return Verdict.REFUSED, f"refused at the socket with {events.error_name(of.error)}"
    if of.refused:
        named = led or of.left_for
        return Verdict.REFUSED, f"{to}, refused {of.refused}" if named else f"refused {of.refused}"
    if of.tunnel:
        return (
            Verdict.BALANCED,
            f"sent on to {of.tunnel} inside another packet (DSR): answers come from there",
        )
    if of.dropped and not of.established:
        return Verdict.DROPPED, f"dropped by lbproxy {of.dropped}"
    if of.failed:
        why = "nobody answered" if of.timed_out else "the application gave up before anybody answered"
        return Verdict.UNANSWERED, f"{to}; {why}"
    if not led:
        if of.left_for:
            return Verdict.UNTOUCHED, to
        if service and of.by_socket and not of.established:
            return (
                Verdict.DROPPED,
                "left alone, though it is a service's: its packets are dropped on their way out",
            )
        return Verdict.UNTOUCHED, "lbproxy leaves it as it is"
    if of.established:
        return Verdict.BALANCED, f"{to}, established{f', {_ENDS[of.ended]}' if of.ended in _ENDS else ''}"
    if of.protocol == _TCP and not of.answered:
        return Verdict.UNANSWERED, f"{to}; no answer was seen"
    return Verdict.BALANCED, f"{to}{', answered' if of.answered else ''}"


_TCP: typing.Final = 6
_FIN: typing.Final = 0x01
_RST: typing.Final = 0x04
_SYN_ACK: typing.Final = 0x12
_ENDS: typing.Final = {
    "closing": "closed by this side",
    "client-closing": "closed by the client",
    "peer-closing": "closed by its peer",
    "cut": "cut off",
}
