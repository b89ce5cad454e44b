"""The arguments of `lbproxy trace`."""

import argparse
import typing

from lbproxy.config import config, kinds
from lbproxy.core import listing, model

DESCRIPTION = """\
Follow connections live: what was dialled, which backend was chosen, what each packet was turned
into at which device, and what became of it in the end. Without --from, --to or --service, every
connection to any service.

It changes nothing and refuses nothing. Its programs are attached beside lbproxy's for as long as it
runs, and go with it, however it ends; while nobody traces there is nothing to pay. Meanwhile each packet
at a device of lbproxy's costs some 0.1 to 0.2 microseconds more, also one that is not followed. It needs
root (or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON), and Linux 6.1; packets need 6.6.

A line is one step: the seconds since the first, the number of the connection, where it was seen, and what:
  socket    connect(), sendmsg() and what TCP made of it, in the cgroup that lbproxy serves
  DEV in    a packet that comes in at a device, before lbproxy, and what lbproxy made of it
  DEV out   likewise, a packet that leaves
Of a connection's packets those are shown that begin or end something (SYN, FIN, RST), and else the first
of each kind; --every-packet shows all. At the end there is a verdict for each connection:
  balanced    led to a backend                 refused     told at once that nobody is there
  dropped     its packets went no further      untouched   no service's: left as it is
  unanswered  led to a backend, or left as it is, and nobody answered
A reason is what `lbproxy explain` says of it as the tables are at the end.

Not seen: connections that were made at a socket before it began; packets that XDP sends on; later fragments;
IPv6 packets with extension headers; devices that come later.
"""

EXAMPLES = """\
examples:
  lbproxy trace --service shop/cart                     who connects to it, and where they are led
  lbproxy trace --to 10.96.0.10:53/UDP --for 10         DNS, for ten seconds
  lbproxy trace --from 198.51.100.7 --to 192.0.2.10:30080   a client outside, at a NodePort
  lbproxy trace --from 10.244.1.5 -o json --count 20    what a pod of this node does, as JSON lines
"""

_MOST_SECONDS: typing.Final = 3600.0
_MOST_EVENTS: typing.Final = 1_000_000


class TracedDestination(typing.NamedTuple):
    """Where connections go that are followed; port and protocol are None for any."""

    address: config.IPAddress
    port: int | None
    protocol: model.Protocol | None

    def __str__(self) -> str:
        place = str(self.address)
        if self.port is not None:
            place = str(config.ListenAddress(place, self.port))
        return f"{place}/{self.protocol.name}" if self.protocol else place


def parse_destination(text: str) -> TracedDestination:
    """Read ADDRESS[:PORT][/PROTOCOL]; an IPv6 address with a port is in brackets. Raises ValueError."""
    place, slash, protocol = text.partition("/")
    try:
        kind = model.Protocol[protocol.upper()] if slash else None
        try:
            return TracedDestination(kinds.parse_ip(place.removeprefix("[").removesuffix("]")), None, kind)
        except ValueError:
            found = kinds.parse_destination(place)
            return TracedDestination(found.address, found.port, kind)
    except (ValueError, KeyError):
        raise ValueError(
            f"{text!r} is not an ADDRESS[:PORT][/PROTOCOL] like 10.96.0.1, 10.96.0.1:443 or [fd00::1]:53/UDP"
            + kinds.mistaken(place)
        ) from None


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add what chooses and what bounds."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "--from",
        dest="source",
        type=_source,
        metavar="ADDRESS|node",
        help="only what this address sends: a pod's, a client's; or the node's own processes",
    )
    parser.add_argument(
        "--to",
        dest="destination",
        type=_destination,
        metavar="ADDRESS[:PORT][/PROTO]",
        help="only what goes there: a service's address, a NodePort, a backend, or anything else",
    )
    parser.add_argument(
        "--service",
        type=_service,
        metavar="[NS/]NAME[:PORT]",
        help="only what goes to this Service, or to one of its ports",
    )
    parser.add_argument(
        "--count", type=_count, default=100, metavar="N", help="end after so many lines (default 100)"
    )
    parser.add_argument(
        "--for",
        dest="seconds",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="end after so many seconds (default 30)",
    )
    parser.add_argument(
        "--rate",
        type=_count,
        default=1000,
        metavar="N",
        help="events a second that each CPU may tell of, the others are counted as lost (default 1000)",
    )
    parser.add_argument("--every-packet", action="store_true", help="every packet of what is followed")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how to show it")


def _source(text: str) -> str:
    if text == "node":
        return text
    try:
        return str(kinds.parse_ip(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an IP address nor node") from None


def _service(text: str) -> str:
    name, colon, port = text.partition(":")
    try:
        listing.named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if colon and not port:
        raise argparse.ArgumentTypeError(f"{text!r} has no PORT after the colon")
    return text


def _destination(text: str) -> TracedDestination:
    try:
        return parse_destination(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= _MOST_EVENTS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {_MOST_EVENTS}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0 < seconds <= _MOST_SECONDS:
        return seconds
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a number of seconds above 0 and up to {_MOST_SECONDS:g}"
    )
