"""Flows are moved to a larger table while some devices have these programs and some have those.

What happens between two steps, on a real node, is made to happen here: each step of the way is a moment at
which flows begin, go on and end, their packets coming in by the one programs and their answers leaving by the
others.
"""

import collections
import collections.abc
import itertools
import os
import typing

import pytest

from lbproxy import abi
from lbproxy.core import tables
from lbproxy.kernel import grace, libbpf, map_rows, moving
from tests.packets import bench, harness
from tests.packets.bench import NEXT, Bench
from tests.packets.packets import ACK, FIN, SYN, Side, frame, ip, tcp

State = tables.FlowState
OPEN = State.REPLIED | State.ASSURED


class Grown:
    """A larger table of flows, and programs of three generations: those in between know both tables."""

    def __init__(
        self, made: harness.Harness, fd: int, between: dict[str, int], after: dict[str, int]
    ) -> None:
        self.made, self.fd = made, fd
        self.before, self.between, self.after = dict(made.programs), between, after
        self.moving = moving.Moving(made.fds["flows"], fd, made.fds["handover"])

    def serve(self, coming: dict[str, int], leaving: dict[str, int]) -> None:
        """Have the devices these programs, by which way packets go."""
        self.made.programs = {
            name: (leaving if name == "tc_to_any" else coming)[name] for name in self.before
        }

    def rows(self) -> dict[bytes, tables.Flow]:
        return {key: tables.flow(row) for key, row in map_rows.dump(self.fd, libbpf.map_info(self.fd))}

    def states(self) -> list[State]:
        """Of what clients send, where that comes in."""
        return [
            State(row.state) & ~(State.ORIGINAL | State.MASQUERADED)
            for key, row in self.rows().items()
            if not tables.flow_key(key).stage and row.state & State.ORIGINAL
        ]


@pytest.fixture(scope="module")
def programs_of_all(made: harness.Harness) -> collections.abc.Iterator[Grown]:
    spec = abi.MAPS["flows"]
    larger = libbpf.map_create(
        spec.type, spec.name, spec.key_size, spec.value_size, 4 * made.sizes["flows"], spec.flags
    )
    with (
        made.successor("between", flows=larger, flows_before=made.fds["flows"]) as between,
        made.successor("after", flows=larger) as after,
    ):
        yield Grown(made, larger, between, after)
    os.close(larger)


@pytest.fixture
def grown(programs_of_all: Grown, lb: Bench) -> collections.abc.Iterator[Grown]:
    for key in programs_of_all.rows():
        map_rows.delete(programs_of_all.fd, key)
    yield programs_of_all
    lb.made.programs = dict(programs_of_all.before)


class Connection:
    """One from outside to a pod of this node, through whatever programs are there for each packet."""

    def __init__(self, made: harness.Harness, side: Side, port: int, *, masqueraded: bool) -> None:
        self.made, self.side, self.port = made, side, port
        self.service = (side.node, 30080) if masqueraded else (side.external_ip, 80)
        self.as_seen = (side.client, port)  # by the backend

    def asks(self, flags: int) -> None:
        sent = frame(ip(self.side.client, self.service[0], tcp(self.port, self.service[1], flags)))
        came = self.made.run("tc_from_outside", sent)
        assert came == (NEXT, frame(ip(self.side.client, self.side.pod, tcp(self.port, 8080, flags))))
        gone = self.made.run("tc_to_any", came.frame, "pod0")
        assert gone.verdict == NEXT
        if self.service[1] == 30080:
            self.as_seen = self.side.node_to_pods, bench.ports(gone)[0]
        assert gone.frame == frame(ip(self.as_seen[0], self.side.pod, tcp(self.as_seen[1], 8080, flags)))

    def is_answered(self, flags: int) -> None:
        sent = frame(ip(self.side.pod, self.as_seen[0], tcp(8080, self.as_seen[1], flags)))
        came = self.made.run("tc_from_inside", sent, "pod0")
        assert came == (NEXT, frame(ip(self.side.pod, self.side.client, tcp(8080, self.port, flags))))
        gone = self.made.run("tc_to_any", came.frame)
        back = frame(ip(self.service[0], self.side.client, tcp(self.service[1], self.port, flags)))
        assert gone == (NEXT, back)

    def begins(self) -> None:
        self.asks(SYN)
        self.is_answered(SYN | ACK)
        self.asks(ACK)

    def goes_on(self) -> None:
        self.asks(ACK)
        self.is_answered(ACK)

    def ends(self) -> None:
        self.asks(FIN | ACK)
        self.is_answered(FIN | ACK)


class Story:
    """At each moment all go on, a connection begins, others get one packet, and one ends and begins anew."""

    def __init__(self, made: harness.Harness, side: Side, *, masqueraded: bool) -> None:
        self._fresh = (
            Connection(made, side, port, masqueraded=masqueraded) for port in itertools.count(40000)
        )
        self.open: list[Connection] = []
        self._slow: list[tuple[Connection, int]] = []  # and how many packets they have had
        self._again = next(self._fresh)

    def goes_on(self) -> None:
        for one in self.open:
            one.goes_on()
        fresh = next(self._fresh)
        fresh.begins()
        self.open.append(fresh)
        self._slow.append((next(self._fresh), 0))
        self._slow = [self._next_packet(*one) for one in self._slow]
        self._again.begins()
        self._again.ends()

    def stops(self) -> list[Connection]:
        """The connections that are open then; one more is closed."""
        while any(had < 3 for _, had in self._slow):
            self._slow = [self._next_packet(*one) for one in self._slow]
        return self.open

    def _next_packet(self, slow: Connection, had: int) -> tuple[Connection, int]:
        if had == 3:
            return slow, had
        (slow.asks, slow.is_answered, slow.asks)[had]((SYN, SYN | ACK, ACK)[had])
        if had == 2:
            self.open.append(slow)
        return slow, had + 1


class Interrupted:
    """The calls of the kernel that `moving` makes, with something that happens before and after each."""

    def __init__(self, happens: collections.abc.Callable[[], None]) -> None:
        self._happens = happens
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> typing.Any:
        real = getattr(grace if name == "wait_for_programs" else map_rows, name)
        if name not in ("wait_for_programs", "update", "batch", "insert_all"):
            return real

        def called(*args: typing.Any) -> typing.Any:
            self.calls.append(name)
            self._happens()
            found = real(*args)
            self._happens()
            return found

        return called


@pytest.mark.parametrize("masqueraded", [False, True], ids=["kept", "masqueraded"])
def test_no_flow_is_lost_on_the_way_whenever_it_begins(
    lb: Bench, side: Side, grown: Grown, masqueraded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lb.service(side.pod, external_local=not masqueraded)
    story = Story(lb.made, side, masqueraded=masqueraded)
    story.goes_on()
    grown.moving.begin()
    story.goes_on()
    for coming, leaving in ((grown.between, grown.before), (grown.before, grown.between)):
        grown.serve(coming, leaving)
        story.goes_on()
    grown.serve(grown.between, grown.between)
    story.goes_on()
    with monkeypatch.context() as patch:
        step_by_step = Interrupted(story.goes_on)
        patch.setattr(moving, "map_rows", step_by_step)
        patch.setattr(moving, "grace", step_by_step)
        grown.moving.end()
    # Some begin while others are moved, and are looked at again.
    assert {"update", "batch", "insert_all", "wait_for_programs"} == set(step_by_step.calls)
    story.goes_on()
    for coming, leaving in ((grown.after, grown.between), (grown.between, grown.after)):
        grown.serve(coming, leaving)
        story.goes_on()
    grown.serve(grown.after, grown.after)
    still_open = story.stops()
    assert len(still_open) > 30
    for one in still_open:
        one.goes_on()
    found = collections.Counter(grown.states())
    assert found == {OPEN: len(still_open), OPEN | State.FIN | State.PEER_FIN: 1}
    assert lb.made.counted() == {}


# --- a row that a program has found where it was, just before its copy was there ---


def moved(grown: Grown, patch: pytest.MonkeyPatch, **meanwhile: collections.abc.Callable[[], None]) -> None:
    """Move all, and have something happen right after a call of that name."""
    grown.moving.begin()
    grown.serve(grown.between, grown.between)
    real = Interrupted(lambda: None)

    class Meanwhile:
        def __getattr__(self, name: str) -> typing.Any:
            call = getattr(real, name)

            def called(*args: typing.Any) -> typing.Any:
                found = call(*args)
                if name in meanwhile:
                    meanwhile.pop(name)()
                return found

            return called if name in ("batch", "insert_all") else call

    with patch.context() as patched:
        patched.setattr(moving, "map_rows", Meanwhile())
        grown.moving.end()
    assert not meanwhile


def the_row(lb: Bench) -> tuple[tables.FlowKey, tables.Flow]:
    [found] = [(key, row) for key, row in lb.flows().items() if not key.stage]
    return found


@pytest.mark.parametrize("touched", [False, True], ids=["alone", "beside its copy"])
def test_what_is_done_to_the_original_is_done_to_the_copy(
    lb: Bench, side: Side, grown: Grown, touched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lb.service(side.pod, external_local=True)
    connection = Connection(lb.made, side, 40000, masqueraded=False)
    connection.begins()
    key, row = the_row(lb)

    def late() -> None:
        lb.made.put_flow(key, row._replace(state=row.state | State.FIN))
        if touched:  # by a program that has found the copy
            map_rows.update(grown.fd, key.pack(), row._replace(seen=row.seen + 1).pack())

    moved(grown, monkeypatch, insert_all=late)
    expected = row._replace(state=row.state | State.FIN, seen=row.seen + touched)
    assert grown.rows()[key.pack()] == expected


def test_one_that_is_forgotten_before_its_copy_is_there_stays_so(
    lb: Bench, side: Side, grown: Grown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client talks to the backend itself, from the port of a connection that was closed."""
    lb.service(side.pod, external_local=True)
    connection = Connection(lb.made, side, 40000, masqueraded=False)
    connection.begins()
    connection.ends()

    def directly() -> None:
        answer = frame(ip(side.pod, side.client, tcp(8080, 40000, SYN | ACK)))
        assert lb.made.run("tc_to_any", answer) == (NEXT, answer)

    moved(grown, monkeypatch, batch=directly)
    assert [tables.flow_key(key).stage for key in grown.rows()] == [0]
    directly()


def test_a_flow_that_begins_anew_is_not_closed_by_what_was_there(
    lb: Bench, side: Side, grown: Grown, monkeypatch: pytest.MonkeyPatch
) -> None:
    lb.service(side.pod, external_local=True)
    connection = Connection(lb.made, side, 40000, masqueraded=False)
    connection.begins()
    key, row = the_row(lb)

    def anew() -> None:
        lb.made.put_flow(key, row._replace(state=row.state | State.RESET))
        map_rows.delete(grown.fd, key.pack())
        connection.asks(SYN)

    moved(grown, monkeypatch, insert_all=anew)
    connection.is_answered(SYN | ACK)
    connection.asks(ACK)
    assert grown.states() == [OPEN]


def test_a_flood_has_half_of_what_is_there(lb: Bench, side: Side, grown: Grown) -> None:
    """The same code on tables of another size."""
    lb.service(side.pod, external_local=True)
    rows = lb.made.sizes["flows"]
    for programs, most in ((grown.before, rows // 2), (grown.after, 2 * rows)):
        grown.serve(programs, programs)
        for unassured, aside in ((most - 2, False), (most, True)):
            lb.made.unassured[0] = unassured
            before = len(lb.made.flows("flows_new"))
            Connection(lb.made, side, 41000 + unassured, masqueraded=False).asks(SYN)
            assert (len(lb.made.flows("flows_new")) > before) is aside
