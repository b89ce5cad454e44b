"""Which addresses the programs are told that pods have, and how soon."""

import asyncio
import collections.abc
import contextlib
import subprocess
import threading
import time

import pytest

from lbproxy import netns_addresses
from lbproxy.core import tables
from lbproxy.kernel import fake, node
from lbproxy.lab import cluster, netns
from tests import polling, serving
from tests.lab import agents, manifests

RANGE = bytes(24)
WEB = 1
VIP = {4: "192.0.2.200", 6: "2001:db8::200"}
Rows = dict[tuple[int, int], bytes]


class Follower:
    """NetnsAddresses at work in a node's namespace, on tables of its own."""

    def __init__(self, lab: cluster.Lab, where: str) -> None:
        self.kernel = fake.FakeMaps(serving.sizes(netns_addresses=4096))
        self._namespace = lab.netns(where)
        self._thread = threading.Thread(target=self._run)
        self._ahead_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()

    def restrict(self) -> None:
        self._write(tables.Put(tables.Table.SOURCE_RANGES, RANGE, bytes(4)))

    def unrestrict(self) -> None:
        self._write(tables.Delete(tables.Table.SOURCE_RANGES, RANGE))

    def wait_30_s(self) -> None:
        self._ahead_s += 30.0

    @property
    def rows(self) -> Rows:
        found = self.kernel.rows("netns_addresses")
        return {(int.from_bytes(key[:8], tables.BYTE_ORDER), key[8]): row for key, row in found}

    def _write(self, write: tables.Write) -> None:
        assert self._loop is not None
        self.kernel.apply([write])
        self._loop.call_soon_threadsafe(self._followed.wrote, [write])

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            netns.inside(self._namespace, lambda: asyncio.run(self._follow()))

    async def _follow(self) -> None:
        self._followed = netns_addresses.NetnsAddresses(self.kernel, lambda: time.monotonic() + self._ahead_s)
        self._loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._task = asyncio.create_task(self._followed.run(ready))
        ready.set()
        self._started.set()
        await self._task

    def __enter__(self) -> "Follower":
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)


@pytest.fixture
def follower(lab: cluster.Lab) -> collections.abc.Iterator[Follower]:
    with Follower(lab, "n1") as running:
        yield running


def cookie(name: str) -> int:
    return netns.inside(netns.path(name), node.netns_cookie)


def expected(lab: cluster.Lab, *places: str) -> Rows:
    return {
        (netns.inside(lab.netns(place), node.netns_cookie), family): agents.mapped(lab[place].address(family))
        for place in places
        for family in (4, 6)
    }


@contextlib.contextmanager
def pod(lab: cluster.Lab, name: str, address: str) -> collections.abc.Iterator[str]:
    """One more pod on n1, named as the lab names its own, so that it goes with the lab."""
    made = f"{lab.run}-{name}"
    n1 = lab.netns("n1").name
    netns.create(made, {})
    try:
        for line in (
            f"ip -n {n1} link add {name} type veth peer name eth0 netns {made}",
            f"ip -n {made} addr add {address} dev eth0",
            f"ip -n {made} link set eth0 up",
        ):
            subprocess.run(line.split(), check=True)
        yield made
    finally:
        netns.remove(made)


def test_every_pod_and_node_is_known_while_ranges_are_in_force(lab: cluster.Lab, follower: Follower) -> None:
    time.sleep(0.2)
    assert follower.rows == {}
    follower.restrict()
    pods = expected(lab, "n1/p1", "n1/p2", "n1/p3")
    polling.eventually(lambda: pods.items() <= follower.rows.items(), what="the pods")
    assert set(expected(lab, "n1")) <= follower.rows.keys()
    follower.unrestrict()
    polling.eventually(lambda: follower.rows == {}, what="nothing left")


def test_a_new_pod_is_known_as_soon_as_the_kernel_tells_of_it(
    lab: cluster.Lab, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is looked at every second is not what finds it.
    monkeypatch.setattr(netns_addresses, "_NAMES_S", 3600.0)
    follower.restrict()
    polling.eventually(lambda: follower.rows, what="a first look")
    for number in range(3):
        with pod(lab, f"new{number}", f"10.9.0.{number + 1}/32") as made:
            key, address = (cookie(made), 4), agents.mapped(f"10.9.0.{number + 1}")
            polling.eventually(
                lambda key=key, address=address: follower.rows.get(key) == address,  # type: ignore[misc]
                what="the new pod",
            )


def test_the_nodes_own_namespace_has_the_address_it_was_told(lab: cluster.Lab, follower: Follower) -> None:
    follower.restrict()
    host = netns.inside(lab.netns("n1"), node.netns_cookie)
    polling.eventually(lambda: (host, 4) in follower.rows, what="any address")
    for own in map(agents.mapped, ("192.0.2.77", "192.0.2.78")):
        settings = tables.NO_SETTINGS._replace(node4_addr=own)
        follower.kernel.apply([tables.Put(tables.Table.SETTINGS, tables.row_key(0), settings.pack())])
        polling.eventually(lambda own=own: follower.rows.get((host, 4)) == own, what="the node's address")  # type: ignore[misc]


def test_a_pod_that_went_is_forgotten_with_the_next_look_at_everything(
    lab: cluster.Lab, follower: Follower
) -> None:
    follower.restrict()
    with pod(lab, "gone", "10.9.1.1/32") as made:
        key = (cookie(made), 4)
        polling.eventually(lambda: key in follower.rows, what="the pod")
    follower.wait_30_s()
    polling.eventually(lambda: key not in follower.rows, what="the pod gone")


def test_an_address_that_changes_later_is_found_by_the_look_at_everything(
    lab: cluster.Lab, follower: Follower
) -> None:
    follower.restrict()
    with pod(lab, "moves", "10.9.2.1/32") as made:
        key = (cookie(made), 4)
        polling.eventually(lambda: key in follower.rows, what="the pod")
        subprocess.run(f"ip -n {made} addr flush dev eth0".split(), check=True)
        subprocess.run(f"ip -n {made} addr add 10.9.2.2/32 dev eth0".split(), check=True)
        follower.wait_30_s()
        polling.eventually(
            lambda: follower.rows.get(key) == agents.mapped("10.9.2.2"), what="the new address"
        )


# --- the agent, and sockets that dial a restricted address ---


@pytest.fixture
def api(lab: cluster.Lab) -> collections.abc.Iterator[agents.Api]:
    with agents.Api(lab.netns("n1"), *manifests.slices("web", [lab["n1/p2"]])) as running:
        yield running


def balanced(*ranges: str) -> manifests.Object:
    status = [{"ip": VIP[4]}, {"ip": VIP[6]}]
    return manifests.service(
        "web", WEB, type="LoadBalancer", load_balancer=status, loadBalancerSourceRanges=list(ranges)
    )


def test_pods_in_the_ranges_may_connect_and_others_may_not(lab: cluster.Lab, api: agents.Api) -> None:
    server = lab.serve("n1/p2")
    allowed, denied = lab["n1/p1"], lab["n1/p3"]
    api.put(balanced(f"{allowed.ipv4}/32", f"{allowed.ipv6}/128"))
    with agents.Agent(lab, api.source, *agents.SMALL_MAPS) as agent:
        for family in (4, 6):
            dials = (VIP[family], manifests.TCP_PORT)
            polling.eventually(
                lambda dials=dials: agent.at(allowed.name).tcp(*dials, timeout_s=1).server == "n1/p2",  # type: ignore[misc]
                what="the allowed pod answered",
            )
            assert agent.at(denied.name).tcp(*dials, timeout_s=1).error
            assert (
                agent.at(denied.name).tcp(manifests.cluster_ip(WEB, family), manifests.TCP_PORT).server
                == "n1/p2"
            )
        agent.kill()
        assert agent.at(allowed.name).tcp(VIP[4], manifests.TCP_PORT).server == "n1/p2"
        agent.start()
        assert agent.at(allowed.name).tcp(VIP[4], manifests.TCP_PORT).server == "n1/p2"
        assert list(agent.maps.rows("netns_addresses"))
        api.put(balanced())
        polling.eventually(
            lambda: not agent.at(denied.name).tcp(VIP[4], manifests.TCP_PORT, timeout_s=1).error,
            what="no restriction",
        )
        polling.eventually(lambda: not list(agent.maps.rows("netns_addresses")), what="no rows left")
    server.stop()
