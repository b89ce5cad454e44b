"""The agent's HTTP servers over real HTTP on the loopback (contract sections 18 and 19)."""

import asyncio
import contextlib
import dataclasses
import errno
import gzip
import ipaddress
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client import parser

import lbproxy
from lbproxy import errors
from lbproxy.config import config
from lbproxy.core import healthz
from lbproxy.metrics import metrics
from lbproxy.web import guarded
from lbproxy.web import servers as web
from tests import polling

ANY_PORT = config.ListenAddress("127.0.0.1", 0)


class Agent:
    """What the servers ask of a controller, and a clock that stands still."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.health = healthz.ProxyHealth(30)
        self.node_problem = ""
        self.reasons: list[str] = []
        self.now_s = 100.0

    def now(self) -> healthz.Moment:
        return healthz.Moment(self.now_s, 1_700_000_000 + self.now_s)

    def succeed(self) -> None:
        self.health.synced(self.now_s)
        self.ready.set()


def settings(**more: Any) -> config.Config:
    given = {"healthz_bind_address": ANY_PORT, "metrics_bind_address": ANY_PORT, **more}
    return config.Config(node_name="node-a", **given)


class Running:
    """Both servers, and a client."""

    def __init__(self, agent: Agent, servers: web.Web, client: aiohttp.ClientSession) -> None:
        self.agent = agent
        self.web = servers
        self.client = client

    def port(self, server: str) -> int:
        return self.web.servers[server].port

    async def ask(
        self, server: str, path: str, method: str = "GET", host: str = "127.0.0.1", **more: Any
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        url = f"http://{host}:{self.port(server)}{path}"
        async with self.client.request(method, url, allow_redirects=False, **more) as response:
            return response, await response.read()

    async def health(self, path: str = "/healthz") -> tuple[int, dict[str, Any]]:
        response, body = await self.ask("health", path)
        return response.status, json.loads(body)


@contextlib.asynccontextmanager
async def running(config_: config.Config | None = None, **more: Any) -> AsyncIterator[Running]:
    agent = Agent()
    servers = web.Web(config_ or settings(), agent, metrics.Metrics(), now=agent.now, **more)
    task = asyncio.create_task(servers.run())
    try:
        await polling.eventually_async(lambda: all(s.port for s in servers.servers.values()) or task.done())
        async with aiohttp.ClientSession(auto_decompress=False) as client:
            yield Running(agent, servers, client)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def site() -> AsyncIterator[Running]:
    async with running() as running_:
        yield running_


# --- health ---


async def test_healthz_is_503_until_the_first_full_state(site: Running) -> None:
    site.agent.reasons = ["the first full state is not in the kernel yet"]
    status, body = await site.health()
    assert (status, body["healthy"], body["reasons"]) == (503, False, site.agent.reasons)
    assert (await site.health("/livez"))[0] == 200
    site.agent.reasons = []
    site.agent.succeed()
    status, body = await site.health()
    assert (status, body["healthy"], body["nodeEligible"], body["reasons"]) == (200, True, True, [])
    assert set(body["status"]) == {"IPv4", "IPv6"}


async def test_an_ineligible_node_is_alive_but_not_to_be_used(site: Running) -> None:
    site.agent.succeed()
    site.agent.node_problem = "Node node-a is being deleted"
    assert (await site.health())[0] == 503
    assert (await site.health("/livez"))[0] == 200


async def test_a_change_that_does_not_get_through_fails_both(site: Running) -> None:
    site.agent.succeed()
    site.agent.health.queued(site.agent.now_s)
    site.agent.now_s += 59
    assert (await site.health())[0] == (await site.health("/livez"))[0] == 200
    site.agent.now_s += 1
    assert (await site.health())[0] == (await site.health("/livez"))[0] == 503
    site.agent.succeed()
    assert (await site.health())[0] == (await site.health("/livez"))[0] == 200


async def test_health_answers_have_kube_proxys_headers(site: Running) -> None:
    response, _ = await site.ask("health", "/healthz")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_answers_are_counted_by_code(site: Running) -> None:
    await site.ask("health", "/healthz")
    site.agent.succeed()
    await site.ask("health", "/healthz")
    await site.ask("health", "/healthz", "HEAD")
    await site.ask("health", "/livez")
    _, text = await site.ask("metrics", "/metrics", headers={"Accept-Encoding": "identity"})
    lines = text.decode().splitlines()
    assert 'kubeproxy_proxy_healthz_total{code="503"} 1' in lines
    assert 'kubeproxy_proxy_healthz_total{code="200"} 2' in lines
    assert 'kubeproxy_proxy_livez_total{code="200"} 1' in lines


# --- metrics ---


async def test_metrics_are_in_the_text_format(site: Running) -> None:
    response, text = await site.ask("metrics", "/metrics", headers={"Accept-Encoding": "identity"})
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in parser.text_string_to_metric_families(text.decode())}
    assert {"kubeproxy_sync_proxy_rules_service_changes", "python_info"} <= names


async def test_metrics_are_compressed_where_that_is_wanted(site: Running) -> None:
    response, body = await site.ask("metrics", "/metrics", headers={"Accept-Encoding": "deflate, gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert b"# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram" in gzip.decompress(body)


async def test_the_metrics_server_is_alive_whatever_the_health(site: Running) -> None:
    response, body = await site.ask("metrics", "/healthz")
    assert (response.status, body) == (200, b"ok")


@pytest.mark.parametrize("mode", config.ProxyMode)
async def test_proxy_mode_is_the_one_that_is_replaced(mode: config.ProxyMode) -> None:
    async with running(settings(proxy_mode=mode)) as site:
        response, body = await site.ask("metrics", "/proxyMode")
    assert body.decode() == mode.value
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_configz_shows_the_settings_in_effect() -> None:
    given = settings(
        proxy_mode=config.ProxyMode.NFTABLES,
        nodeport_primary=True,
        sync_period_s=90,
        cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00::/64")),
    )
    async with running(given) as site:
        response, body = await site.ask("metrics", "/configz")
    assert response.headers["Content-Type"] == "application/json"
    shown = json.loads(body)["kubeproxy.config.k8s.io"]
    assert (shown["kind"], shown["apiVersion"]) == (
        "KubeProxyConfiguration",
        "kubeproxy.config.k8s.io/v1alpha1",
    )
    assert (shown["mode"], shown["clusterCIDR"]) == ("nftables", "10.244.0.0/16,fd00::/64")
    assert (shown["nodePortAddresses"], shown["nftables"]["syncPeriod"]) == (["primary"], "1m30s")


async def test_flagz_shows_every_setting(site: Running) -> None:
    response, body = await site.ask("metrics", "/flagz")
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    lines = body.decode().splitlines()
    told = {"node-name=node-a", "sync-period-s=30.0", "mode=snat", "healthz-bind-address=127.0.0.1:0"}
    assert told | {"algorithm=random"} <= {*lines}
    assert len(lines) == 3 + len(dataclasses.fields(config.Config))


async def test_statusz_tells_the_version_and_how_long_it_runs(site: Running) -> None:
    site.agent.now_s += 3725
    _, body = await site.ask("metrics", "/statusz")
    lines = body.decode().splitlines()
    assert {"Up: 1 hr 02 min 05 sec", f"Binary version: {lbproxy.__version__}"} <= {*lines}
    assert "/metrics/slis" in lines[-1]


async def test_slis_tell_health_and_what_was_answered(site: Running) -> None:
    await site.ask("health", "/healthz")
    await site.ask("health", "/livez")
    _, body = await site.ask("metrics", "/metrics/slis")
    lines = body.decode().splitlines()
    assert 'kubernetes_healthcheck{name="proxy",type="healthz"} 1' in lines
    assert 'kubernetes_healthchecks_total{name="proxy",type="healthz",status="error"} 1' in lines
    assert 'kubernetes_healthchecks_total{name="proxy",type="livez",status="success"} 1' in lines
    site.agent.succeed()
    site.agent.health.queued(site.agent.now_s)
    site.agent.now_s += 60
    _, body = await site.ask("metrics", "/metrics/slis")
    assert 'kubernetes_healthcheck{name="proxy",type="livez"} 0' in body.decode().splitlines()


# --- HTTP ---


@pytest.mark.parametrize(
    ("server", "path"),
    [
        ("health", "/"),
        ("health", "/metrics"),
        ("metrics", "/"),
        ("metrics", "/livez"),
        ("metrics", "/metrics/"),
    ],
)
async def test_other_paths_are_not_found(site: Running, server: str, path: str) -> None:
    response, _ = await site.ask(server, path)
    assert response.status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
async def test_nothing_can_be_changed_by_asking(site: Running, method: str) -> None:
    places = [(name, path) for name, server in site.web.servers.items() for path in server.paths]
    assert ("metrics", "/flagz") in places
    for name, path in places:
        response, _ = await site.ask(name, path, method, data=b"x" * 100_000)
        assert (response.status, path) == (405, path)
        assert response.headers["Allow"] == "GET, HEAD"


async def test_head_has_the_headers_and_no_body(site: Running) -> None:
    response, body = await site.ask("metrics", "/proxyMode", "HEAD")
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", "8")


async def test_a_query_does_not_matter(site: Running) -> None:
    assert (await site.ask("metrics", "/healthz?verbose=1"))[0].status == 200


async def test_a_connection_serves_one_request(site: Running) -> None:
    response, _ = await site.ask("metrics", "/healthz")
    assert response.headers["Connection"] == "close"


async def test_a_client_that_never_ends_its_request_is_cut_off() -> None:
    async with running(connection_s=0.2) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port("health"))
        writer.write(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        # Reset or closed: what matters is that it ends without an answer.
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


async def test_silent_clients_do_not_keep_others_out(site: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "MAX_CONNECTIONS", 8)
    site.agent.succeed()
    silent = [await asyncio.open_connection("127.0.0.1", site.port("health")) for _ in range(30)]
    try:
        assert (await site.health())[0] == 200
        # The oldest had to go.
        with contextlib.suppress(ConnectionError):
            assert await silent[0][0].read() == b""
    finally:
        for _, writer in silent:
            writer.close()


async def test_whoever_is_being_answered_is_not_cut_off_for_others(
    site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "MAX_CONNECTIONS", 8)
    scraped, cut_off = asyncio.Event(), asyncio.Event()

    async def slow(_telemetry: metrics.Metrics) -> bytearray:
        scraped.set()
        await cut_off.wait()
        return bytearray(b"lbproxy_up 1\n")

    monkeypatch.setattr(metrics.Metrics, "exposition", slow)
    plain = {"Accept-Encoding": "identity"}
    scrape = asyncio.create_task(site.ask("metrics", "/metrics", headers=plain))
    await scraped.wait()
    silent = [await asyncio.open_connection("127.0.0.1", site.port("metrics")) for _ in range(30)]
    with contextlib.suppress(ConnectionError):
        assert await silent[0][0].read() == b""
    cut_off.set()
    assert (await scrape)[1] == b"lbproxy_up 1\n"
    for _, writer in silent:
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
    ids=["TLS", "half a line", "long header"],
)
async def test_what_is_not_http_is_refused_and_does_no_harm(
    site: Running, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port("metrics"))
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        assert (await reader.read()).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    writer.close()
    assert (await site.ask("metrics", "/healthz"))[0].status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_scrape_that_fails_is_a_500_and_logged(
    site: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_telemetry: metrics.Metrics) -> bytearray:
        raise OSError(errno.EIO, "no such map")

    monkeypatch.setattr(metrics.Metrics, "exposition", fail)
    assert (await site.ask("metrics", "/metrics"))[0].status == 500
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == [
        "/metrics failed"
    ]
    assert (await site.ask("metrics", "/healthz"))[0].status == 200


# --- binding ---


async def test_a_wildcard_is_served_on_both_families() -> None:
    async with running(settings(healthz_bind_address=config.ListenAddress("0.0.0.0", 0))) as site:
        for host in ("127.0.0.1", "[::1]"):
            assert (await site.ask("health", "/livez", host=host))[0].status == 200


async def test_one_ipv6_address_may_be_served() -> None:
    async with running(settings(metrics_bind_address=config.ListenAddress("::1", 0))) as site:
        assert (await site.ask("metrics", "/healthz", host="[::1]"))[0].status == 200


async def test_a_server_without_an_address_is_not_started() -> None:
    async with running(settings(healthz_bind_address=None)) as site:
        assert set(site.web.servers) == {"metrics"}
        assert (await site.ask("metrics", "/healthz"))[0].status == 200


def taken() -> tuple[socket.socket, config.ListenAddress]:
    """An address in use, and the socket that uses it."""
    holder = socket.create_server(("127.0.0.1", 0))
    return holder, config.ListenAddress("127.0.0.1", holder.getsockname()[1])


async def test_an_address_in_use_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    holder, address = taken()
    pauses: list[float] = []
    others_answer: list[Callable[[], object]] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        # The other server does not wait for this one.
        assert others_answer[0]()
        if len(pauses) == 3:
            holder.close()

    agent = Agent()
    servers = web.Web(settings(healthz_bind_address=address), agent, metrics.Metrics(), sleep=sleep)
    others_answer.append(lambda: servers.servers["metrics"].port)
    task = asyncio.create_task(servers.run())
    await polling.eventually_async(lambda: servers.servers["health"].port)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert pauses == [5.0, 5.0, 5.0]
    # Said once, for as long as it is the same.
    [problem] = [record.message for record in caplog.records if "cannot serve" in record.message]
    assert str(address) in problem


async def test_an_address_in_use_ends_the_agent_where_told_so() -> None:
    holder, address = taken()
    given = settings(metrics_bind_address=address, bind_address_hard_fail=True)
    told: list[str] = []

    async def fatal(server: str, problem: str) -> None:
        told.extend((server, problem))

    with holder, pytest.raises(errors.AgentError, match=f"metrics on {address}: ") as caught:
        await web.serve(given, Agent(), metrics.Metrics(), fatal)
    assert told == ["metrics", str(caught.value)]
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EADDRINUSE


async def test_the_addresses_are_free_again_at_the_end() -> None:
    async with running() as site:
        port = site.port("health")
        idle = await asyncio.open_connection("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        pass
    with contextlib.suppress(ConnectionError):
        assert await idle[0].read() == b""
    idle[1].close()
