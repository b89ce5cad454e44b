"""Probes of real servers on loopback, and of what is no server."""

import asyncio
import contextlib
import os
import pathlib
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lbproxy.core import probe, probing
from lbproxy.probes import asking, streams, trust
from tests import polling, ports
from tests.kube import certificates
from tests.probes import servers
from tests.unit import test_grpc_health

Kind = probe.Kind
OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
PASSED = probing.Result(passed=True)


async def timed(target: probing.Target, trusted: trust.Trust | None = None) -> asking.Asked:
    return await asking.ask(target, trusted or trust.Trust())


async def ask(
    asked: probe.Probe, port: int, host: str = "127.0.0.1", trusted: trust.Trust | None = None
) -> probing.Result:
    return (await timed(servers.target(asked, port, host), trusted)).result


def failed(reason: str) -> probing.Result:
    return probing.Result(passed=False, reason=reason)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_port_that_listens_is_up(host: str) -> None:
    async with servers.serving(servers.silent, host) as port:
        assert await ask(probe.Probe(Kind.TCP), port, host) == PASSED


@pytest.mark.parametrize("kind", [Kind.TCP, Kind.HTTP, Kind.HTTPS, Kind.GRPC])
async def test_a_closed_port_is_refused(kind: Kind) -> None:
    assert await ask(probe.Probe(kind, "/"), ports.unused()) == failed("Connection refused")


async def test_a_closed_udp_port_is_unreachable_at_once() -> None:
    port = ports.unused(socket.SOCK_DGRAM)
    assert await ask(probe.Probe(Kind.UDP, payload=b"ping"), port) == failed("Connection refused")


@pytest.mark.parametrize("kind", [Kind.HTTP, Kind.HTTPS, Kind.GRPC])
async def test_a_server_that_says_nothing_fails_in_time(kind: Kind) -> None:
    async with servers.serving(servers.silent) as port:
        asked = await timed(servers.target(probe.Probe(kind, "/", timeout_s=0.05), port))
    assert asked.result._replace(blameless=False) == failed("no answer in 0.05 s")
    assert asked.took_s >= 0.05


@pytest.mark.parametrize("kind", [Kind.HTTP, Kind.HTTPS, Kind.GRPC])
async def test_a_server_that_hangs_up_fails(kind: Kind) -> None:
    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with servers.serving(hang_up) as port:
        result = await ask(probe.Probe(kind, "/"), port)
    # What was sent and not read is answered with a reset.
    reasons = {"closed the connection without an answer", "Connection reset by peer", "Broken pipe"}
    assert not result.passed
    assert result.reason in reasons or result.reason.startswith("TLS: ")


async def test_http_asks_for_its_path_and_judges_the_status() -> None:
    heard: list[bytes] = []
    async with servers.serving(servers.answering(OK, heard)) as port:
        assert await ask(probe.Probe(Kind.HTTP, "/healthz"), port) == PASSED
        assert heard[0].startswith(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % port)
    async with servers.serving(servers.answering(b"HTTP/1.1 500 Oops\r\n\r\n")) as port:
        assert await ask(probe.Probe(Kind.HTTP, "/"), port) == failed("HTTP status 500")


async def test_redirects_are_not_followed() -> None:
    heard: list[bytes] = []
    async with servers.serving(servers.answering(OK, heard)) as elsewhere:
        answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\n\r\n" % elsewhere
        async with servers.serving(servers.answering(answer)) as port:
            assert await ask(probe.Probe(Kind.HTTP, "/"), port) == PASSED
            only_200 = probe.Probe(Kind.HTTP, "/", highest_status=299)
            assert await ask(only_200, port) == failed("HTTP status 302")
    assert heard == []


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.read(4096)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(65536))
            await writer.drain()
            sent += 65536

    async with servers.serving(endless) as port:
        assert await ask(probe.Probe(Kind.HTTP, "/"), port) == PASSED
    # What was read, and what the buffers of both sides hold.
    assert sent < 64 << 20


async def test_an_endless_head_is_not_read_to_its_end() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        while not writer.is_closing():
            writer.write(b"x" * 65536)
            await writer.drain()

    async with servers.serving(endless) as port:
        assert await ask(probe.Probe(Kind.HTTP, "/", timeout_s=60.0), port) == failed(
            "answered with no status line"
        )


async def test_a_server_that_keeps_the_connection_does_not_make_an_answer_late() -> None:
    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read(4096)

    async with servers.serving(keep) as port:
        asked = await timed(servers.target(probe.Probe(Kind.HTTP, "/", timeout_s=0.05), port))
    assert asked.result == PASSED


async def test_https_is_asked_of_whatever_certificate(tmp_path: pathlib.Path) -> None:
    authority = certificates.Authority(tmp_path)
    context = authority.server_context(authority.pair("server"))
    names: list[str | None] = []
    context.sni_callback = lambda _connection, name, _context: names.append(name)
    async with servers.serving(servers.answering(OK), tls=context) as port:
        assert await ask(probe.Probe(Kind.HTTPS, "/"), port) == PASSED
        named = probe.Probe(Kind.HTTPS, "/", server_name="web.example", highest_status=200)
        assert await ask(named, port) == PASSED
        result = await ask(probe.Probe(Kind.HTTP, "/"), port)
    assert names == [None, "web.example"]
    assert not result.passed


@example("a..b")
@example("a" * 64)
@example(".".join(["a" * 63] * 4))
@given(st.text("aA0.-_", max_size=80))
def test_any_name_that_an_annotation_may_have_can_be_asked_for(name: str) -> None:
    try:
        asked = probe.parse("https:/", f"server-name={name}")
    except probe.ProbeError:
        return

    async def make() -> None:
        context = trust.Trust().context(verify=False, protocol="http/1.1")
        with streams.TlsStream(bytes(16), asked.server_name, context):
            pass

    asyncio.run(make())


async def test_https_at_a_server_without_tls_fails() -> None:
    async with servers.serving(servers.answering(OK)) as port:
        result = await ask(probe.Probe(Kind.HTTPS, "/"), port)
    assert (result.passed, result.reason) == (False, "TLS: WRONG_VERSION_NUMBER")


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (test_grpc_health.SERVING, PASSED),
        (test_grpc_health.NOT_SERVING, failed("is NOT_SERVING")),
        (test_grpc_health.NOT_FOUND, failed("gRPC status NOT_FOUND: it does not know this service")),
    ],
)
async def test_grpc_asks_whether_a_service_is_serving(recorded: str, expected: probing.Result) -> None:
    heard: list[bytes] = []
    async with servers.serving(servers.answering(bytes.fromhex(recorded), heard)) as port:
        assert await ask(probe.Probe(Kind.GRPC, "shop.Cart"), port) == expected
    assert b"shop.Cart" in heard[0]


@pytest.mark.parametrize(
    ("expect", "answer", "expected"),
    [
        (b"", b"anything", PASSED),
        (b"", b"", PASSED),
        (b"po", b"pong", PASSED),
        (b"pong", b"po", failed("another answer than expected")),
        (b"x", b"", failed("another answer than expected")),
    ],
)
async def test_udp_takes_any_answer_or_the_expected_one(
    expect: bytes, answer: bytes, expected: probing.Result
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        loop = asyncio.get_running_loop()

        async def serve() -> bytes:
            heard, client = await loop.sock_recvfrom(server, 100)
            server.sendto(answer, client)
            return heard

        asked = probe.Probe(Kind.UDP, payload=b"ping", expect=expect)
        result, heard = await asyncio.gather(ask(asked, server.getsockname()[1]), serve())
    assert (result, heard) == (expected, b"ping")


async def test_an_answer_from_somewhere_else_is_none() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        server.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        server.setblocking(False)
        loop = asyncio.get_running_loop()

        async def answer_wrongly() -> None:
            _, client = await loop.sock_recvfrom(server, 100)
            other.sendto(b"pong", client)

        port = server.getsockname()[1]
        result, _ = await asyncio.gather(
            ask(probe.Probe(Kind.UDP, payload=b"ping", timeout_s=0.1), port), answer_wrongly()
        )
    assert result._replace(blameless=False) == failed("no answer in 0.1 s")


async def test_want_of_something_on_this_node_is_no_fault_of_the_backends() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_file = os.dup(0)
    os.close(next_file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, hard))
    try:
        result = await ask(probe.Probe(Kind.TCP), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result == probing.Result(passed=False, reason="Too many open files", blameless=True)


@contextlib.contextmanager
def in_a_thread(answer: bytes) -> Iterator[int]:
    """A server that no stalled loop holds up; it answers until its socket is shut. Yields its port."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


async def stall(asked: asyncio.Task[asking.Asked], seconds: float) -> None:
    """Hold up the loop again and again, whenever a probe's time is about to be up."""
    while not asked.done():
        time.sleep(seconds)  # noqa: ASYNC251 - that is the point
        await asyncio.sleep(0)


@pytest.mark.parametrize("kind", [Kind.TCP, Kind.HTTP])
async def test_a_stalled_loop_is_no_fault_of_a_backend_that_answers(kind: Kind) -> None:
    with in_a_thread(OK) as port:
        asked = asyncio.create_task(timed(servers.target(probe.Probe(kind, "/", timeout_s=1.0), port)))
        await asyncio.sleep(0)
        time.sleep(1.3)  # noqa: ASYNC251 - that is the point
        assert (await asked).result == PASSED


async def test_a_backend_that_does_not_answer_has_failed_also_after_a_stall() -> None:
    found = []
    async with servers.serving(servers.silent) as port:
        for _ in range(10):
            asked = asyncio.create_task(
                timed(servers.target(probe.Probe(Kind.HTTP, "/", timeout_s=0.3), port))
            )
            await asyncio.sleep(0)
            time.sleep(0.5)  # noqa: ASYNC251 - that is the point
            found.append((await asked).result)
            # Unless something else held up this machine a second time.
            if not found[-1].blameless:
                break
    assert found[-1] == failed("no answer in 0.3 s")


async def test_a_loop_that_is_always_late_judges_nobody() -> None:
    async with servers.serving(servers.silent) as port:
        asked = asyncio.create_task(timed(servers.target(probe.Probe(Kind.HTTP, "/", timeout_s=0.05), port)))
        await stall(asked, 0.2)
    assert asked.result().result == probing.Result(passed=False, reason="no answer in 0.05 s", blameless=True)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def test_sockets_are_closed_whatever_happens() -> None:
    before = open_files()
    async with servers.serving(servers.silent) as port:
        for kind in (Kind.TCP, Kind.HTTP, Kind.HTTPS, Kind.GRPC):
            await ask(probe.Probe(kind, "/", timeout_s=0.02), port)
            await ask(probe.Probe(kind, "/", timeout_s=0.02), ports.unused())
    # The servers' ends close as they notice.
    await polling.eventually_async(lambda: len(open_files()) <= len(before), what="no more files than before")
