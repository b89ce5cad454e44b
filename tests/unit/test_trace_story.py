"""`lbproxy trace` tells the right story of what the observers saw, in whatever order they did."""

import dataclasses
import typing

import hypothesis
import pytest
from hypothesis import strategies as st

from lbproxy import trace_abi
from lbproxy.core import addresses, model
from lbproxy.core import trace_events as events
from lbproxy.core import trace_story as story
from lbproxy.trace import flags as trace_flags

SYN, ACK, RST, FIN = 0x02, 0x10, 0x04, 0x01
TCP = 6


def end(text: str, port: int) -> events.End:
    packed = addresses.parse(text)
    assert packed is not None
    return events.End(packed, port)


CLIENT = end("198.51.100.7", 40000)
POD = end("10.244.1.2", 40000)
VIP = end("10.96.0.1", 80)
BACKEND = end("10.244.2.2", 8080)
NODE = end("172.18.0.1", 1234)
NOBODY = end("::", 0)


RETURNING = "the node is given back"


class Names:
    def __init__(self, returning: str = "") -> None:
        self.returning = returning

    def begins_nothing(self, *, by_socket: bool) -> str:
        return self.returning

    def service(self, of: events.End, protocol: int) -> str:
        return "shop/cart:http" if of == VIP else ""

    def backend(self, of: events.End) -> str:
        return "on worker-2" if of == BACKEND else ""

    def device(self, ifindex: int) -> str:
        return f"eth{ifindex}"

    def owner(self, netns: int) -> str:
        return "in a pod" if netns else "on the node"


@dataclasses.dataclass
class Tape:
    """Events as the observers would tell of them, a microsecond apart."""

    told: list[events.Event] = dataclasses.field(default_factory=list)
    sequence: int = 0

    def tell(self, kind: events.Kind, number: int, *ends: events.End, **more: typing.Any) -> None:
        source, destination, outer = [*ends, NOBODY, NOBODY, NOBODY][:3]

        self.told.append(
            BLANK._replace(
                time_ns=1000 * (len(self.told) + 1),
                id=number,
                source=source,
                destination=destination,
                outer=outer,
                kind=kind,
                **more,
            )
        )

    def packet(
        self,
        number: int,
        before: tuple[events.End, events.End],
        after: tuple[events.End, events.End] | None,
        *,
        egress: bool = False,
        **more: typing.Any,
    ) -> None:
        self.sequence += 1
        more |= {"sequence": self.sequence, "egress": egress, "ifindex": 0}
        self.tell(events.Kind.BEFORE, number, *before, **more)
        if after is not None:
            self.tell(events.Kind.AFTER, number, *after, **more)

    def connect(self, number: int, to: events.End, **more: typing.Any) -> None:
        self.tell(events.Kind.CONNECT, number, NOBODY, to, VIP, netns=7, pid=42, process="curl", **more)

    def play(self, returning: str = "") -> tuple[list[story.Line], list[story.Outcome]]:
        told = story.Story(Names(returning))
        lines = [line for event in self.told for line in told.hear(event)]
        lines += told.settle()
        return lines, [told.outcome(connection) for connection in told.connections]


def blank() -> events.Event:
    row: dict[str, typing.Any] = dict.fromkeys(trace_abi.EVENT.names, 0)
    packed: dict[str, typing.Any] = {name: bytes(16) for name in ("src", "dst", "outer", "name")}
    packed |= {name: bytes(2) for name in ("sport", "dport", "outer_port")}
    row |= packed | {"kind": events.Kind.CONNECT.value, "proto": TCP, "service": events.NO_SERVICE}
    return events.unpack(trace_abi.EVENT.pack(*row.values()))


BLANK = blank()


@pytest.fixture
def tape() -> Tape:
    return Tape()


def verdict(tape: Tape, returning: str = "") -> tuple[str, str]:
    (outcome,) = tape.play(returning)[1]
    return outcome.verdict, outcome.text


def test_a_socket_that_is_led_to_a_backend(tape: Tape) -> None:
    tape.connect(5, BACKEND)
    tape.tell(events.Kind.SYN, 5, POD, BACKEND)
    tape.tell(events.Kind.ESTABLISHED, 5, POD, BACKEND, rtt_us=250.0)
    tape.tell(events.Kind.RELEASE, 5)
    tape.tell(events.Kind.STATE, 5, old_state=1, new_state=events.FIN_WAIT1, sent_bytes=3, received_bytes=9)
    lines, (outcome,) = tape.play()
    assert [line.event for line in lines] == ["chosen", "syn", "established", "release", "closing"]
    assert lines[0].text == (
        "curl[42] in a pod dials 10.96.0.1:80/TCP (shop/cart:http): led to 10.244.2.2:8080 (on worker-2)"
    )
    assert "round trip 0.25 ms" in lines[2].text
    assert (lines[4].sent_bytes, lines[4].received_bytes) == (3, 9)
    assert (outcome.verdict, outcome.source) == ("balanced", "10.244.1.2:40000")
    assert (outcome.destination, outcome.backend) == ("10.96.0.1:80", "10.244.2.2:8080")
    assert outcome.text == "led to 10.244.2.2:8080, established, closed by this side"


def test_while_the_node_is_given_back_that_is_why_nothing_is_begun(tape: Tape) -> None:
    tape.connect(5, VIP)
    assert verdict(tape)[0] == "dropped"
    assert tape.play(RETURNING)[0][0].text.endswith(f"left as it is, for {RETURNING}")
    assert verdict(tape, RETURNING) == ("untouched", f"left as it is, for {RETURNING}")
    tape.tell(events.Kind.ESTABLISHED, 5, POD, VIP)
    assert verdict(tape, RETURNING) == ("untouched", f"left as it is, for {RETURNING}")


def test_nobody_who_answers_a_connection_that_is_left_to_another_proxy(tape: Tape) -> None:
    tape.connect(5, VIP)
    tape.tell(events.Kind.TIMEOUT, 5, POD, VIP, last=True)
    tape.tell(events.Kind.STATE, 5, old_state=events.SYN_SENT, new_state=events.CLOSE)
    assert verdict(tape, RETURNING) == ("unanswered", f"left as it is, for {RETURNING}; nobody answered")


def test_packets_while_the_node_is_given_back(tape: Tape) -> None:
    tape.packet(5, (CLIENT, VIP), (CLIENT, VIP), tcp_flags=SYN)
    assert verdict(tape) == ("untouched", "lbproxy leaves it as it is")
    assert verdict(tape, RETURNING) == ("untouched", f"left as it is, for {RETURNING}")
    tape.packet(6, (CLIENT, VIP), (CLIENT, BACKEND), tcp_flags=ACK)
    begun_before = tape.play(RETURNING)[1][1]
    assert begun_before.text.startswith("led to")


def test_a_socket_that_is_refused(tape: Tape) -> None:
    tape.connect(5, VIP, error=111)
    tape.tell(events.Kind.RELEASE, 5)
    assert verdict(tape) == ("refused", "refused at the socket with ECONNREFUSED")


@pytest.mark.parametrize(
    ("before", "segments", "expected"),
    [
        ((), 1, ("refused", "led to 10.244.2.2:8080, refused by 10.244.2.2:8080 itself")),
        ((events.Kind.TIMEOUT,), 1, ("refused", "refused by 10.244.2.2:8080 itself")),
        ((events.Kind.RELEASE,), 0, ("unanswered", "the application gave up before anybody answered")),
        ((events.Kind.TIMEOUT, events.Kind.RELEASE), 0, ("unanswered", "gave up before anybody answered")),
        ((events.Kind.TIMEOUT,), 0, ("unanswered", "nobody answered")),
        ((), 0, ("unanswered", "nobody answered")),
    ],
)
def test_why_a_socket_is_not_established(
    tape: Tape, before: tuple[events.Kind, ...], segments: int, expected: tuple[str, str]
) -> None:
    tape.connect(5, BACKEND)
    tape.tell(events.Kind.SYN, 5, POD, BACKEND)
    for kind in before:
        tape.tell(kind, 5)
    tape.tell(events.Kind.STATE, 5, old_state=events.SYN_SENT, new_state=events.CLOSE, tries=segments)
    found = verdict(tape)
    assert found[0] == expected[0]
    assert found[1].endswith(expected[1])


def test_a_service_that_is_left_alone_is_one_that_is_dropped(tape: Tape) -> None:
    tape.connect(5, VIP)
    assert verdict(tape)[0] == "dropped"


def test_an_address_of_no_service_is_left_alone(tape: Tape) -> None:
    tape.tell(events.Kind.CONNECT, 5, NOBODY, BACKEND, BACKEND, pid=42)
    assert verdict(tape) == ("untouched", "lbproxy leaves it as it is")


def test_a_socket_that_dials_again_is_another_connection(tape: Tape) -> None:
    tape.connect(5, VIP, error=111)
    tape.connect(5, BACKEND)
    outcomes = tape.play()[1]
    assert [(one.connection, one.verdict) for one in outcomes] == [(1, "refused"), (2, "unanswered")]


def masqueraded(tape: Tape) -> None:
    """A client outside whose flow goes to another node and back."""
    tape.packet(9, (CLIENT, VIP), (CLIENT, BACKEND), tcp_flags=SYN)
    tape.packet(9, (CLIENT, BACKEND), (NODE, BACKEND), egress=True, tcp_flags=SYN)
    tape.packet(9, (BACKEND, NODE), (BACKEND, CLIENT), tcp_flags=SYN | ACK)
    tape.packet(9, (BACKEND, CLIENT), (VIP, CLIENT), egress=True, tcp_flags=SYN | ACK)


def test_packets_on_their_way_through_the_node(tape: Tape) -> None:
    masqueraded(tape)
    lines, (outcome,) = tape.play()
    assert [line.where for line in lines] == ["eth0 in", "eth0 out", "eth0 in", "eth0 out"]
    assert lines[0].text == (
        "198.51.100.7:40000 → 10.96.0.1:80 SYN comes in, goes on as 198.51.100.7:40000 → 10.244.2.2:8080"
    )
    assert (lines[1].new_source, lines[1].new_destination) == ("172.18.0.1:1234", "")
    assert (outcome.verdict, outcome.backend) == ("balanced", "10.244.2.2:8080")
    assert outcome.masqueraded_as == "172.18.0.1:1234"
    assert outcome.text.endswith("established")


def test_a_backend_that_does_not_answer(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), (CLIENT, BACKEND), tcp_flags=SYN)
    assert verdict(tape) == ("unanswered", "led to 10.244.2.2:8080; no answer was seen")


def test_a_backend_that_refuses(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), (CLIENT, BACKEND), tcp_flags=SYN)
    tape.packet(9, (BACKEND, CLIENT), (VIP, CLIENT), egress=True, tcp_flags=RST | ACK)
    assert verdict(tape) == ("refused", "led to 10.244.2.2:8080, refused by 10.244.2.2:8080 itself")


def test_a_packet_that_does_not_come_out_is_dropped(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), None, tcp_flags=SYN)
    lines, (outcome,) = tape.play()
    assert [line.event for line in lines] == ["not-passed-on"]
    assert (outcome.verdict, outcome.text) == ("dropped", "dropped by lbproxy coming in at eth0")


def test_a_packet_is_not_missed_too_soon(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), None, tcp_flags=SYN)
    told = story.Story(Names())
    (before,) = tape.told
    assert told.hear(before) == []
    assert told.settle(before.time_ns + story.PASSED_ON_WITHIN_NS) == []
    assert len(told.settle(before.time_ns + story.PASSED_ON_WITHIN_NS + 1)) == 1
    assert told.settle() == []


def test_what_is_answered_in_place_of_a_backend(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), None, tcp_flags=SYN)
    tape.packet(9, (VIP, CLIENT), (VIP, CLIENT), egress=True, tcp_flags=RST | ACK)
    lines, (outcome,) = tape.play()
    assert lines[0].event == "answered"
    assert (outcome.verdict, outcome.text) == ("refused", "refused with a RST")


def test_what_is_answered_by_icmp(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), None, protocol=17)
    error = {"shape": events.Shape.QUOTED, "icmp_type": 3, "protocol": 17}
    tape.packet(9, (CLIENT, VIP), (CLIENT, VIP), egress=True, **error)
    lines, (outcome,) = tape.play()
    assert "ICMP unreachable about 198.51.100.7:40000 → 10.96.0.1:80" in lines[1].text
    assert (outcome.verdict, outcome.text) == ("refused", "refused with an ICMP error")


def test_what_goes_on_inside_another_packet(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), None, tcp_flags=SYN)
    outer = end("10.244.2.2", 0)
    tape.tell(
        *(events.Kind.BEFORE, 9, CLIENT, VIP, outer), sequence=99, egress=True, shape=events.Shape.TUNNELLED
    )
    lines, (outcome,) = tape.play()
    assert lines[0].event == "tunnelled"
    assert outcome.verdict == "balanced"
    assert "10.244.2.2 inside another packet" in outcome.text


def test_an_icmp_error_that_is_kept_back_is_no_dropped_connection(tape: Tape) -> None:
    masqueraded(tape)
    tape.packet(9, (CLIENT, BACKEND), None, egress=True, shape=events.Shape.QUOTED, icmp_type=5)
    lines, (outcome,) = tape.play()
    assert "ICMP redirect" in lines[-1].text
    assert outcome.verdict == "balanced"


def test_half_a_pair_tells_nothing(tape: Tape) -> None:
    tape.packet(9, (CLIENT, VIP), (CLIENT, BACKEND), tcp_flags=SYN)
    del tape.told[0]
    assert tape.play() == ([], [])


@st.composite
def any_event(draw: st.DrawFn) -> events.Event:
    ends = st.sampled_from([CLIENT, POD, VIP, BACKEND, NODE, NOBODY])
    return BLANK._replace(
        time_ns=draw(st.integers(0, 10**9)),
        id=draw(st.integers(1, 3)),
        source=draw(ends),
        destination=draw(ends),
        outer=draw(ends),
        protocol=draw(st.sampled_from([6, 17, 132, 1])),
        kind=draw(st.sampled_from(events.Kind)),
        error=draw(st.sampled_from([0, 1, 111, 9999])),
        cpu=draw(st.integers(0, 1)),
        sequence=draw(st.integers(0, 2)),
        last=draw(st.booleans()),
        tcp_flags=draw(st.integers(0, 255)),
        old_state=draw(st.integers(0, 12)),
        new_state=draw(st.integers(0, 12)),
        egress=draw(st.booleans()),
        shape=draw(st.sampled_from(events.Shape)),
        icmp_type=draw(st.integers(0, 255)),
    )


@hypothesis.given(st.lists(any_event(), max_size=30))
def test_whatever_is_heard_every_line_is_of_a_connection_that_has_a_verdict(
    heard: list[events.Event],
) -> None:
    told = story.Story(Names())
    lines = [line for event in heard for line in told.hear(event)] + told.settle()
    outcomes = {outcome.connection: outcome for outcome in map(told.outcome, told.connections)}
    assert {line.connection for line in lines} <= outcomes.keys()
    assert list(outcomes) == list(range(1, len(outcomes) + 1))
    assert all(line.text for line in lines)
    assert all(outcome.text for outcome in outcomes.values())
    assert told.settle() == []


def test_a_filter_is_packed_as_the_observers_read_it() -> None:
    row = events.Filter(
        by_source=True, source=POD.address, to=VIP.address, port=80, protocol=17, by_service=True, rate=5
    ).pack()
    read = dict(zip(trace_abi.FILTER.names, trace_abi.FILTER.unpack(row), strict=True))
    assert (read["from_addr"], read["to_addr"], read["to_port"]) == (POD.address, VIP.address, b"\0\x50")
    flag = events.FilterFlag
    assert read["flags"] == flag.FROM | flag.TO | flag.SERVICE
    assert (read["to_proto"], read["rate"]) == (17, 5)
    assert len(row) == trace_abi.FILTER.size


@pytest.mark.parametrize(
    ("text", "port", "protocol"),
    [
        ("10.96.0.1", None, None),
        ("10.96.0.1:80", 80, None),
        ("10.96.0.1/udp", None, model.Protocol.UDP),
        ("10.96.0.1:53/UDP", 53, model.Protocol.UDP),
        ("fd00::1", None, None),
        ("[fd00::1]", None, None),
        ("[fd00::1]:53/SCTP", 53, model.Protocol.SCTP),
    ],
)
def test_where_to_is_read(text: str, port: int | None, protocol: model.Protocol | None) -> None:
    found = trace_flags.parse_destination(text)
    assert (found.port, found.protocol) == (port, protocol)
    assert str(found).lower() == (text if text != "[fd00::1]" else "fd00::1").lower()


@pytest.mark.parametrize("text", ["", "web", "10.96.0.1:", "10.96.0.1:0", "10.96.0.1:80/IP", "10.96.0.1/"])
def test_where_to_can_not_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an ADDRESS\[:PORT\]"):
        trace_flags.parse_destination(text)
