"""Asks one target, and says how it answered. Nothing that a backend does raises."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import typing
from collections.abc import Awaitable, Callable

from lbproxy.core import addresses, grpc_health, http_probe, probe, probing
from lbproxy.probes import streams, trust

_DRAINED_BYTES: typing.Final = 65536
_DRAIN_S: typing.Final = 0.1
_DATAGRAM_BYTES: typing.Final = 2048
_HTTP_1: typing.Final = "http/1.1"
_HTTP_2: typing.Final = "h2"
# The loop was busy where it finds a timeout later than this, and than this share of the timeout.
_LATE_S: typing.Final = 0.05
_LATE: typing.Final = 0.1
# What says nothing of the backend: this node is out of something, or may not ask.
_OUR_OWN: typing.Final = frozenset(
    getattr(errno, name)
    for name in ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EADDRNOTAVAIL", "EAFNOSUPPORT", "EPERM", "EACCES"]
)


class Asked(typing.NamedTuple):
    """How a probe went, and how long it took until that was known."""

    result: probing.Result
    took_s: float


class _Limit:
    """The time that an answer may take. What follows the answer has a limit of its own.

    Where the loop was busy with something else when the time was up, the answer may have
    come and not been read: it may take as long again, once. Where the loop is late again,
    it is too slow to judge by (`stalled`).
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout = asyncio.timeout(None)
        self.stalled = False
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._took_s: float | None = None
        self._again = False
        self._due_s = self._started_s + timeout_s
        self._timer = self._loop.call_at(self._due_s, self._is_due)

    def answered(self) -> None:
        """Say that the answer is there, or that none is waited for any more."""
        self._timer.cancel()
        if self._took_s is None:
            self._took_s = self.took_s

    @property
    def took_s(self) -> float:
        """How long the answer took, or has taken until now."""
        return self._loop.time() - self._started_s if self._took_s is None else self._took_s

    def _is_due(self) -> None:
        now_s = self._loop.time()
        late = now_s - self._due_s > max(_LATE_S, _LATE * self._timeout_s)
        if late and not self._again:
            self._again = True
            self._due_s = now_s + self._timeout_s
            self._timer = self._loop.call_at(self._due_s, self._is_due)
            return
        self.stalled = late
        self.timeout.reschedule(now_s)


async def ask(target: probing.Target, trusted: trust.Trust) -> Asked:
    """Make one probe, within its own timeout."""
    limit = _Limit(target.probe.timeout_s)
    try:
        result = await _result(target, limit, trusted)
    finally:
        limit.answered()
    return Asked(result, limit.took_s)


async def _result(target: probing.Target, limit: _Limit, trusted: trust.Trust) -> probing.Result:
    try:
        async with limit.timeout:
            if target.probe.kind is probe.Kind.UDP:
                reason = await _udp(target)
            else:
                with _stream(target, trusted) as stream:
                    await stream.connect(target.port)
                    reason = await _CONVERSATIONS[target.probe.kind](target, stream, limit)
    except TimeoutError:
        reason = f"no answer in {target.probe.timeout_s:g} s"
        return probing.Result(passed=False, reason=reason, blameless=limit.stalled)
    except trust.NobodyTrustedError as error:
        return probing.Result(passed=False, reason=str(error), blameless=True)
    except ssl.SSLCertVerificationError as error:
        return probing.Result(passed=False, reason=f"TLS: {error.verify_message.rstrip('.')}")
    except ssl.SSLError as error:
        return probing.Result(passed=False, reason=f"TLS: {error.reason or error}")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return probing.Result(passed=False, reason=reason, blameless=error.errno in _OUR_OWN)
    return probing.Result(passed=not reason, reason=reason)


def _stream(target: probing.Target, trusted: trust.Trust) -> streams.Stream:
    if not target.probe.over_tls:
        return streams.Stream(target.address)
    context = trusted.context(
        verify=target.probe.tls is probe.Tls.VERIFY,
        protocol=_HTTP_2 if target.probe.kind is probe.Kind.GRPC else _HTTP_1,
    )
    return streams.TlsStream(target.address, target.probe.server_name, context)


async def _tcp(_target: probing.Target, stream: streams.Stream, _limit: _Limit) -> str:
    stream.drop()
    return ""


async def _web(target: probing.Target, stream: streams.Stream, limit: _Limit) -> str:
    reader = http_probe.StatusReader()
    await stream.send(http_probe.request(target.probe, _authority(target)))
    while not reader.done:
        reader.receive(await stream.receive())
    if reader.status:
        limit.answered()
        await _drain(stream)
    return reader.problem or http_probe.verdict(target.probe, reader.status)


async def _drain(stream: streams.Stream) -> None:
    """Let a server that is about to end finish: it would log an answer that nobody took as an error."""
    left = _DRAINED_BYTES
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(_DRAIN_S):
            while left > 0 and (data := await stream.receive()):
                left -= len(data)


async def _grpc(target: probing.Target, stream: streams.Stream, _limit: _Limit) -> str:
    # Clients of gRPC do not go on either.
    if isinstance(stream, streams.TlsStream) and stream.protocol != _HTTP_2:
        return "TLS: does not agree on HTTP/2 (ALPN)"
    exchange = grpc_health.Exchange(
        target.probe.host or _authority(target), target.probe.text, over_tls=target.probe.over_tls
    )
    await stream.send(exchange.request)
    while exchange.answer is None:
        if due := exchange.receive(await stream.receive()):
            await stream.send(due)
    stream.drop()
    return exchange.answer


async def _udp(target: probing.Target) -> str:
    loop = asyncio.get_running_loop()
    with socket.socket(streams.family_of(target.address), socket.SOCK_DGRAM) as asking:
        asking.setblocking(False)
        # Connected: nobody else's answer is taken, and ICMP errors are ours.
        await loop.sock_connect(asking, (addresses.text(target.address), target.port))
        await loop.sock_sendall(asking, target.probe.payload)
        answer = await loop.sock_recv(asking, _DATAGRAM_BYTES)
    return "" if answer.startswith(target.probe.expect) else "another answer than expected"


def _authority(target: probing.Target) -> str:
    host = addresses.text(target.address)
    return f"[{host}]:{target.port}" if ":" in host else f"{host}:{target.port}"


_CONVERSATIONS: typing.Final[
    dict[probe.Kind, Callable[[probing.Target, streams.Stream, _Limit], Awaitable[str]]]
] = {
    probe.Kind.TCP: _tcp,
    probe.Kind.HTTP: _web,
    probe.Kind.HTTPS: _web,
    probe.Kind.GRPC: _grpc,
}
