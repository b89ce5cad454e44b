"""The agent's two HTTP servers: health for load balancers and the kubelet, metrics for Prometheus.

Both answer GET and HEAD of a few paths from memory.
"""

import asyncio
import gzip
import json
import logging
import socket
import time
import typing
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from lbproxy import errors
from lbproxy.config import config
from lbproxy.core import healthz
from lbproxy.metrics import metrics, text_format
from lbproxy.web import guarded, zpages

BIND_RETRY_S: typing.Final = 5.0

_TEXT: typing.Final = {"Content-Type": "text/plain; charset=utf-8", **guarded.NO_SNIFFING}
_JSON: typing.Final = {"Content-Type": "application/json", **guarded.NO_SNIFFING}
_log = logging.getLogger(__name__)


class Agent(typing.Protocol):
    """What health is asked of: the controller."""

    ready: asyncio.Event
    health: healthz.ProxyHealth

    @property
    def node_problem(self) -> str:
        """Why load balancers may not use this node; empty where they may."""
        ...

    @property
    def reasons(self) -> list[str]:
        """What is not as it should be."""
        ...


# Told which server can not be served, and why, before the agent ends for it.
Fatal = Callable[[str, str], Awaitable[None]]


async def _untold(_server: str, _problem: str) -> None:
    pass


def _now() -> healthz.Moment:
    return healthz.Moment(time.monotonic(), time.time())


async def serve(
    settings: config.Config, controller: Agent, telemetry: metrics.Metrics, fatal: Fatal | None = None
) -> typing.NoReturn:
    """Serve until cancelled. Raises AgentError for an address in use where that is to be fatal."""
    await Web(settings, controller, telemetry, fatal or _untold).run()


class Web:
    """Both servers; `servers` are those that the settings ask for, by name."""

    def __init__(
        self,
        settings: config.Config,
        controller: Agent,
        telemetry: metrics.Metrics,
        fatal: Fatal = _untold,
        *,
        now: Callable[[], healthz.Moment] = _now,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        connection_s: float = guarded.CONNECTION_S,
    ) -> None:
        self._settings = settings
        self._controller = controller
        self._telemetry = telemetry
        self._fatal = fatal
        self._now = now
        self._started = now()
        self._sleep = sleep
        health = {"/healthz": self._healthz, "/livez": self._livez}
        watching = {
            "/metrics": self._metrics,
            "/healthz": self._ok,
            "/proxyMode": self._proxy_mode,
            "/configz": self._configz,
            "/flagz": self._flagz,
            "/statusz": self._statusz,
            "/metrics/slis": self._slis,
        }
        wanted: list[tuple[str, config.ListenAddress | None, Mapping[str, guarded.Handler]]] = [
            ("health", settings.healthz_bind_address, health),
            ("metrics", settings.metrics_bind_address, watching),
        ]
        self.servers = {
            name: Server(name, address, paths, connection_s)
            for name, address, paths in wanted
            if address is not None
        }

    async def run(self) -> typing.NoReturn:
        """Serve until cancelled; an address in use is tried again (HZ-10, MS-4)."""
        waiting = list(self.servers.values())
        try:
            while True:
                waiting = [server for server in waiting if not await self._bound(server)]
                if not waiting:
                    await asyncio.Event().wait()
                await self._sleep(BIND_RETRY_S)
        finally:
            for server in self.servers.values():
                await server.close()

    async def _bound(self, server: "Server") -> bool:
        try:
            await server.bind()
        except OSError as error:
            problem = f"cannot serve {server.name} on {server.address}: {error.strerror or error}"
            if self._settings.bind_address_hard_fail:
                await self._fatal(server.name, problem)
                raise errors.AgentError(problem) from error
            # Beside kube-proxy it may be days until the address is free.
            if problem != server.problem:
                _log.error("%s; tried again every %.0f s", problem, BIND_RETRY_S)
            server.problem = problem
            return False
        server.problem = ""
        return True

    async def _healthz(self, _request: web.BaseRequest) -> web.Response:
        controller = self._controller
        answer = healthz.healthz(
            controller.health,
            self._now(),
            ready=controller.ready.is_set(),
            ineligible=controller.node_problem,
            reasons=controller.reasons,
        )
        self._telemetry.answered_healthz(answer.status)
        return web.Response(status=answer.status, body=answer.body, headers=_JSON)

    async def _livez(self, _request: web.BaseRequest) -> web.Response:
        answer = healthz.livez(self._controller.health, self._now(), self._controller.reasons)
        self._telemetry.answered_livez(answer.status)
        return web.Response(status=answer.status, body=answer.body, headers=_JSON)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        body: bytes | bytearray = await self._telemetry.exposition()
        headers = {"Content-Type": text_format.CONTENT_TYPE, "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body = await asyncio.to_thread(gzip.compress, body, compresslevel=1)
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def _ok(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(text="ok", headers=_TEXT)

    async def _proxy_mode(self, _request: web.BaseRequest) -> web.Response:
        # Tools branch on this to know what to expect of NodePorts and ports without endpoints:
        # those rules are the replaced mode's (MS-2).
        return web.Response(text=self._settings.proxy_mode.value, headers=_TEXT)

    async def _configz(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(body=json.dumps(zpages.configz(self._settings)).encode(), headers=_JSON)

    async def _flagz(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(text=zpages.flagz(self._settings), headers=_TEXT)

    async def _statusz(self, _request: web.BaseRequest) -> web.Response:
        paths = self.servers["metrics"].paths
        return web.Response(text=zpages.statusz(self._started, self._now(), paths), headers=_TEXT)

    async def _slis(self, _request: web.BaseRequest) -> web.Response:
        healthy = self._controller.health.healthy(self._now().monotonic_s)
        body = self._telemetry.slis(healthy=healthy)
        return web.Response(body=body, headers={"Content-Type": text_format.CONTENT_TYPE})


class Server:
    """Serves the paths of one address. `port` is the bound one; 0 before that. `problem`: why not yet."""

    def __init__(
        self,
        name: str,
        address: config.ListenAddress,
        paths: Mapping[str, guarded.Handler],
        connection_s: float,
    ) -> None:
        self.name = name
        self.address = address
        self.port = 0
        self.problem = ""
        self.paths = paths
        self._connection_s = connection_s
        self._http: guarded.Guarded | None = None
        self._listening: asyncio.Server | None = None

    async def bind(self) -> None:
        """Start to serve. Raises OSError."""
        listener = _listener(self.address)
        self._http = guarded.Guarded(self._answer, self._connection_s)
        self._listening = await asyncio.get_running_loop().create_server(self._http, sock=listener)
        self.port = listener.getsockname()[1]
        _log.info("serving %s on %s", self.name, self.address._replace(port=self.port))

    async def close(self) -> None:
        """Stop serving and close every connection."""
        if self._listening is not None:
            self._listening.close()
        if self._http is not None:
            await self._http.shutdown(timeout=1)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        handler = self.paths.get(request.path)
        if handler is None:
            response = web.Response(status=404, text="404 page not found\n", headers=guarded.NO_SNIFFING)
        elif request.method not in ("GET", "HEAD"):
            response = web.Response(
                status=405, text="405 method not allowed\n", headers={"Allow": "GET, HEAD"}
            )
        else:
            response = await handler(request)
        return response


def _listener(address: config.ListenAddress) -> socket.socket:
    """A listening socket; a wildcard takes both families, as Go's do (HZ-9). Raises OSError."""
    place = (address.host, address.port)
    if address.host not in ("0.0.0.0", "::"):
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server(place, family=family)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", address.port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:
            # IPv6 may be built in and switched off. A port in use fails again below.
            if address.host == "::":
                raise
    return socket.create_server(place)
