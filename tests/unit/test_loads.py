import collections

from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import flows, loads, tables

PLACE = {7: b"\x0a" * 16 + b"\x1f\x90", 8: b"\x0b" * 16 + b"\x1f\x90"}


def record(backend: int, cookie: int = 1, place: bytes | None = None) -> bytes:
    where = PLACE.get(backend, bytes(18)) if place is None else place
    pack = abi.LAYOUTS["socket_record"].pack
    return pack(cookie, bytes(16), where[:16], b"\0\x50", where[16:], backend, 0)


def test_sockets_are_counted_by_the_backend_that_they_name() -> None:
    records = [record(7), record(7, 2), record(8, 3), record(9, 4), record(0, 5), record(7, 0)]
    # The id went to another backend since.
    records.append(record(8, 6, place=PLACE[7]))
    assert loads.of_sockets(records, PLACE) == {7: 2, 8: 1}
    assert loads.of_sockets(records, {}) == {}


ORIGINAL, REPLIED = tables.FlowState.ORIGINAL, tables.FlowState.REPLIED
CLOSED = tables.FlowState.FIN | tables.FlowState.PEER_FIN
NOW = 1000


def flow(
    backend: int, state: int = ORIGINAL, *, stage: int = 0, seen: int = NOW, place: bytes = b""
) -> tuple[bytes, bytes]:
    where = place or PLACE.get(backend, bytes(18))
    key = tables.FlowKey(bytes(16), bytes(16), b"\0\1", b"\0\2", 6, stage).pack()
    return key, tables.Flow(where[:16], b"\0\1", where[16:], backend, seen, b"\0\0\0", state).pack()


def test_flows_are_counted_by_the_row_of_their_first_direction() -> None:
    rows = [
        flow(7),
        flow(7, ORIGINAL | REPLIED | tables.FlowState.FIN),
        flow(8, ORIGINAL | tables.FlowState.MASQUERADED),
        flow(7, REPLIED),
        flow(7, ORIGINAL, stage=1),
        flow(7, ORIGINAL | CLOSED),
        flow(7, ORIGINAL | tables.FlowState.RESET),
        flow(7, ORIGINAL | REPLIED | tables.FlowState.TUNNEL),
        flow(7, seen=NOW - 500),
        flow(8, place=PLACE[7]),
        flow(9),
        flow(0),
    ]
    timeouts = tables.NO_SETTINGS._replace(
        tcp_new_ticks=60, tcp_half_closed_ticks=60, tcp_closed_ticks=60, tcp_established_ticks=600
    )
    keys, values = (b"".join(column) for column in zip(*rows, strict=True))
    deadlines = flows.Deadlines(timeouts, NOW)
    assert flows.open_to(keys, values, deadlines, PLACE) == {7: 2, 8: 1}
    assert flows.open_to(b"", b"", deadlines, PLACE) == {}


def test_counts_go_round() -> None:
    load = loads.load((2**32 - 1).to_bytes(4, "little") + (3).to_bytes(4, "little"), None)
    assert load.open == -4
    assert load._replace(correction=6).open == 2
    assert loads.load(None, None).open == 0


EVENTS = st.lists(st.tuples(st.sampled_from((7, 8)), st.sampled_from((1, -1))), max_size=30)


@given(
    st.dictionaries(st.sampled_from((7, 8)), st.integers(0, 20)),
    st.dictionaries(st.sampled_from((7, 8)), st.integers(-5, 5)),
    EVENTS,
    st.randoms(use_true_random=False),
)
def test_what_is_right_stays_and_what_is_wrong_is_put_right_where_nothing_happens(
    truth: dict[int, int], drift: dict[int, int], events: list[tuple[int, int]], draw: object
) -> None:
    """A count is begun, things open and close while it goes on, and each is seen or not."""
    opened: collections.Counter[int] = collections.Counter()
    closed: collections.Counter[int] = collections.Counter()
    before = {n: loads.Load(truth.get(n, 0) + drift.get(n, 0), 0, 0) for n in (7, 8)}
    found = dict(truth)
    for number, change in events:
        if change > 0:
            opened[number] += 1
            found[number] = found.get(number, 0) + draw.randint(0, 1)  # type: ignore[attr-defined]
        elif closed[number] < truth.get(number, 0):
            closed[number] += 1
            found[number] = found[number] - draw.randint(0, 1)  # type: ignore[attr-defined]
    after = {
        n: loads.Load((before[n].opened + opened[n]) % 2**32, closed[n], before[n].correction) for n in (7, 8)
    }
    corrected = loads.corrections(before, after, found)
    for number in (7, 8):
        right = truth.get(number, 0) + opened[number] - closed[number]
        now = after[number]._replace(correction=corrected.get(number, 0)).open
        off = now - right
        # None is worse for having been looked at, nor further off than by what happened meanwhile.
        assert abs(off) <= abs(drift.get(number, 0))
        assert abs(off) <= opened[number] + closed[number]
        if not drift.get(number):
            assert number not in corrected


def test_a_backend_that_is_cleared_meanwhile_is_left_alone() -> None:
    before = {7: loads.Load(5, 0, 3), 8: loads.Load(5, 0, 0)}
    after = {7: loads.Load(0, 0, 0), 8: loads.Load(5, 0, 0), 9: loads.Load(1, 0, 0)}
    assert loads.corrections(before, after, {8: 4}) == {8: 2**32 - 1}
