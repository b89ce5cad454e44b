"""Serves the health check node ports: one listening socket for each Service and family, or address.

Sockets are opened, closed and kept as Services and addresses change; what they
answer is looked up when they are asked. One HTTP server is behind them all, so
that slow clients of one Service are bounded together with those of the others.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
import typing
from collections.abc import Callable, Iterable

from aiohttp import web

from lbproxy.config import config
from lbproxy.core import addresses, health_checks, healthz, model, node_rows, state
from lbproxy.web import guarded

RETRY_S: typing.Final = 30.0

_HEADERS: typing.Final = {"Content-Type": "application/json", **guarded.NO_SNIFFING}
_log = logging.getLogger(__name__)

Failed = Callable[[model.ServiceName, int, str], None]


class HealthChecks:
    """Told of every pass, and serves until cancelled. `open` are the listeners that are served."""

    def __init__(
        self,
        settings: config.Config,
        failed: Failed = lambda _service, _port, _why: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cidrs = (
            [addresses.PRIMARY]
            if settings.nodeport_primary
            else [str(network) for network in settings.nodeport_addresses]
        )
        self._failed = failed
        self._clock = clock
        self._checks = health_checks.Checks()
        # Where only some addresses are to be served, none is before they are known.
        self._places = {} if self._cidrs else health_checks.places((), (), ())
        self._node: node_rows.NodeFacts | None = None
        self._health = healthz.ProxyHealth(settings.sync_period_s)
        self._changed = asyncio.Event()
        self._http: guarded.Guarded | None = None
        self._servers: dict[health_checks.Listener, asyncio.Server] = {}
        self._failures: dict[tuple[health_checks.Listener, model.ServiceName], str] = {}
        self._asked: dict[health_checks.Listener, model.ServiceName] = {}

    @property
    def open(self) -> set[health_checks.Listener]:
        """The listeners that are served now."""
        return set(self._servers)

    def passed(
        self,
        cluster: state.ClusterState,
        names: Iterable[model.ServiceName],
        node: node_rows.NodeFacts | None,
        health: healthz.ProxyHealth,
    ) -> None:
        """Take what a pass has put in force."""
        self._health = health
        changed = self._checks.look(cluster, names)
        if node is not None and node != self._node:
            self._node = node
            self._places = health_checks.places(self._cidrs, node.local, node.node_addresses)
            changed = True
        # What could not be opened is tried again with each pass (HC-9).
        if changed or self._failures:
            self._changed.set()

    async def run(self) -> typing.NoReturn:
        """Open and close sockets as they come to be wanted or not, until cancelled."""
        self._http = guarded.Guarded(self._answer)
        try:
            while True:
                self._changed.clear()
                await self._serve_what_is_wanted(self._http)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_S if self._failures else None):
                        await self._changed.wait()
        finally:
            for server in self._servers.values():
                server.close()
            await self._http.shutdown(timeout=1)

    async def _serve_what_is_wanted(self, http: guarded.Guarded) -> None:
        wanted = self._checks.wanted(self._places)
        # First, as a port may pass from one Service to another.
        for listener in self._servers.keys() - wanted.listeners.keys():
            self._servers.pop(listener).close()
            _log.info("health check port closed: %s", _where(listener))
        self._asked = wanted.listeners
        failures: dict[tuple[health_checks.Listener, model.ServiceName], str] = {}
        for name, listener in wanted.refused.items():
            failures[listener, name] = f"it is the port of {wanted.listeners[listener]}"
        for listener, name in wanted.listeners.items():
            if listener not in self._servers and (why := await self._open(http, listener, name)):
                failures[listener, name] = why
        for (listener, name), why in failures.items():
            if self._failures.get((listener, name)) != why:
                _log.error("cannot serve the health check of %s on %s: %s", name, _where(listener), why)
                self._failed(name, listener.port, why)
        self._failures = failures

    async def _open(
        self, http: guarded.Guarded, listener: health_checks.Listener, service: model.ServiceName
    ) -> str:
        """Serve a listener; returns why not, empty where it is served or can not be wanted."""
        try:
            opened = _listening(listener)
        except OSError as error:
            # A host without IPv6.
            if error.errno == errno.EAFNOSUPPORT:
                return ""
            return os.strerror(error.errno) if error.errno else str(error)
        self._servers[listener] = await asyncio.get_running_loop().create_server(http, sock=opened)
        _log.info("serving the health check of %s on %s", service, _where(listener))
        return ""

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        service, local = self._subject(request)
        if service is None:
            # Accepted just before the socket was closed.
            return web.Response(status=503, headers=guarded.NO_SNIFFING)
        healthy = self._health.healthy(self._clock())
        answer, headers = health_checks.answer(service, local, healthy=healthy)
        return web.Response(status=answer.status, body=answer.body, headers={**_HEADERS, **headers})

    def _subject(self, request: web.BaseRequest) -> tuple[model.ServiceName | None, int]:
        """Which Service a request asks about, and how many endpoints it has here."""
        transport = request.transport
        place = transport.get_extra_info("sockname") if transport is not None else None
        if place is None:
            return None, 0
        address = addresses.parse(place[0]) or b""
        family = addresses.family_of(address)
        zero = addresses.IPV4_ZERO if family is model.Family.IPV4 else addresses.IPV6_ZERO
        service = self._asked.get(health_checks.Listener(zero, place[1])) or self._asked.get(
            health_checks.Listener(address, place[1])
        )
        check = self._checks.by_service.get(service) if service is not None else None
        return (None, 0) if check is None else (service, check.local.get(family, 0))


def _listening(listener: health_checks.Listener) -> socket.socket:
    """A listening socket of one family: an IPv6 one takes no IPv4. Raises OSError."""
    ipv4 = addresses.family_of(listener.address) is model.Family.IPV4
    family = socket.AF_INET if ipv4 else socket.AF_INET6
    return socket.create_server((addresses.text(listener.address), listener.port), family=family)


def _where(listener: health_checks.Listener) -> str:
    return str(config.ListenAddress(addresses.text(listener.address), listener.port))
