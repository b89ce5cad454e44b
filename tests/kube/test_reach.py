"""One look at an API server: what it says, and by whose address it was asked."""

import socket
from collections.abc import AsyncIterator

import pytest

from lbproxy.core import addresses
from lbproxy.core.preflight import facts
from lbproxy.kube import reach
from lbproxy.lab import apiserver
from tests.kube import objects

LOCAL = [text for text in (addresses.parse("192.0.2.10"),) if text]


@pytest.fixture
async def server() -> AsyncIterator[apiserver.ApiServer]:
    async with apiserver.ApiServer() as running:
        running.store.put(objects.node("worker-1"))
        running.store.put(objects.service("kubernetes", "10.96.0.1"))
        running.store.put(objects.endpoint_slice("kubernetes", ["192.0.2.7", "192.0.2.8"], "kubernetes"))
        yield running


async def look(server: apiserver.ApiServer, name: str = "worker-1") -> reach.Found:
    return await reach.look("", server.url, name, LOCAL)


async def test_all_is_there(server: apiserver.ApiServer) -> None:
    found = await look(server)
    assert found.cluster == facts.Cluster(
        url=server.url,
        by_service=False,
        servers=("192.0.2.7:8080", "192.0.2.8:8080"),
        node=facts.NodeObject(frozenset({4}), ()),
    )
    assert found.node is not None
    assert (found.node.name, found.node.addresses) == ("worker-1", tuple(LOCAL))
    assert {request.method for request in server.requests} == {"GET"}


async def test_the_address_of_the_service_is_known_as_such(server: apiserver.ApiServer) -> None:
    server.store.put(objects.service("kubernetes", "127.0.0.1"))
    assert (await look(server)).cluster.by_service is True


async def test_by_its_name_too(server: apiserver.ApiServer) -> None:
    server.store.put(objects.service("kubernetes", "127.0.0.1"))
    url = server.url.replace("127.0.0.1", "localhost")
    assert (await reach.look("", url, "worker-1", LOCAL)).cluster.by_service is True


async def test_a_node_that_may_be_meant(server: apiserver.ApiServer) -> None:
    found = await look(server, "elsewhere")
    assert (found.cluster.node, found.cluster.similar, found.node) == (None, "worker-1", None)
    other = await reach.look("", server.url, "elsewhere", [])
    assert (other.cluster.similar, other.cluster.problem) == ("", "")


@pytest.mark.parametrize(
    ("refused", "forbidden"), [(1, ("services",)), (2, ("services", "endpointslices")), (9, None)]
)
async def test_what_may_not_be_listed(
    server: apiserver.ApiServer, refused: int, forbidden: tuple[str, ...] | None
) -> None:
    server.faults.fail, server.faults.fail_status = refused, 403
    found = (await look(server)).cluster
    assert found.problem == ""
    assert found.forbidden == (forbidden or ("services", "endpointslices", "nodes"))
    # Without the right to see the Service nobody knows.
    assert found.by_service is (None if forbidden is None else False)


async def test_a_server_that_fails(server: apiserver.ApiServer) -> None:
    server.faults.fail = 9
    found = (await look(server)).cluster
    assert "500" in found.problem
    assert (found.url, found.by_service, found.forbidden) == (server.url, None, ())


async def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = await reach.look("", f"http://127.0.0.1:{port}", "worker-1", LOCAL)
    assert found.cluster.problem.endswith("connection refused")


async def test_one_that_never_answers(server: apiserver.ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "TIMEOUT_S", 0.05)
    server.faults.delay_s = 5.0
    assert (await look(server)).cluster.problem == f"{server.url}: no answer within 0.05 s"


async def test_not_in_a_pod_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = (await reach.look("", "", "worker-1", LOCAL)).cluster
    assert (found.in_pod, "not in a pod" in found.problem) == (True, True)
