"""Rows of the flow table that have had their time. A slow, plain model says which those are."""

import asyncio
import collections
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi, flow_table
from lbproxy.core import flows, tables
from lbproxy.kernel import fake
from tests import polling, serving

NOW = 100_000
TCP, UDP, SCTP = 6, 17, 132
SETTINGS = tables.NO_SETTINGS._replace(
    tcp_new_ticks=60,
    tcp_established_ticks=86_400,
    tcp_half_closed_ticks=3_600,
    tcp_closed_ticks=10,
    udp_new_ticks=30,
    udp_stream_ticks=120,
    sctp_new_ticks=31,
    sctp_established_ticks=210,
)
State = tables.FlowState
Row = tuple[bytes, bytes]

timeouts = pytest.mark.parametrize(
    ("proto", "state", "ticks"),
    [
        (TCP, State(0), 60),
        (TCP, State.REPLIED, 60),
        (TCP, State.ASSURED, 86_400),
        (TCP, State.ASSURED | State.FIN, 3_600),
        (TCP, State.ASSURED | State.PEER_FIN, 3_600),
        (TCP, State.FIN, 3_600),
        (TCP, State.ASSURED | State.FIN | State.PEER_FIN, 10),
        (TCP, State.ASSURED | State.RESET, 10),
        (TCP, State.RESET, 10),
        (UDP, State.REPLIED, 30),
        (UDP, State.ASSURED | State.REPLIED, 120),
        (SCTP, State.ORIGINAL, 31),
        (SCTP, State.ASSURED, 210),
    ],
)


def row(number: int, proto: int, state: int, idle: int, stage: int = 0) -> Row:
    address = number.to_bytes(16, "big")
    key = tables.FlowKey(address, address, b"\x01\x02", b"\x03\x04", proto, stage).pack()
    return key, tables.Flow(address, b"\x01\x02", b"\x03\x04", 1, NOW - idle, bytes(3), state).pack()


def sweep(rows: list[Row], settings: tables.Settings = SETTINGS) -> tuple[list[bytes], flows.Counts]:
    counts = flows.Counts()
    keys, values = b"".join(key for key, _ in rows), b"".join(value for _, value in rows)
    return flows.sweep(keys, values, flows.Deadlines(settings, NOW), counts), counts


@timeouts
def test_a_row_stays_for_its_timeout_and_the_margin(proto: int, state: State, ticks: int) -> None:
    last = row(1, proto, state, ticks + flows.MARGIN_TICKS)
    gone = row(2, proto, state, ticks + flows.MARGIN_TICKS + 1)
    assert sweep([last, gone])[0] == [gone[0]]


@timeouts
def test_nothing_expires_before_anyone_has_said_when(proto: int, state: State, ticks: int) -> None:
    assert sweep([row(1, proto, state, NOW)], tables.NO_SETTINGS)[0] == []


def test_a_row_seen_after_the_clock_was_read_stays() -> None:
    assert sweep([row(1, UDP, 0, -5)])[0] == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from((TCP, UDP, SCTP)),
            st.integers(0, 63),
            st.sampled_from((0, 5, 12, 13, 32, 33, 34, 62, 63, 122, 123, 213, 3_602, 3_603, 86_402, 86_403)),
            st.integers(0, 1),
        ),
        max_size=50,
    )
)
def test_rows_expire_and_are_counted_as_the_plain_model_says(of: list[tuple[int, int, int, int]]) -> None:
    rows = [row(number, *fields) for number, fields in enumerate(of)]
    expired, counts = sweep(rows)
    kept: list[tuple[int, int, int, int]] = []
    gone: list[bytes] = []
    for (key, _), (proto, state, idle, stage) in zip(rows, of, strict=True):
        if idle > flows.timeout_ticks(SETTINGS, proto, state) + flows.MARGIN_TICKS:
            gone.append(key)
        else:
            kept.append((proto, state, idle, stage))
    assert expired == gone
    assert counts.rows == len(kept)
    assert counts.unassured == sum(not state & State.ASSURED for _, state, _, _ in kept)
    assert +counts.flows == collections.Counter(
        flows.Flows(proto, bool(state & State.ASSURED))
        for proto, state, _, stage in kept
        if stage == 0 and state & State.ORIGINAL
    )


@given(st.permutations(range(12)), st.integers(1, 12))
def test_the_batches_of_a_table_do_not_matter(order: list[int], size: int) -> None:
    kinds = [row(n, UDP, State.ORIGINAL | (State.ASSURED if n % 2 else 0), 40 if n % 3 else 0) for n in order]
    whole_gone, whole = sweep(kinds)
    counts, gone = flows.Counts(), list[bytes]()
    for first in range(0, len(kinds), size):
        batch = kinds[first : first + size]
        packed = b"".join(key for key, _ in batch), b"".join(value for _, value in batch)
        gone += flows.sweep(*packed, flows.Deadlines(SETTINGS, NOW), counts)
    assert gone == whole_gone
    assert (counts.rows, counts.unassured) == (whole.rows, whole.unassured)
    assert +counts.flows == +whole.flows


# --- the table as a whole ---


def table_of(*rows: Row, unassured: int = 0) -> tuple[fake.FakeMaps, flow_table.FlowTable]:
    kernel = fake.FakeMaps(serving.SIZES)
    kernel.apply([tables.Put(tables.Table.FLOWS, *one) for one in rows])
    kernel.apply([tables.Put(tables.Table.SETTINGS, tables.row_key(0), SETTINGS.pack())])
    count_to(kernel, unassured)
    return kernel, flow_table.FlowTable(kernel, lambda: NOW)


def count_to(kernel: fake.FakeMaps, unassured: int) -> None:
    number = unassured.to_bytes(8, tables.BYTE_ORDER, signed=True)
    kernel.apply([tables.Put(tables.Table.UNASSURED, tables.row_key(0), number)])


def unassured(kernel: fake.FakeMaps) -> int:
    found = kernel.row(tables.Table.UNASSURED, tables.row_key(0))
    assert found is not None
    return int.from_bytes(found, tables.BYTE_ORDER)


def test_a_look_removes_what_has_expired_and_writes_the_count_of_the_unassured() -> None:
    old, new, assured = row(1, UDP, 0, 90), row(2, UDP, 0, 3), row(3, UDP, State.ASSURED, 90)
    kernel, looked = table_of(old, new, assured, unassured=9)
    assert looked.look() == 1
    assert {key for key, _ in kernel.rows("flows")} == {new[0], assured[0]}
    assert unassured(kernel) == 1
    assert looked.counts.rows == 2


def test_a_look_may_leave_some_for_later_which_still_count() -> None:
    kernel, looked = table_of(*(row(number, UDP, 0, 90) for number in range(5)))
    assert looked.look(3) == 3
    assert looked.counts.rows == unassured(kernel) == len(list(kernel.rows("flows"))) == 2
    assert looked.look(3) == 2
    assert looked.counts.rows == unassured(kernel) == 0


def test_what_became_another_row_meanwhile_stays() -> None:
    old = row(1, UDP, 0, 90)
    kernel, looked = table_of(old)
    deadlines = flows.Deadlines(SETTINGS, NOW)
    for number, (state, idle, gone) in enumerate([(0, 32, 0), (0, 33, 1), (State.ASSURED, 90, 0)], 2):
        key, value = row(number, UDP, state, idle)
        kernel.apply([tables.Put(tables.Table.FLOWS, key, value)])
        assert kernel.take("flows", [key], deadlines.fresh) == gone
    assert looked.look() == 1


HALF = serving.SIZES["flows"] // 2


@pytest.mark.parametrize(
    ("unanswered", "found", "most"),
    [
        (0, 3, flow_table._QUIET_ROWS),
        (0, HALF + 3, flow_table._QUIET_ROWS + 3),
        (serving.SIZES["flows"], 3, None),
    ],
)
async def test_the_more_crowded_a_table_the_more_is_removed_at_once(
    unanswered: int, found: int, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, looked = table_of(unassured=unanswered)
    looked.counts.rows = found
    asked: list[int | None] = []

    def look(most: int | None) -> int:
        asked.append(most)
        return 0

    monkeypatch.setattr(looked, "look", look)
    running = asyncio.create_task(looked.run())
    await polling.eventually_async(lambda: bool(asked))
    running.cancel()
    assert asked == [most]


async def test_a_long_look_is_followed_by_a_longer_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_table, "_INTERVAL_S", 0.001)
    monkeypatch.setattr(flow_table, "_QUIET_PAUSES", 1_000_000.0)
    _, looked = table_of()
    looks = 0

    def look(_most: int | None) -> int:
        nonlocal looks
        looks += 1
        return 0

    monkeypatch.setattr(looked, "look", look)
    running = asyncio.create_task(looked.run())
    await polling.eventually_async(lambda: looks)
    await asyncio.sleep(0.2)
    running.cancel()
    assert looks == 1


async def test_waiting_for_a_turn_is_no_long_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_table, "_INTERVAL_S", 0.001)
    _, looked = table_of()
    looks = 0

    def look(_most: int | None) -> int:
        nonlocal looks
        looks += 1
        time.sleep(0.2)  # as where others have all processors: by the clock, 40 s of pause
        return 0

    monkeypatch.setattr(looked, "look", look)
    running = asyncio.create_task(looked.run())
    await polling.eventually_async(lambda: looks >= 2, 20)
    running.cancel()


@pytest.mark.parametrize("counted", [-3, 0, 5])
def test_the_count_is_put_right_whatever_the_programs_made_of_it(counted: int) -> None:
    kernel, looked = table_of(row(1, UDP, 0, 3), unassured=counted)
    assert looked.look() == 0
    assert unassured(kernel) == 1
    kernel.log.clear()
    assert looked.look() == 0
    assert kernel.log == []


def set_aside(kernel: fake.FakeMaps, rows: int) -> None:
    """So many went to `flows_new`, say the programs."""
    key = tables.row_key(abi.constant("COUNTER_FLOWS_FULL"))
    kernel._rows["counters"][key] = rows.to_bytes(8, tables.BYTE_ORDER)


CLOSED = State.ASSURED | State.FIN | State.PEER_FIN


@pytest.mark.parametrize(
    ("state", "counted", "sent_aside", "crowded"),
    [
        (State(0), serving.SIZES["flows"] // 4, 0, True),
        (State(0), 3, 0, False),
        (CLOSED, serving.SIZES["flows"] // 2 + 1, 0, True),
        (CLOSED, serving.SIZES["flows"] // 2, 0, False),
        (CLOSED, 3, 1, True),
    ],
)
async def test_a_crowded_table_is_looked_at_sooner(
    state: State, counted: int, sent_aside: int, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of many unanswered flows, of many closed ones, or one that was full since it was looked at last."""
    monkeypatch.setattr(flow_table, "_POLL_S", 0.001)
    monkeypatch.setattr(flow_table, "_CROWDED_INTERVAL_S", 0.01)
    kernel, looked = table_of(*(row(number, TCP, state, 0) for number in range(counted)))
    set_aside(kernel, 7)
    looks = 0

    def look(most: int | None) -> int:
        nonlocal looks
        looks += 1
        expired = flow_table.FlowTable.look(looked, most)
        set_aside(kernel, 7 + looks * sent_aside)
        return expired

    monkeypatch.setattr(looked, "look", look)
    running = asyncio.create_task(looked.run())
    await polling.eventually_async(lambda: looks >= (3 if crowded else 1))
    if not crowded:
        await asyncio.sleep(0.3)
        assert looks == 1
    running.cancel()


class Broken(fake.FakeMaps):
    tried = 0

    def batches(self, table: str, rows: int) -> Iterator[tuple[bytes, bytes]]:
        self.tried += 1
        raise OSError(5, "no such luck")


async def test_a_table_that_cannot_be_read_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flow_table, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(flow_table, "_CROWDED_INTERVAL_S", 0.01)
    kernel = Broken(serving.SIZES)
    running = asyncio.create_task(flow_table.FlowTable(kernel).run())
    await polling.eventually_async(lambda: kernel.tried >= 3)
    assert not running.done()
    running.cancel()
    assert [record.message for record in caplog.records] == [
        "cannot look after the flow table: [Errno 5] no such luck"
    ]
