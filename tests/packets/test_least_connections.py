"""Which backend packets go to by what is open, and what counts as open."""

import pytest

from lbproxy.core import addresses, inventory, model, tables
from tests import installing
from tests.packets.bench import NEXT, Bench
from tests.packets.packets import ACK, FIN, RST, SYN, Side, frame, ip, tcp, udp
from tests.packets.test_flow_state import STORIES, Connection

LEAST = model.Algorithm.LEAST_CONNECTIONS
State = tables.FlowState


def opened(lb: Bench) -> dict[str, int]:
    found = inventory.read(lb.made.maps)
    return {
        addresses.text(one.address): one.open
        for port in found.ports
        for one in port.backends
        if one.open is not None
    }


def clear(lb: Bench, *first: int) -> None:
    """Rows of loads outlive a test: the first so many are open, nothing of all others."""
    for number in range(lb.made.sizes["backends"]):
        count = first[number - 1] if 0 < number <= len(first) else 0
        row = count.to_bytes(4, tables.BYTE_ORDER) + bytes(4)
        lb.made.maps.apply(
            [
                tables.Put(tables.Table.BACKEND_LOAD, tables.row_key(number), row),
                tables.Put(tables.Table.LOAD_CORRECTIONS, tables.row_key(number), bytes(4)),
            ]
        )


@pytest.mark.parametrize(("story", "state"), [(story, state) for story, state, _ in STORIES])
def test_a_flow_is_open_until_both_sides_have_closed_it(
    lb: Bench, side: Side, story: list[tuple[str, int]], state: State
) -> None:
    lb.service(side.pod, external_local=True, algorithm=LEAST)
    clear(lb)
    flow = Connection(lb, side)
    for who, flags in story:
        assert getattr(flow, who)(flags) == NEXT
    closed = state & State.RESET or state & (State.FIN | State.PEER_FIN) == State.FIN | State.PEER_FIN
    assert sum(opened(lb).values()) == (0 if closed else 1)
    # What comes late does not close it twice.
    for says in (flow.answer, flow.ask):
        says(RST | ACK)
        says(FIN | ACK)
    assert sum(opened(lb).values()) == 0
    # A new one from the same port is another one.
    flow.ask(SYN)
    assert sum(opened(lb).values()) == 1


def test_a_masqueraded_flow_counts_once_though_it_has_two_pairs_of_rows(lb: Bench, side: Side) -> None:
    lb.service(side.pod, algorithm=LEAST)
    clear(lb)
    out = lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80, SYN)))).frame
    lb.leaves(out)
    assert sum(opened(lb).values()) == 1
    assert len(lb.flows()) == 4
    reset = lb.outside(frame(ip(side.client, side.external_ip, tcp(40000, 80, RST)))).frame
    lb.leaves(reset)
    assert sum(opened(lb).values()) == 0


def forget(lb: Bench, *, answers: bool) -> None:
    """One direction's rows go, as flows_new forgets the oldest."""
    stages = [key for key, row in lb.flows().items() if bool(row.state & State.ORIGINAL) is not answers]
    lb.made.maps.apply([tables.Delete(tables.Table.FLOWS, key.pack()) for key in stages])
    lb.look()


@pytest.mark.parametrize("masqueraded", [False, True])
def test_a_syn_in_the_place_of_a_flow_whose_answers_are_forgotten_is_counted_once(
    lb: Bench, side: Side, masqueraded: bool
) -> None:
    lb.service(side.pod, external_local=not masqueraded, algorithm=LEAST)
    clear(lb)
    flow = Connection(lb, side)
    for _ in range(3):
        assert flow.ask(SYN) == NEXT
        assert sum(opened(lb).values()) == 1
        forget(lb, answers=True)
    flow.ask(SYN)
    flow.ask(RST)
    assert sum(opened(lb).values()) == 0


def test_one_in_the_place_of_a_flow_that_has_expired_is_counted_as_the_agent_will(
    lb: Bench, side: Side
) -> None:
    """It counts those that are fresh, and may have put this one right already."""
    lb.service(side.pod, external_local=True, algorithm=LEAST)
    clear(lb)
    flow = Connection(lb, side)
    flow.ask(SYN)
    lb.age(1_000_000)
    flow.ask(SYN)
    assert sum(opened(lb).values()) == 2


def test_datagrams_that_go_elsewhere_now_are_open_there_alone(lb: Bench, side: Side) -> None:
    other = side.pod[:-1] + "9"
    values = {"protocol": model.Protocol.UDP, "external_local": True, "algorithm": LEAST}
    lb.service(side.pod, other, **values)
    clear(lb)
    ask = frame(ip(side.client, side.external_ip, udp(40000, 80)))
    lb.outside(ask)
    [first] = [address for address, count in opened(lb).items() if count]
    [left] = {side.pod, other} - {first}
    # Not ready any more, and its row stays for those who connect by its address.
    lb.service(installing.endpoint(first, ready=False, serving=False), left, **values)
    lb.outside(ask)
    assert opened(lb)[left] == 1
    assert opened(lb).get(first, 0) == 0


def test_datagrams_open_one_flow(lb: Bench, side: Side) -> None:
    lb.service(side.pod, protocol=model.Protocol.UDP, external_local=True, algorithm=LEAST)
    clear(lb)
    for _ in range(3):
        lb.outside(frame(ip(side.client, side.external_ip, udp(40000, 80))))
    assert sum(opened(lb).values()) == 1


@pytest.mark.parametrize(("weight", "chosen"), [(1, 4), (3, 12)])
def test_of_two_the_one_with_less_for_its_weight_is_chosen(
    lb: Bench, side: Side, weight: int, chosen: int
) -> None:
    other = side.pod[:-1] + "9"
    loaded, idle = sorted((side.pod, other), key=installing.address)
    endpoints = [installing.endpoint(loaded), installing.endpoint(idle, weight=weight)]
    lb.service(*endpoints, external_local=True, algorithm=LEAST)
    rows = {
        addresses.text(tables.backend(row).addr): number
        for port in lb.made.installer.ledger.installed.values()
        for number, row in port.backends.items()
    }
    loads = [0] * max(rows.values())
    loads[rows[loaded] - 1] = 4
    clear(lb, *loads)
    for port in range(40_000, 40_000 + chosen):
        assert lb.outside(frame(ip(side.client, side.external_ip, tcp(port, 80, SYN)))).verdict == NEXT
    # With a weight of three, four of the one are as twelve of the other.
    assert opened(lb) == {loaded: 4, idle: chosen}


def test_nobody_is_counted_with_another_algorithm(lb: Bench, side: Side) -> None:
    lb.service(side.pod, external_local=True)
    clear(lb)
    Connection(lb, side).ask(SYN)
    assert list(lb.made.maps.rows(tables.Table.BACKEND_LOAD)) == []
