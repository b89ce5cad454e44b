"""What the agent writes down for the read-side commands, and that half a document is none."""

import typing

import hypothesis
import hypothesis.strategies as st

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
) -> bytes:
    return notes.encode("", asked, troubles, rejected, lambda at_s: at_s + 1000)


def test_what_is_written_is_read() -> None:
    row = encoded(
        [trouble()],
        [(PORT.service, {"http": "tcp every 5s", "metrics": "http:/ every 5s"})],
        [((events.Kind.SERVICE, SERVICE), "no ports")],
    )
    assert notes.decode(row.ljust(notes.MOST_BYTES, b"\0")) == notes.Notes(
        asked=(
            notes.Asked("shop", "web", "http", "tcp every 5s"),
            notes.Asked("shop", "web", "metrics", "http:/ every 5s"),
        ),
        troubles=(notes.Trouble("shop", "web", "http", 6, "10.244.0.1", 80, False, 1, 2, "no answer", 1040),),
        rejected=(notes.Rejected("Service", "shop/web", "no ports"),),
    )
    assert notes.decode(bytes(notes.MOST_BYTES)) is None


def test_what_does_not_fit_is_counted() -> None:
    row = encoded([trouble(number, "x" * 1000) for number in range(1, 2000)])
    found = notes.decode(row)
    assert len(row) <= notes.MOST_BYTES
    assert found is not None
    assert len(found.troubles) + found.left_out == 1999
    assert 200 < len(found.troubles) < 1999


@hypothesis.given(st.integers(0, 200), st.integers(1, 60))
def test_a_row_that_is_half_written_is_no_document(at: int, few: int) -> None:
    before, after = encoded([trouble(n) for n in range(few)]), encoded([trouble(n + 7) for n in range(few)])
    size = max(len(before), len(after))
    before, after = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    torn = after[:at] + before[at:]
    assert notes.decode(torn) in (None, notes.decode(before), notes.decode(after))
