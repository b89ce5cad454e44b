"""What the observers of `lbproxy trace` tell, unpacked; and what they are to tell of."""

import enum
import errno
import typing

from lbproxy import trace_abi
from lbproxy.core import addresses, listing, model


class Kind(enum.IntEnum):
    """trace_event.kind."""

    CONNECT = trace_abi.constant("CONNECT")
    SENDMSG = trace_abi.constant("SENDMSG")
    SYN = trace_abi.constant("SYN")
    ESTABLISHED = trace_abi.constant("ESTABLISHED")
    TIMEOUT = trace_abi.constant("TIMEOUT")
    STATE = trace_abi.constant("STATE")
    RELEASE = trace_abi.constant("RELEASE")
    BEFORE = trace_abi.constant("BEFORE")
    AFTER = trace_abi.constant("AFTER")


class Shape(enum.IntEnum):
    """trace_event.shape: where a packet's addresses were found."""

    PLAIN = trace_abi.constant("PLAIN")
    TUNNELLED = trace_abi.constant("TUNNELLED")
    QUOTED = trace_abi.constant("QUOTED")


class FilterFlag(enum.IntFlag):
    """trace_filter.flags."""

    FROM = trace_abi.constant("FROM")
    TO = trace_abi.constant("TO")
    SERVICE = trace_abi.constant("SERVICE")
    EVERY_PACKET = trace_abi.constant("EVERY_PACKET")


PACKET_ID: typing.Final = trace_abi.constant("PACKET_ID")
NO_SERVICE: typing.Final = trace_abi.constant("NO_SERVICE")
SERVICES: typing.Final = trace_abi.constant("SERVICE_ROWS")  # that can be followed at once
NAMESPACES: typing.Final = trace_abi.constant("NETNS_ROWS")

SYN_SENT: typing.Final = 2  # TCP's own numbers of its states
FIN_WAIT1: typing.Final = 4
CLOSE: typing.Final = 7
CLOSE_WAIT: typing.Final = 8

_TCP_FLAGS: typing.Final = ((0x02, "SYN"), (0x01, "FIN"), (0x04, "RST"), (0x10, "ACK"))


class End(typing.NamedTuple):
    """An address, 16 bytes, and a port."""

    address: bytes
    port: int

    def __str__(self) -> str:
        return listing.place(addresses.text(self.address), self.port)


class Event(typing.NamedTuple):
    """One thing that happened; times in ns of the monotonic clock, round trip times in µs."""

    time_ns: int
    id: int
    netns: int
    sent_bytes: int
    received_bytes: int
    source: End
    destination: End
    outer: End  # what a socket dialled; of a packet whose addresses are inside, where the outer one goes
    protocol: int
    kind: Kind
    pid: int
    error: int
    service: int
    ifindex: int
    cpu: int
    sequence: int
    length: int
    rtt_us: float
    tries: int
    last: bool
    tcp_flags: int
    old_state: int
    new_state: int
    egress: bool
    shape: Shape
    icmp_type: int
    process: str

    @property
    def of_packet(self) -> bool:
        """Whether a device saw it, and not a socket."""
        return self.kind in (Kind.BEFORE, Kind.AFTER)

    @property
    def ends(self) -> tuple[End, End]:
        """From where to where."""
        return self.source, self.destination


class Filter(typing.NamedTuple):
    """What is to be followed; where nothing is said, whatever goes to any service.

    `by_source` means packets of `source`, and sockets in network namespaces that the observers
    are given beside. `port` and `protocol` are 0 for any.
    """

    by_source: bool = False
    source: bytes | None = None
    to: bytes | None = None
    port: int = 0
    protocol: int = 0
    by_service: bool = False
    every_packet: bool = False
    rate: int = 1000  # events a second that each CPU may tell of

    def pack(self) -> bytes:
        """The bytes of the row."""
        flags = FilterFlag(0)
        if self.by_source:
            flags |= FilterFlag.FROM
        if self.to is not None:
            flags |= FilterFlag.TO
        if self.by_service:
            flags |= FilterFlag.SERVICE
        if self.every_packet:
            flags |= FilterFlag.EVERY_PACKET
        return trace_abi.FILTER.pack(
            self.source or bytes(16),
            self.to or bytes(16),
            self.port.to_bytes(2, "big"),
            self.protocol,
            int(flags),
            self.rate,
        )


def unpack(row: bytes) -> Event:
    """An event out of the bytes of a `trace_event`."""
    told = dict(zip(trace_abi.EVENT.names, trace_abi.EVENT.unpack(row[: trace_abi.EVENT.size]), strict=True))
    return Event(
        told["time_ns"],
        told["id"],
        told["netns"],
        told["sent_bytes"],
        told["received_bytes"],
        End(told["src"], int.from_bytes(told["sport"], "big")),
        End(told["dst"], int.from_bytes(told["dport"], "big")),
        End(told["outer"], int.from_bytes(told["outer_port"], "big")),
        told["proto"],
        Kind(told["kind"]),
        told["pid"],
        told["error"],
        told["service"],
        told["ifindex"],
        told["cpu"],
        told["sequence"],
        told["length"],
        told["srtt_us"] / 8,
        told["tries"],
        bool(told["last"]),
        told["tcp_flags"],
        told["old_state"],
        told["new_state"],
        bool(told["stage"]),
        Shape(told["shape"]),
        told["icmp_type"],
        told["name"].split(b"\0")[0].decode("utf-8", "replace"),
    )


def protocol_name(number: int) -> str:
    """TCP, UDP or SCTP; a number for others."""
    try:
        return model.Protocol(number).name
    except ValueError:
        return str(number)


def flag_names(flags: int) -> str:
    """The flags of a TCP segment that say what it is for, in words."""
    names = [name for bit, name in _TCP_FLAGS if flags & bit]
    return "-".join(names)


def icmp_name(number: int) -> str:
    """What an ICMP error says, of either family: their numbers do not meet."""
    return _ICMP_ERRORS.get(number, f"ICMP error {number}")


_ICMP_ERRORS: typing.Final = {
    1: "ICMPv6 unreachable",
    2: "ICMPv6 packet too big",
    3: "ICMP unreachable",  # of IPv6: time exceeded
    4: "ICMP source quench",
    5: "ICMP redirect",
    11: "ICMP time exceeded",
    12: "ICMP parameter problem",
}


def error_name(number: int) -> str:
    """The symbolic name of an errno."""
    return errno.errorcode.get(number, str(number))
