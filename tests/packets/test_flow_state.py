"""How long a flow is kept and what ends it, by what its packets say."""

import itertools

import pytest

from lbproxy import abi
from lbproxy.core import model, node_rows, tables
from lbproxy.kernel import map_rows
from tests.packets import harness, packets
from tests.packets.bench import DROP, LEAVING, NEXT, OUTSIDE, REDIRECT, Bench
from tests.packets.packets import ACK, FIN, RST, SYN, Side, frame, ip, tcp, udp

State = tables.FlowState
TIMEOUTS = node_rows.Timeouts(10, 1000, 500, 5, 20, 200, 30, 300)


class Connection:
    """A client outside, a backend of this node, and what they send each other; not masqueraded."""

    def __init__(self, lb: Bench, side: Side, port: int = 40000) -> None:
        self.lb, self.side, self.port = lb, side, port

    def ask(self, flags: int) -> int:
        l4 = tcp(self.port, 80, flags) if flags >= 0 else udp(self.port, 80)
        return self.lb.outside(frame(ip(self.side.client, self.side.external_ip, l4))).verdict

    def answer(self, flags: int) -> int:
        l4 = tcp(8080, self.port, flags) if flags >= 0 else udp(8080, self.port)
        return self.lb.leaves(frame(ip(self.side.pod, self.side.client, l4))).verdict

    @property
    def state(self) -> State:
        [state] = [State(row.state) for key, row in self.lb.flows().items() if not key.stage]
        [other] = [State(row.state) for key, row in self.lb.flows().items() if key.stage]
        assert state & (State.REPLIED | State.ASSURED | State.RESET) == other & ~(
            State.ORIGINAL | State.FIN | State.PEER_FIN
        )
        return state & ~State.ORIGINAL


@pytest.fixture
def tcp_flow(lb: Bench, side: Side) -> Connection:
    lb.node(timeouts=TIMEOUTS)
    lb.service(side.pod, external_local=True)
    return Connection(lb, side)


STORIES = [
    ([("ask", SYN)], State(0), 10),
    ([("ask", SYN), ("ask", SYN)], State(0), 10),
    ([("ask", SYN), ("ask", ACK)], State(0), 10),
    ([("ask", SYN), ("answer", SYN | ACK)], State.REPLIED, 10),
    ([("ask", SYN), ("answer", SYN | ACK), ("ask", SYN)], State.REPLIED, 10),
    ([("ask", SYN), ("answer", SYN | ACK), ("ask", ACK)], State.REPLIED | State.ASSURED, 1000),
    ([("ask", SYN), ("answer", RST | ACK)], State.REPLIED | State.RESET, 5),
    ([("ask", SYN), ("answer", SYN | ACK), ("ask", RST)], State.REPLIED | State.RESET, 5),
    (
        [("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), ("ask", FIN | ACK)],
        State.REPLIED | State.ASSURED | State.FIN,
        500,
    ),
    (
        [("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), ("answer", FIN | ACK)],
        State.REPLIED | State.ASSURED | State.PEER_FIN,
        500,
    ),
    (
        [("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), ("answer", FIN | ACK), ("ask", FIN | ACK)],
        State.REPLIED | State.ASSURED | State.FIN | State.PEER_FIN,
        5,
    ),
]


@pytest.mark.parametrize(("story", "state", "lives"), STORIES)
def test_tcp(tcp_flow: Connection, story: list[tuple[str, int]], state: State, lives: int) -> None:
    lb = tcp_flow.lb
    for who, flags in story:
        assert getattr(tcp_flow, who)(flags) == NEXT
    assert tcp_flow.state == state
    assert lb.made.unassured[0] == (0 if state & State.ASSURED else 2)
    ticks = node_rows.ticks(lives)
    rows = lb.flows()
    lb.age(ticks + 2)
    assert tcp_flow.ask(ACK) == REDIRECT
    for key, row in rows.items():
        lb.made.put_flow(key, row)
    lb.age(ticks - 2)
    assert tcp_flow.ask(ACK) == NEXT


def test_a_closed_connections_ports_may_be_used_again(tcp_flow: Connection) -> None:
    for who, flags in (("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), ("ask", RST)):
        getattr(tcp_flow, who)(flags)
    assert tcp_flow.state & State.RESET
    assert tcp_flow.ask(SYN) == NEXT
    assert tcp_flow.state == 0
    assert len(tcp_flow.lb.flows()) == 2
    assert tcp_flow.lb.made.unassured[0] == 2
    tcp_flow.ask(RST)
    # Rows that are counted already are not counted again.
    assert tcp_flow.ask(SYN) == NEXT
    assert tcp_flow.lb.made.unassured[0] == 2


def test_a_syn_opens_anew_where_its_answers_would_not_be_understood(tcp_flow: Connection) -> None:
    """In a flood the rows of answers go first, since they came first."""
    assert tcp_flow.ask(SYN) == NEXT
    rows = tcp_flow.lb.flows()
    [answers] = [key for key in rows if key.stage]
    map_rows.delete(tcp_flow.lb.made.fds["flows"], answers.pack())
    tcp_flow.lb.look()
    assert tcp_flow.ask(SYN) == NEXT
    assert tcp_flow.lb.flows() == rows
    assert tcp_flow.answer(SYN | ACK) == NEXT
    assert tcp_flow.state == State.REPLIED


@pytest.mark.parametrize(
    ("asked", "state", "lives"), [(1, State(0), 20), (2, State.REPLIED | State.ASSURED, 200)]
)
def test_udp(lb: Bench, side: Side, asked: int, state: State, lives: int) -> None:
    lb.node(timeouts=TIMEOUTS)
    lb.service(side.pod, external_local=True, protocol=model.Protocol.UDP)
    flow = Connection(lb, side)
    flow.ask(-1)
    if asked > 1:
        flow.answer(-1)
        flow.ask(-1)
    assert flow.state == state
    lb.age(node_rows.ticks(lives) + 2)
    answer = frame(ip(side.pod, side.client, udp(8080, 40000)))
    assert lb.leaves(answer) == (NEXT, answer)
    assert flow.ask(-1) == NEXT
    assert flow.state == 0


def test_an_old_connections_last_packets_leave_others_alone(lb: Bench, side: Side) -> None:
    """A client uses its port again, with another frontend: the backend's answers are now to that one."""
    lb.node(timeouts=TIMEOUTS)
    lb.service(side.pod, external_local=True)
    old = Connection(lb, side)
    ends = (("ask", FIN | ACK), ("answer", FIN | ACK))
    for who, flags in (("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), *ends):
        getattr(old, who)(flags)
    new = [
        (lb.outside, ip(side.client, side.balancer_ip, tcp(40000, 80, SYN))),
        (lb.leaves, ip(side.pod, side.client, tcp(8080, 40000, SYN | ACK))),
        (lb.outside, ip(side.client, side.balancer_ip, tcp(40000, 80, ACK))),
    ]
    for run, packet in new:
        run(frame(packet))
    settled = [row for row in lb.flows().values() if not State(row.state) & State.FIN]
    lb.age(2)
    assert old.ask(RST) == NEXT
    states = [State(row.state) for row in lb.flows().values()]
    assert len(settled) == 2
    assert sum(1 for state in states if not state & (State.RESET | State.FIN | State.PEER_FIN)) == 2


def test_an_open_connections_syn_is_its_own(tcp_flow: Connection) -> None:
    for who, flags in (("ask", SYN), ("answer", SYN | ACK), ("ask", ACK), ("ask", SYN)):
        assert getattr(tcp_flow, who)(flags) == NEXT
    assert tcp_flow.state == State.REPLIED | State.ASSURED


@pytest.mark.parametrize("ticks", [0, 2])
def test_a_repeated_syn_leaves_states_to_the_answer(tcp_flow: Connection, ticks: int) -> None:
    """That another CPU has seen, and has noted in one of the rows so far."""
    lb = tcp_flow.lb
    tcp_flow.ask(SYN)
    [(key, row)] = [(key, row) for key, row in lb.flows().items() if key.stage]
    lb.made.put_flow(key, row._replace(state=row.state | State.REPLIED))
    lb.age(ticks)
    assert tcp_flow.ask(SYN) == NEXT
    assert lb.flows()[key].state == row.state | State.REPLIED
    # It keeps both rows alive, nevertheless.
    assert len({one.seen for one in lb.flows().values()}) == 1
    assert (harness.tick() - lb.flows()[key].seen) % 2**32 < 2


# --- a table full of flows that nobody has answered ---


def flood(lb: Bench) -> None:
    """As many rows as may be unassured, says the agent's count."""
    lb.made.unassured[0] = lb.made.sizes["flows"] // 2
    lb.look()


def test_new_flows_of_a_flood_go_aside_and_come_back_when_answered(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    flow = Connection(lb, side)
    flood(lb)
    assert flow.ask(SYN) == NEXT
    assert lb.flows() == {}
    assert len(lb.made.flows("flows_new")) == 2
    assert lb.made.counted() == {"FLOWS_FULL": 2}
    assert flow.answer(SYN | ACK) == NEXT
    assert len(lb.made.flows("flows_new")) == 2
    assert flow.ask(ACK) == NEXT
    assert lb.made.flows("flows_new") == {}
    assert flow.state == State.REPLIED | State.ASSURED
    assert lb.made.unassured[0] == lb.made.sizes["flows"] // 2


def test_a_closed_flow_is_begun_anew_in_a_flood(lb: Bench, side: Side) -> None:
    """Its rows still lie where they are looked for first."""
    lb.service(side.pod, external_local=True)
    flow = Connection(lb, side)
    for who, flags in (("ask", SYN), ("answer", SYN | ACK), ("ask", RST)):
        getattr(flow, who)(flags)
    flood(lb)
    for who, flags in (("ask", SYN), ("answer", SYN | ACK), ("ask", ACK)):
        assert getattr(flow, who)(flags) == NEXT
    assert flow.state == State.REPLIED | State.ASSURED


def test_a_key_has_one_row(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    flow = Connection(lb, side)
    flood(lb)
    for who, flags in (("ask", SYN), ("answer", SYN | ACK), ("ask", RST)):
        getattr(flow, who)(flags)
    assert len(lb.made.flows("flows_new")) == 2
    lb.made.unassured[0] = 0
    lb.look()
    assert flow.ask(SYN) == NEXT
    assert len(lb.flows()) == 2
    assert lb.made.flows("flows_new") == {}


def test_a_closed_flows_masquerade_is_forgotten_with_it(lb: Bench, side: Side) -> None:
    """The client uses its port again, with a frontend of the backend that does not masquerade."""
    lb.service(side.pod)
    lb.outside(frame(ip(side.client, side.cluster_ip, tcp(40000, 80))))
    lb.outside(frame(ip(side.client, side.cluster_ip, tcp(40000, 80, RST))))
    lb.leaves(frame(ip(side.client, side.pod, tcp(40000, 8080, RST))), "pod0")
    lb.service(side.pod, external_local=True)
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80))))
    sent = frame(ip(side.client, side.pod, tcp(40000, 8080)))
    assert lb.leaves(sent, "pod0") == (NEXT, sent)


def test_a_closed_flow_does_not_speak_for_the_backend_itself(lb: Bench, side: Side) -> None:
    """The client dials the backend directly, from a port that it had a flow to the service from."""
    lb.service(side.pod, external_local=True)
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80))))
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80, RST))))
    for flags in (SYN | ACK, ACK):
        answer = frame(ip(side.pod, side.client, tcp(8080, 40000, flags)))
        assert lb.leaves(answer) == (NEXT, answer)
    assert lb.made.unassured[0] == len(lb.flows()) == 1


def test_a_full_table_sends_new_flows_aside(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    there, here = (packets.packed(one) for one in (side.client, side.pod))
    mapped = b"" if ":" in side.pod else bytes(10) + b"\xff\xff"
    there, here = mapped + there, mapped + here
    row = tables.Flow(there, b"\0\1", b"\0\1", 0, 0, bytes(3), int(State.ASSURED))
    for number in range(lb.made.sizes["flows"] - 1):
        port = number.to_bytes(2, "big")
        lb.made.put_flow(tables.FlowKey(there, here, port, port, packets.TCP, 1), row)
    lb.look()
    flow = Connection(lb, side)
    assert flow.ask(SYN) == NEXT
    assert lb.made.counted() == {"FLOWS_FULL": 1}
    assert flow.answer(SYN | ACK) == NEXT
    # One of both rows has room.
    assert flow.ask(ACK) == NEXT
    assert len(lb.made.flows("flows_new")) == 1
    assert flow.answer(ACK) == NEXT
    # The other has to wait until the agent has made some.
    gone = tables.FlowKey(there, here, b"\0\1", b"\0\1", packets.TCP, 1)
    map_rows.delete(lb.made.fds["flows"], gone.pack())
    lb.age(1)
    assert flow.answer(ACK) == NEXT
    assert lb.made.flows("flows_new") == {}


# --- backends that leave ---


def gone(lb: Bench, address: str, state: tables.BackendState) -> None:
    for key, packed in list(lb.made.maps.rows("backends")):
        row = tables.backend(packed)
        if row.addr.endswith(packets.packed(address)):
            lb.made.maps.apply([tables.Put(tables.Table.BACKENDS, key, row._replace(state=state).pack())])
    lb.look()


@pytest.mark.parametrize("protocol", [model.Protocol.UDP, model.Protocol.TCP])
@pytest.mark.parametrize(
    ("state", "moves"),
    [
        (tables.BackendState.TERMINATING, False),
        (tables.BackendState.SERVING, False),
        (tables.BackendState.UNREADY, True),
        (tables.BackendState.DRAINING, True),
    ],
)
def test_only_udp_leaves_a_backend_that_left(
    lb: Bench, side: Side, protocol: model.Protocol, state: tables.BackendState, moves: bool
) -> None:
    lb.service(side.pod, protocol=protocol, external_local=True)
    flow = Connection(lb, side)
    kind = -1 if protocol is model.Protocol.UDP else SYN
    assert flow.ask(kind) == NEXT
    lb.service(side.pod, side.node, protocol=protocol, external_local=True)
    gone(lb, side.pod, state)
    before = lb.made.columns["service_stats"].words.tolist()
    assert flow.ask(kind) == NEXT
    drew_again = lb.made.columns["service_stats"].words.tolist() != before
    assert drew_again is (moves and protocol is model.Protocol.UDP)


def test_udp_stays_with_its_backend_where_there_is_no_other(lb: Bench, side: Side) -> None:
    lb.service(side.pod, protocol=model.Protocol.UDP)
    flow = Connection(lb, side)
    assert flow.ask(-1) == NEXT
    lb.service(protocol=model.Protocol.UDP)
    assert flow.ask(-1) == NEXT


# --- affinity ---


def test_a_client_stays_with_its_backend(lb: Bench, side: Side) -> None:
    lb.service(side.pod, side.far_pod, affinity_s=10800)
    seen = set()
    for port in range(40000, 40020):
        result = lb.outside(frame(ip(side.client, side.external_ip, tcp(port, 80))))
        seen.add(result.frame[30:34] if ":" not in side.pod else result.frame[38:54])
    assert len(seen) == 1
    lb.made.empty("affinity")
    lb.look()
    for port in range(50000, 50040):
        result = lb.outside(frame(ip(side.client, side.external_ip, tcp(port, 80))))
        lb.made.empty("affinity")
        lb.look()
        seen.add(result.frame[30:34] if ":" not in side.pod else result.frame[38:54])
    assert len(seen) == 2


@pytest.mark.parametrize(("since_s", "remembered"), [(0, True), (40, True), (160, False)])
def test_a_client_is_remembered_for_a_while(lb: Bench, side: Side, since_s: int, remembered: bool) -> None:
    lb.service(side.pod, side.far_pod, affinity_s=100)
    lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80))))
    [(key, packed)] = lb.made.maps.rows("affinity")
    layout = abi.LAYOUTS["affinity"]
    backend, _ = layout.unpack(packed)
    seen, told, ports = set(), 0, itertools.count(50000)
    while told < 30:
        now_s = harness.second()
        map_rows.update(lb.made.fds["affinity"], key, layout.pack(backend, now_s - since_s))
        lb.look()
        lb.outside(frame(ip(side.client, side.external_ip, tcp(next(ports), 80))))
        [(_, packed)] = lb.made.maps.rows("affinity")
        # Where the clock has gone on meanwhile, it was longer ago than that.
        if harness.second() == now_s:
            seen.add(layout.unpack(packed)[0])
            told += 1
    assert seen == {backend} if remembered else len(seen) == 2


def test_maglev_gives_a_flow_the_same_backend_every_time(lb: Bench, side: Side) -> None:
    lb.service(side.pod, side.far_pod, side.node, algorithm=model.Algorithm.MAGLEV)
    drawn = []
    for _ in range(2):
        lb.made.empty("flows")
        lb.look()
        sent = [frame(ip(side.client, side.external_ip, tcp(port, 80))) for port in range(40000, 40020)]
        drawn.append([lb.run(OUTSIDE, one, "up0").frame for one in sent])
    assert drawn[0] == drawn[1]
    assert len({one[30:34] if ":" not in side.pod else one[38:54] for one in drawn[0]}) > 1
    assert lb.run(LEAVING, sent[0], "up0").verdict != DROP
