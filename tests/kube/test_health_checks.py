"""Health check node ports over real HTTP on the loopback (contract section 17)."""

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from lbproxy.config import config
from lbproxy.core import events, healthz, model, node_rows
from lbproxy.web import guarded, health_check_ports
from tests import polling, ports
from tests.unit import test_health_checks as objects

WEB = objects.WEB
DUAL = ("10.96.0.1", "fd00::1")


class Site:
    """The servers, told of passes over a small cluster."""

    def __init__(self, **settings: Any) -> None:
        self.failures: list[tuple[model.ServiceName, int, str]] = []
        self.now_s = 100.0
        self.health = healthz.ProxyHealth(30)
        self.health.synced(self.now_s)
        self.cluster = objects.cluster()
        self.node: node_rows.NodeFacts | None = None
        self.servers = health_check_ports.HealthChecks(
            config.Config(node_name=objects.NODE, **settings),
            lambda *failure: self.failures.append(failure),
            lambda: self.now_s,
        )

    def passes(self, *happened: events.Upsert) -> None:
        names = [
            model.ServiceName(*event.name) if event.kind is events.Kind.SERVICE else WEB for event in happened
        ]
        for event in happened:
            self.cluster.apply(event)
        self.servers.passed(self.cluster, names, self.node, self.health)

    async def serves(self, count: int) -> None:
        await polling.eventually_async(lambda: len(self.servers.open) == count)

    async def ask(
        self, port: int, method: str = "GET", path: str = "/", host: str = "127.0.0.1"
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        async with (
            aiohttp.ClientSession() as client,
            client.request(method, f"http://{host}:{port}{path}") as response,
        ):
            return response, await response.read()

    async def status(self, port: int, host: str = "127.0.0.1") -> tuple[int, int]:
        response, body = await self.ask(port, host=host)
        return response.status, json.loads(body)["localEndpoints"]


@contextlib.asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Site]:
    site = Site(**settings)
    task = asyncio.create_task(site.servers.run())
    try:
        yield site
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running() as running_:
        yield running_


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_any_path_and_method_is_answered(site: Site, method: str) -> None:
    port = ports.unused()
    site.passes(objects.service(port), objects.slice_of(objects.endpoint("10.0.0.1")))
    await site.serves(1)
    response, body = await site.ask(port, method, "/any/path?with=query")
    assert response.status == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Load-Balancing-Endpoint-Weight"] == "1"
    assert body.startswith(b'{\n\t"service": {')
    assert body.endswith(b"}")


async def test_without_endpoints_it_is_up_and_says_503(site: Site) -> None:
    port = ports.unused()
    site.passes(objects.service(port))
    await site.serves(1)
    response, _ = await site.ask(port)
    assert (response.status, response.headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "0")


async def test_each_family_has_a_socket_and_a_count_of_its_own(site: Site) -> None:
    port = ports.unused()
    site.passes(objects.service(port, DUAL), objects.slice_of(objects.endpoint("10.0.0.1")))
    await site.serves(2)
    assert await site.status(port) == (200, 1)
    assert await site.status(port, "[::1]") == (503, 0)


async def test_a_service_of_one_family_is_not_served_on_the_other(site: Site) -> None:
    port = ports.unused()
    site.passes(objects.service(port, ("fd00::1",)))
    await site.serves(1)
    assert await site.status(port, "[::1]") == (503, 0)
    with pytest.raises(aiohttp.ClientConnectorError):
        await site.ask(port)


async def test_a_proxy_that_is_stuck_says_so(site: Site) -> None:
    port = ports.unused()
    site.passes(objects.service(port), objects.slice_of(objects.endpoint("10.0.0.1")))
    await site.serves(1)
    site.health.queued(site.now_s)
    site.now_s += 60
    response, body = await site.ask(port)
    assert response.status == 503
    assert json.loads(body)["serviceProxyHealthy"] is False
    assert response.headers["X-Load-Balancing-Endpoint-Weight"] == "1"


async def test_a_changed_port_closes_the_old_socket_and_an_unchanged_one_keeps_it(site: Site) -> None:
    old, new = ports.unused(), ports.unused()
    site.passes(objects.service(old))
    await site.serves(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", old)
    site.passes(objects.slice_of(objects.endpoint("10.0.0.1")))
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    # What was connected before the change is told what holds after it.
    assert (await reader.read()).startswith(b"HTTP/1.0 200")
    writer.close()
    site.passes(objects.service(new))
    await polling.eventually_async(lambda: {one.port for one in site.servers.open} == {new})
    with pytest.raises(aiohttp.ClientConnectorError):
        await site.ask(old)
    assert await site.status(new) == (200, 1)
    site.passes(objects.service(0))
    await site.serves(0)


async def test_a_port_in_use_is_told_once_and_tried_again_with_each_pass(site: Site) -> None:
    with socket.create_server(("0.0.0.0", 0)) as holder:
        port = holder.getsockname()[1]
        site.passes(objects.service(port))
        await polling.eventually_async(lambda: site.failures)
        site.passes()
        await asyncio.sleep(0.05)
        assert site.failures == [(WEB, port, "Address already in use")]
    site.passes()
    await site.serves(1)
    assert await site.status(port) == (503, 0)


async def test_a_port_of_another_service_is_told_and_had_once_that_is_gone(site: Site) -> None:
    port = ports.unused()
    site.passes(objects.service(port), objects.service(port, name="zeta"))
    await site.serves(1)
    zeta = model.ServiceName("shop", "zeta")
    assert site.failures == [(zeta, port, "it is the port of shop/web")]
    site.passes(objects.service(0))

    async with asyncio.timeout(polling.TIMEOUT_S):
        while json.loads((await site.ask(port))[1])["service"]["name"] != "zeta":  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_with_restricted_node_ports_only_their_addresses_listen() -> None:
    port = ports.unused()
    async with running(nodeport_addresses=(ipaddress.ip_network("127.0.0.2/32"),)) as site:
        site.passes(objects.service(port))
        await asyncio.sleep(0.05)
        assert not site.servers.open
        local = (objects.packed("127.0.0.1"), objects.packed("127.0.0.2"))
        site.node = node_rows.NodeFacts(local, (), 1)
        site.passes()
        await site.serves(1)
        assert await site.status(port, "127.0.0.2") == (503, 0)
        with pytest.raises(aiohttp.ClientConnectorError):
            await site.ask(port)


async def test_silent_clients_do_not_keep_others_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "MAX_CONNECTIONS", 8)
    port = ports.unused()
    site.passes(objects.service(port))
    await site.serves(1)
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
    try:
        assert await site.status(port) == (503, 0)
    finally:
        for _, writer in silent:
            writer.close()
