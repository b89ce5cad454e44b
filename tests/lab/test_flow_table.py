"""Flows of the packet path end: the agent gives their room back, and counts those that there are."""

import collections.abc

import pytest

from lbproxy.core import tables
from lbproxy.lab import cluster
from tests import polling
from tests.lab import agents, manifests

WEB = 1
NODE_PORT = 30053
PODS = ("n1/p2",)
METRICS = "http://127.0.0.1:10249/metrics"
SCRAPE = (
    "import json, urllib.request\n"
    f"lines = urllib.request.urlopen('{METRICS}', timeout=5).read().decode().splitlines()\n"
    "print(json.dumps([line for line in lines if line.startswith('lbproxy_flows{')]))\n"
)


@pytest.fixture(scope="module")
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    ports = [manifests.HTTP, manifests.DNS.on_node_port(NODE_PORT)]
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


def test_idle_flows_are_removed_and_the_counts_are_right(lab: cluster.Lab, agent: agents.Agent) -> None:
    client, node = agent.at("outside"), lab["n1"]
    # Of a socket each, so that no question but the last leaves a flow that is assured.
    polling.eventually(lambda: not client.udp(node.ipv4, NODE_PORT, timeout_s=0.5).error, 20, "an answer")
    shorten_timeouts(agent)
    opened = [client.open(node.address(family), NODE_PORT, udp=True) for family in (4, 6) for _ in range(3)]
    for one in opened:
        one.ask()
    assert len(list(agent.maps.rows(tables.Table.FLOWS))) >= 2 * len(opened)
    opened[0].ask()  # who answers an answer is assured
    polling.eventually(lambda: unassured(agent) == 0, 40, "the idle ones gone")
    left = [tables.flow(row) for _, row in agent.maps.rows(tables.Table.FLOWS)]
    assert left
    assert all(flow.state & tables.FlowState.ASSURED for flow in left)
    assert opened[0].ask().server == "n1/p2"
    assert flows(lab) == {'lbproxy_flows{protocol="UDP",assured="true"}': 1}
    for one in opened:
        one.close()
