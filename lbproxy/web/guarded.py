"""An HTTP server that strangers can not keep from answering others.

A connection serves one request and has a deadline, and the oldest ones go when
there are too many, whatever their clients do or leave undone: first those that have
not sent a request yet, so that a scrape that takes its time is not cut off by others.
"""

import asyncio
import logging
import typing
from collections.abc import Awaitable, Callable

from aiohttp import web

CONNECTION_S: typing.Final = 30.0
MAX_CONNECTIONS: typing.Final = 256
NO_SNIFFING: typing.Final = {"X-Content-Type-Options": "nosniff"}

_log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]


class Guarded(web.Server):
    """Speaks HTTP on any number of listening sockets; given to an event loop's `create_server`."""

    def __init__(self, handler: Handler, connection_s: float = CONNECTION_S) -> None:
        # What strangers send is none of our errors: without this each port scan leaves a traceback.
        quiet = _log.getChild("http")
        quiet.setLevel(logging.CRITICAL)
        super().__init__(self._answer, access_log=None, logger=quiet, lingering_time=0)
        self._handler = handler
        self._connection_s = connection_s
        self._asking: dict[asyncio.Transport, None] = {}  # whose request is not complete; the oldest first
        self._deadlines: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._transports: dict[web.RequestHandler, asyncio.Transport] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Give a new connection its deadline, and its place to it if there are too many."""
        super().connection_made(handler, transport)
        if len(self._deadlines) >= MAX_CONNECTIONS:
            oldest = next(iter(self._asking or self._deadlines))
            self._asking.pop(oldest, None)
            self._deadlines.pop(oldest).cancel()
            oldest.abort()
        self._transports[handler] = transport
        self._asking[transport] = None
        self._deadlines[transport] = asyncio.get_running_loop().call_later(
            self._connection_s, transport.abort
        )

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        super().connection_lost(handler, exc)
        transport = self._transports.pop(handler)
        self._asking.pop(transport, None)
        deadline = self._deadlines.pop(transport, None)
        if deadline is not None:
            deadline.cancel()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        """Answer one request a connection, and a failure with 500."""
        if request.transport is not None:
            self._asking.pop(request.transport, None)
        try:
            response = await self._handler(request)
        except Exception:
            _log.exception("%s failed", request.path)
            response = web.Response(status=500, text="500 internal server error\n")
        response.force_close()
        return response
