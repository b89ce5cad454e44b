"""What the agent writes down for the read-side commands, and that half a document is none."""

import typing

import hypothesis
import hypothesis.strategies as st

from lbproxy import noting
from lbproxy.core import addresses, events, model, notes, probing, topology

PORT = model.PortKey(model.ServiceName("shop", "web"), "http", model.Protocol.TCP, model.Family.IPV4)
SERVICE = events.ObjectName("shop", "web")


def trouble(number: int = 1, reason: str = "no answer") -> probing.Trouble:
    address = addresses.parse(f"10.244.{number >> 8}.{number & 255}")
    assert address is not None
    return probing.Trouble(probing.User(PORT, topology.Place(address, 80)), False, 1, 2, reason, 40.4)


def encoded(
    troubles: typing.Sequence[probing.Trouble] = (),
    asked: typing.Sequence[tuple[model.ServiceName, typing.Mapping[str, str]]] = (),
    rejected: typing.Sequence[tuple[tuple[events.Kind, events.ObjectName], str]] = (),
    mistakes: typing.Sequence[tuple[model.ServiceName, str]] = (),
    spared: typing.Sequence[tuple[probing.User, str]] = (),
    unserved: typing.Sequence[str] = (),
) -> bytes:
    known = notes.Known("", rejected, troubles, mistakes, spared, asked, unserved)
    return notes.encode(known, lambda at_s: at_s + 1000)


def test_what_is_written_is_read() -> None:
    row = encoded(
        [trouble()],
        [(PORT.service, {"http": "tcp every 5s", "metrics": "http:/ every 5s"})],
        [((events.Kind.SERVICE, SERVICE), "no ports")],
        [(PORT.service, "not understood")],
        [(trouble(2).user, "loopback")],
        ["no uplink"],
    )
    assert notes.decode(row.ljust(notes.MOST_BYTES, b"\0")) == notes.Notes(
        asked=(
            notes.Asked("shop", "web", "http", "tcp every 5s"),
            notes.Asked("shop", "web", "metrics", "http:/ every 5s"),
        ),
        troubles=(notes.Trouble("shop", "web", "http", 6, "10.244.0.1", 80, False, 1, 2, "no answer", 1040),),
        rejected=(notes.Rejected("Service", "shop/web", "no ports"),),
        mistakes=(notes.Mistake("shop", "web", "not understood"),),
        spared=(notes.Spared("shop", "web", "http", 6, "10.244.0.2", 80, "loopback"),),
        unserved=("no uplink",),
    )
    assert notes.decode(bytes(notes.MOST_BYTES)) is None


def test_what_does_not_fit_is_counted() -> None:
    row = encoded([trouble(number, "x" * 1000) for number in range(1, 2000)])
    found = notes.decode(row)
    assert len(row) <= notes.MOST_BYTES
    assert found is not None
    assert len(found.troubles) + found.left_out == 1999
    assert 200 < len(found.troubles) < 1999


def test_no_kind_of_entry_leaves_the_others_without_room_and_what_fits_is_all_that_is_made() -> None:
    """A loop that has other things to do makes them, every second."""
    made = 0

    def to_unix(at_s: float) -> float:
        nonlocal made
        made += 1
        return at_s

    many = range(10_000)
    names = [model.ServiceName("shop", f"web-{number}") for number in many]
    known = notes.Known(
        "",
        [((events.Kind.SERVICE, events.ObjectName(*name)), "no ports") for name in names],
        [trouble(number) for number in many],
        [(name, "not understood") for name in names],
        [(trouble(number).user, "loopback") for number in many],
        [(name, {"http": "tcp every 5s", "grpc": "grpc every 5s"}) for name in names],
    )
    row = notes.encode(known, to_unix)
    found = notes.decode(row)
    assert found is not None
    kinds = [found.rejected, found.troubles, found.mistakes, found.spared, found.asked]
    assert min(map(len, kinds)) > 100
    assert len(found.troubles) > 500
    assert sum(map(len, kinds)) + found.left_out == 6 * len(many)
    assert made == len(found.troubles) + 1
    assert len(row) <= notes.MOST_BYTES
    # One that is alone has nearly all of it.
    alone = notes.decode(notes.encode(notes.Known(asked=known.asked), to_unix))
    assert alone is not None
    assert len(alone.asked) > 2 * len(found.asked)


def test_what_takes_long_is_done_less_often() -> None:
    assert noting.pause_s(0.001) == 1.0
    assert noting.pause_s(0.05) == 5.0


@hypothesis.given(st.integers(0, 200), st.integers(1, 60))
def test_a_row_that_is_half_written_is_no_document(at: int, few: int) -> None:
    before, after = encoded([trouble(n) for n in range(few)]), encoded([trouble(n + 7) for n in range(few)])
    size = max(len(before), len(after))
    before, after = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    torn = after[:at] + before[at:]
    assert notes.decode(torn) in (None, notes.decode(before), notes.decode(after))
