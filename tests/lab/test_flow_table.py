"""Flows of the packet path end: the agent gives their room back, and counts those that there are."""

import array
import collections.abc
import socket
import time

import pytest

from lbproxy.core import absence, tables
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

WEB = 1
NODE_PORT = 30053
WEB_NODE_PORT = 30080
PODS = ("n1/p2",)
METRICS = "http://127.0.0.1:10249/metrics"
SCRAPE = (
    "import json, urllib.request\n"
    f"lines = urllib.request.urlopen('{METRICS}', timeout=5).read().decode().splitlines()\n"
    "print(json.dumps([line for line in lines if line.startswith('lbproxy_flows{')]))\n"
)


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    ports = [manifests.HTTP.on_node_port(WEB_NODE_PORT), manifests.DNS.on_node_port(NODE_PORT)]
    objects = [
        manifests.service("web", WEB, ports=ports),
        *manifests.slices("web", [lab["n1/p2"]], ports=ports),
        manifests.node("n1", lab["n1"].address(4), lab["n1"].address(6)),
    ]
    with agents.Api(lab.netns("n1"), *objects) as running:
        yield running


@pytest.fixture(scope="module")
def agent(lab: cluster.Lab, api: agents.Api) -> collections.abc.Iterator[agents.Agent]:
    lab.serve("n1/p2")
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS) as running:
        yield running


def unassured(agent: agents.Agent) -> int:
    row = agent.maps.row(tables.Table.UNASSURED, tables.row_key(0))
    assert row is not None
    return int.from_bytes(row, tables.BYTE_ORDER, signed=True)


def flows(lab: cluster.Lab) -> dict[str, float]:
    lines: list[str] = agents.run_script(lab, "n1", SCRAPE)
    values = dict(line.split(" ") for line in lines)
    return {name: float(value) for name, value in values.items() if float(value)}


def shorten_timeouts(agent: agents.Agent) -> None:
    """Of UDP flows that are not assured, in the row that the agent has written."""
    key = tables.row_key(0)
    row = agent.maps.row(tables.Table.SETTINGS, key)
    assert row is not None
    settings = tables.settings(row)._replace(udp_new_ticks=2, udp_stream_ticks=3600)
    agent.maps.apply([tables.Put(tables.Table.SETTINGS, key, settings.pack())])


def said(agent: agents.Agent) -> bool:
    return any(agent.maps.column(tables.Table.NO_FLOWS, "none"))


def denied(agent: agents.Agent) -> list[bytes]:
    """Rows of flows that the programs are told are not there."""
    none, begun = (
        array.array("Q", agent.maps.column(tables.Table.NO_FLOWS, one)) for one in ("none", "begun")
    )
    keys = [
        key for table in (tables.Table.FLOWS, tables.Table.FLOWS_NEW) for key, _ in agent.maps.rows(table)
    ]
    places = absence.pair_places(b"".join(keys))
    return [
        key
        for key, at in zip(keys, places, strict=True)
        if (none[at >> 6] & ~begun[at >> 6]) >> (at & 63) & 1
    ]


def test_programs_are_told_which_flows_there_are_not(lab: cluster.Lab, agent: agents.Agent) -> None:
    """Also anew, as after many have begun: connections of before and of meanwhile go on."""
    client, node = agent.at("outside"), lab["n1"]
    polling.eventually(lambda: said(agent), what="something said")
    before = [client.open(node.address(family), WEB_NODE_PORT) for family in (4, 6)]
    assert [one.ask().server for one in before] == ["n1/p2"] * 2
    for _ in range(2):
        agent.maps.set_column(tables.Table.NO_FLOWS, "none", bytes(8 * absence.PAIR_ROWS))
        meanwhile = []
        while not said(agent):
            meanwhile.append(client.open(node.ipv4, WEB_NODE_PORT))
            assert meanwhile[-1].ask().server == "n1/p2"
            time.sleep(0.05)  # or the other test would find the table full of these
        assert denied(agent) == []
        assert [one.ask().server for one in (*before, *meanwhile)] == ["n1/p2"] * (2 + len(meanwhile))
        for one in meanwhile:
            one.close()
    assert len(list(agent.maps.rows(tables.Table.FLOWS))) > 8
    for one in before:
        one.close()


def test_idle_flows_are_removed_and_the_counts_are_right(lab: cluster.Lab, agent: agents.Agent) -> None:
    client, node = agent.at("outside"), lab["n1"]
    # Of a socket each, so that no question but the last leaves a flow that is assured.
    polling.eventually(lambda: not client.udp(node.ipv4, NODE_PORT, timeout_s=0.5).error, what="an answer")
    opened = [client.open(node.address(family), NODE_PORT, udp=True) for family in (4, 6) for _ in range(3)]
    for one in opened:
        one.ask()
    assert len(list(agent.maps.rows(tables.Table.FLOWS))) >= 2 * len(opened)
    opened[0].ask()  # who answers an answer is assured
    shorten_timeouts(agent)
    polling.eventually(lambda: unassured(agent) == 0, what="the idle ones gone")
    # Connections of the other test have their time after they were closed.
    rows = agent.maps.rows(tables.Table.FLOWS)
    left = [tables.flow(row) for key, row in rows if tables.flow_key(key).proto == socket.IPPROTO_UDP]
    assert left
    assert all(flow.state & tables.FlowState.ASSURED for flow in left)
    assert opened[0].ask().server == "n1/p2"
    counted = {name: count for name, count in flows(lab).items() if "UDP" in name}
    assert counted == {'lbproxy_flows{protocol="UDP",assured="true"}': 1}
    for one in opened:
        one.close()
