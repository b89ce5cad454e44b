"""A server of health in a pod, which says what a file says; a program of the standard library alone.

Beside the servers that serve, so that what is probed and what is served fail apart. While
the file says "up" all is well. While it says "down", TCP is closed, HTTP says 500, HTTPS
and UDP say nothing, gRPC says NOT_SERVING.

    probed.py FILE CERTIFICATE KEY SERVING NOT_SERVING    (the last two: what gRPC answers, in hex)
"""

import asyncio
import contextlib
import pathlib
import ssl
import sys

TCP, HTTP, HTTPS, GRPC, UDP = PORTS = range(9001, 9006)


class Health:
    """The file, and the ports that follow it."""

    def __init__(self, file: str, serving: str, not_serving: str) -> None:
        self._file = pathlib.Path(file)
        self._serving, self._not_serving = bytes.fromhex(serving), bytes.fromhex(not_serving)

    @property
    def up(self) -> bool:
        """What the file says."""
        return self._file.read_text() == "up"

    async def _until(self, *, up: bool) -> None:
        while self.up is not up:  # noqa: ASYNC110 - nobody tells of a file
            await asyncio.sleep(0.05)

    async def http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """200 or 500."""
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 %s\r\nConnection: close\r\n\r\n" % (b"200 OK" if self.up else b"500 No"))
            await writer.drain()
        writer.close()

    async def https(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """200 or nothing."""
        await self._until(up=True)
        await self.http(reader, writer)

    async def grpc(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """SERVING or NOT_SERVING, as a real server was heard to say it."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(24)
            writer.write(self._serving if self.up else self._not_serving)
            await reader.read()
        writer.close()

    async def tcp(self) -> None:
        """Listen or not."""

        async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        while True:
            server = await asyncio.start_server(hang_up, None, TCP, reuse_address=True)
            await self._until(up=False)
            server.close()
            await self._until(up=True)


class Echo(asyncio.DatagramProtocol):
    """`pong` to everybody, or nothing."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket."""
        self._transport = transport

    def datagram_received(self, _data: bytes, address: object) -> None:
        """Answer, where all is well."""
        if self._health.up:
            self._transport.sendto(b"pong", address)  # type: ignore[attr-defined]


async def main(file: str, certificate: str, key: str, serving: str, not_serving: str) -> None:
    """Serve until ended."""
    health = Health(file, serving, not_serving)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    await asyncio.start_server(health.http, None, HTTP)
    await asyncio.start_server(health.https, None, HTTPS, ssl=tls)
    await asyncio.start_server(health.grpc, None, GRPC)
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: Echo(health), ("::", UDP))
    print("ready", flush=True)
    await health.tcp()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
