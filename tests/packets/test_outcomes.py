"""What packets tell of how connections to a backend fare: of each end that a connection may come to."""

import contextlib
import mmap
import os
import signal
import time

import pytest

from lbproxy import abi
from lbproxy.core import model, outcomes, tables
from tests import counting
from tests.packets import harness
from tests.packets.bench import NEXT, REDIRECT, XDP, Bench, ports
from tests.packets.packets import ACK, FIN, RST, SYN, Side, frame, icmp, icmp6, ip, tcp, tunnel, udp
from tests.packets.test_flow_state import Connection

State = tables.FlowState
# Of the masqueraded ones in XDP, all packets but the first, as far as both hosts are elsewhere. By DSR
# the node of the backend counts, where packets come out of a tunnel and answers leave.
WAYS = ["kept", "masqueraded", "xdp", "dsr"]
LONG_US, SHORT_US = 1_000_000, 10_000
UNANSWERED_US = abi.constants("flow.h")["LB_UNANSWERED_US"]
OPEN = (("ask", SYN), ("answer", SYN | ACK), ("ask", ACK))


class Masqueraded(Connection):
    """A connection to a backend of another node, which sees this one's address."""

    def __init__(self, lb: Bench, side: Side, *, xdp: bool) -> None:
        super().__init__(lb, side)
        self.mine = 0
        self._xdp = xdp

    def ask(self, flags: int) -> int:
        sent = frame(ip(self.side.client, self.side.external_ip, tcp(self.port, 80, flags)))
        # What has a row. Else, or where it is closed, XDP leaves it to tc.
        if self._xdp and self.mine and self.lb.run(XDP, sent, "up0").verdict != harness.XDP_PASS:
            return NEXT
        gone = self.lb.leaves(self.lb.outside(sent).frame)
        self.mine, _ = ports(gone)
        return gone.verdict

    def answer(self, flags: int) -> int:
        sent = frame(ip(self.side.far_pod, self.side.node, tcp(8080, self.mine, flags)))
        if self._xdp:
            assert self.lb.run(XDP, sent, "up0").verdict != harness.XDP_PASS
            return NEXT
        return self.lb.leaves(self.lb.outside(sent).frame).verdict


class Tunnelled(Connection):
    """A connection that was dialled at another node, which has chosen a backend of this one."""

    def ask(self, flags: int) -> int:
        dialled = ip(self.side.client, self.side.external_ip, tcp(self.port, 80, flags))
        return self.lb.outside(frame(tunnel(self.side.router, self.side.pod, 8080, dialled))).verdict


@pytest.fixture(params=WAYS)
def flow(request: pytest.FixtureRequest, lb: Bench, side: Side) -> Connection:
    if request.param == "kept":
        lb.service(side.pod, external_local=True)
        return Connection(lb, side)
    if request.param == "dsr":
        lb.service(side.pod, mode=model.PacketMode.DSR)
        return Tunnelled(lb, side)
    lb.service(side.far_pod)
    return Masqueraded(lb, side, xdp=request.param == "xdp")


def fared(lb: Bench) -> outcomes.Outcomes:
    rows = list(outcomes.every(lb.made.maps).values())
    assert len(rows) <= 1
    if not rows:
        return outcomes.Outcomes()
    # No socket of this node has had a part in it.
    assert rows[0].node == outcomes.Outcomes()
    return rows[0].elsewhere


def wait(lb: Bench, us: int) -> None:
    """Have every SYN be older by so much."""
    earlier = (us * 1000 >> abi.constant("SYN_SHIFT")) & ~abi.constant("SYN_UNANSWERED")
    for key, packed in list(lb.made.maps.rows("flows")):
        row = tables.flow(packed)
        if tables.flow_key(key).stage and not row.state & State.ORIGINAL:
            lb.made.put_flow(tables.flow_key(key), row._replace(backend=(row.backend - earlier) % 2**32))


Step = tuple[str, int]
STORIES: list[tuple[tuple[Step, ...], dict[str, int]]] = [
    ((("ask", SYN),), {}),
    ((("ask", SYN), ("answer", RST | ACK)), {"refused": 1}),
    ((("ask", SYN), ("answer", RST)), {"refused": 1}),
    ((("ask", SYN), ("answer", RST | ACK), ("answer", RST | ACK)), {"refused": 1}),
    ((("ask", SYN), ("answer", RST | ACK), ("ask", SYN), ("answer", RST | ACK)), {"refused": 2}),
    ((("ask", SYN), ("answer", SYN | ACK)), {"established": 1}),
    ((("ask", SYN), ("answer", SYN | ACK), ("answer", SYN | ACK)), {"established": 1}),
    (OPEN, {"established": 1}),
    ((*OPEN, ("answer", ACK), ("ask", ACK)), {"established": 1}),
    ((*OPEN, ("answer", RST)), {"established": 1, "resets": 1}),
    ((*OPEN, ("answer", RST | ACK), ("answer", RST)), {"established": 1, "resets": 1}),
    ((*OPEN, ("ask", ACK), ("answer", ACK), ("answer", RST | ACK)), {"established": 1, "resets": 1}),
    # Whoever has said goodbye, or has reset it first, has seen to the reset.
    ((*OPEN, ("ask", FIN | ACK), ("answer", RST)), {"established": 1}),
    ((*OPEN, ("answer", FIN | ACK), ("answer", RST)), {"established": 1}),
    ((*OPEN, ("ask", RST), ("answer", RST)), {"established": 1}),
    ((*OPEN, ("ask", FIN | ACK), ("answer", FIN | ACK), ("ask", ACK)), {"established": 1}),
    # The client has not heard that it is open, or did not want it.
    ((("ask", SYN), ("answer", SYN | ACK), ("answer", RST)), {"established": 1}),
    ((("ask", SYN), ("ask", RST)), {}),
    ((("ask", SYN), ("ask", RST), ("answer", RST | ACK)), {}),
    # An answer to an earlier connection of these ports, and the client's to that.
    (
        (("ask", SYN), ("answer", ACK), ("ask", RST), ("ask", SYN), ("answer", SYN | ACK)),
        {"established": 1},
    ),
    # A SYN that is repeated at once was doubled on its way.
    ((("ask", SYN), ("ask", SYN)), {}),
    ((("ask", SYN), ("wait", SHORT_US), ("ask", SYN), ("wait", SHORT_US), ("ask", SYN)), {}),
    ((("ask", SYN), ("wait", LONG_US), ("ask", SYN)), {"unanswered": 1}),
    (
        (("ask", SYN), ("wait", LONG_US), ("ask", SYN), ("wait", 2 * LONG_US), ("ask", SYN)),
        {"unanswered": 1},
    ),
    # It was answered, and the answer lost on its way to the client.
    ((("ask", SYN), ("answer", SYN | ACK), ("wait", LONG_US), ("ask", SYN)), {"established": 1}),
    # As of sockets, how it ends is another thing.
    (
        (("ask", SYN), ("wait", LONG_US), ("ask", SYN), ("answer", RST | ACK)),
        {"unanswered": 1, "refused": 1},
    ),
    (
        (("ask", SYN), ("wait", LONG_US), ("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), ("answer", RST)),
        {"unanswered": 1, "established": 1, "resets": 1},
    ),
]


def told(flow: Connection, story: tuple[Step, ...]) -> outcomes.Outcomes:
    """What a story counts. It is told anew where it took so long that a SYN at once came late."""
    while True:
        before, began_ns = fared(flow.lb), time.monotonic_ns()
        for who, what in story:
            if who == "wait":
                wait(flow.lb, what)
                flow.lb.look()
            else:
                assert getattr(flow, who)(what) == NEXT
        if (time.monotonic_ns() - began_ns) // 1000 < UNANSWERED_US - SHORT_US:
            return fared(flow.lb).since(before)
        flow.port += 1


@pytest.mark.parametrize(("story", "counted"), STORIES)
def test_each_end_counts_as_what_it_is(
    flow: Connection, story: tuple[Step, ...], counted: dict[str, int]
) -> None:
    found = told(flow, story)
    counts = counting.counts_of(found)
    assert counts == {**dict.fromkeys(counts, 0), **counted}
    # Each was answered in less than it took to get here.
    assert bool(found.handshake_us) == bool(found.established)
    assert found.handshake_us < 60_000_000


def test_a_handshake_is_measured_from_the_last_syn(flow: Connection) -> None:
    flow.ask(SYN)
    wait(flow.lb, 500 * LONG_US)
    flow.lb.look()
    flow.ask(SYN)
    wait(flow.lb, LONG_US)
    flow.lb.look()
    flow.answer(SYN | ACK)
    found = fared(flow.lb)
    assert LONG_US <= found.handshake_us < 400 * LONG_US
    assert found.srtt_us == found.handshake_us


def test_a_row_whose_syn_was_not_seen_counts_for_nothing(flow: Connection) -> None:
    """As an earlier version has left it."""
    flow.ask(SYN)
    for key, row in flow.lb.flows().items():
        flow.lb.made.put_flow(key, row)  # which leaves the time out
    flow.ask(SYN)
    flow.answer(RST | ACK)
    assert fared(flow.lb) == outcomes.Outcomes()


NOBODY_LISTENS, ELSEWHERE = {4: (3, 3), 6: (1, 4)}, {4: (3, 1), 6: (1, 3)}


@pytest.mark.parametrize(
    ("story", "kind", "counted"),
    [
        ((("ask", SYN),), NOBODY_LISTENS, {"refused": 1}),
        # Once, whatever the client makes of it.
        ((("ask", SYN), ("error", 0), ("ask", SYN)), NOBODY_LISTENS, {"refused": 1}),
        ((("ask", SYN),), ELSEWHERE, {}),
        (OPEN, NOBODY_LISTENS, {"established": 1}),
        ((("ask", SYN), ("answer", RST | ACK)), NOBODY_LISTENS, {"refused": 1}),
    ],
)
def test_an_error_in_answer_to_a_syn_may_be_a_refusal(
    lb: Bench,
    side: Side,
    story: tuple[Step, ...],
    kind: dict[int, tuple[int, int]],
    counted: dict[str, int],
) -> None:
    lb.service(side.pod, external_local=True)
    flow = Connection(lb, side)
    family, build = (4, icmp) if ":" not in side.pod else (6, icmp6)
    quoted = ip(side.client, side.pod, tcp(flow.port, 8080, SYN))
    error = frame(ip(side.pod, side.client, build(*kind[family], quoted)))
    for who, what in (*story, ("error", 0)):
        if who == "error":
            assert lb.leaves(error).verdict == NEXT
        else:
            assert getattr(flow, who)(what) == NEXT
    found = fared(lb)
    counts = counting.counts_of(found)
    assert counts == {**dict.fromkeys(counts, 0), **counted}


def test_an_error_about_a_masqueraded_syn_counts_where_it_leaves(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod)
    flow = Masqueraded(lb, side, xdp=False)
    flow.ask(SYN)
    family, build = (4, icmp) if ":" not in side.pod else (6, icmp6)
    quoted = ip(side.node, side.far_pod, tcp(flow.mine, 8080, SYN))
    came = lb.outside(frame(ip(side.far_pod, side.node, build(*NOBODY_LISTENS[family], quoted))))
    assert fared(lb).refused == 0
    assert lb.leaves(came.frame).verdict == NEXT
    assert fared(lb) == outcomes.Outcomes(refused=1)


def test_what_another_node_has_sent_here_is_no_load_that_this_one_has_chosen(lb: Bench, side: Side) -> None:
    """Else this node would prefer pods elsewhere, whose connections by DSR it does not see."""
    least = model.Algorithm.LEAST_CONNECTIONS
    lb.service(side.pod, mode=model.PacketMode.DSR, algorithm=least)
    loads = dict(lb.made.maps.rows("backend_load"))
    flow = Tunnelled(lb, side)
    for who, flags in (*OPEN, ("ask", RST)):
        assert getattr(flow, who)(flags) == NEXT
    assert fared(lb).established == 1
    assert dict(lb.made.maps.rows("backend_load")) == loads


def test_where_a_connection_by_dsr_is_sent_on_nothing_is_known_of_it(lb: Bench, side: Side) -> None:
    lb.service(side.far_pod, mode=model.PacketMode.DSR)
    for flags in (SYN, SYN, ACK):
        asked = frame(ip(side.client, side.external_ip, tcp(40000, 80, flags)))
        assert lb.outside(asked).verdict == REDIRECT
    assert lb.flows() == {}
    assert outcomes.every(lb.made.maps) == {}


def test_nothing_is_counted_for_whoever_has_the_id_by_now(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    flow = Connection(lb, side)
    for who, flags in OPEN:
        getattr(flow, who)(flags)
    before = fared(lb)
    for key, packed in list(lb.made.maps.rows("backends")):
        row = tables.backend(packed)
        if row.state:
            lb.made.maps.apply([tables.Put(tables.Table.BACKENDS, key, row._replace(port=b"\0\1").pack())])
    lb.look()
    flow.answer(RST)
    assert fared(lb) == before


def test_datagrams_are_no_connections(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True, protocol=model.Protocol.UDP)
    lb.outside(frame(ip(side.client, side.external_ip, udp(40000, 80))))
    lb.leaves(frame(ip(side.pod, side.client, udp(8080, 40000))))
    assert fared(lb) == outcomes.Outcomes()


TRIALS, SPREAD = 2000, 200


def test_first_outcomes_at_once_are_all_counted(lb: Bench, side: Side) -> None:
    """By two CPUs, each of which finds no row: neither takes back what the other has counted."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("there is one CPU")
    lb.service(side.pod, external_local=True)
    with mmap.mmap(-1, mmap.PAGESIZE) as turns:
        assert lb.made.inside(lambda: race(lb, side, cpus, turns)) == [2] * TRIALS


def race(lb: Bench, side: Side, cpus: list[int], turns: mmap.mmap) -> list[int]:
    """Have two backends' refusals leave at once, each time as the first; returns how many were counted."""
    made, device = lb.made, lb.made.ifindex["up0"]
    clients = (40000, 40001)
    asked = [frame(ip(side.client, side.external_ip, tcp(port, 80, SYN))) for port in clients]
    answers = [frame(ip(side.pod, side.client, tcp(8080, port, RST | ACK))) for port in clients]
    ours, others = 0, 1  # whose turn is over, by number
    if not (child := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # whatever becomes of the test
        os.sched_setaffinity(0, cpus[1:])
        for number in range(1, TRIALS + 1):
            turn = number % 255 + 1
            while turns[ours] != turn:
                pass
            with contextlib.suppress(OSError):  # then too few are counted
                made.run_here("tc_to_any", answers[1], device)
            turns[others] = turn
        os._exit(0)
    counted = []
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus[:1])
        for number in range(1, TRIALS + 1):
            turn = number % 255 + 1
            for one in asked:
                made.run_here("tc_from_outside", one, device)
            made.empty("backend_health")
            turns[ours] = turn
            for _ in range(number % SPREAD):
                pass  # whoever spins hears of it late
            made.run_here("tc_to_any", answers[0], device)
            while turns[others] != turn:
                pass
            [found] = outcomes.every(made.maps).values()
            counted.append(found.elsewhere.refused)
    finally:
        os.sched_setaffinity(0, before)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return counted


def test_a_table_that_is_full_is_counted_and_lets_packets_pass(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    for number in range(1000, 1000 + lb.made.sizes["backend_health"]):
        row = bytes(abi.LAYOUTS["backend_health"].size)
        lb.made.maps.apply([tables.Put(tables.Table.BACKEND_HEALTH, tables.row_key(number), row)])
    flow = Connection(lb, side)
    assert flow.ask(SYN) == NEXT
    before = lb.made.count("HEALTH_FAILED")
    refused = frame(ip(side.pod, side.client, tcp(8080, 40000, RST | ACK)))
    assert lb.made.run("tc_to_any", refused).verdict == NEXT
    assert lb.made.count("HEALTH_FAILED") == before + 1
