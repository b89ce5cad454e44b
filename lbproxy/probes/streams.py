"""TCP connections of probes, with TLS and without, on bare sockets.

asyncio's own streams take three times the processor time, and read ahead what nobody bounds.
"""

import asyncio
import socket
import ssl
import struct
import typing

from lbproxy.core import addresses, model

_READ_BYTES: typing.Final = 4096
_DROPPED: typing.Final = struct.pack("ii", 1, 0)  # of linger: on, 0 s


def family_of(address: bytes) -> socket.AddressFamily:
    """The family of a socket to an address."""
    return socket.AF_INET if addresses.family_of(address) is model.Family.IPV4 else socket.AF_INET6


class Stream:
    """A connection of this node's own; a `with` block closes it. Waiting ends with the task's timeout."""

    def __init__(self, address: bytes) -> None:
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(family_of(address), socket.SOCK_STREAM)
        self._socket.setblocking(False)

    async def connect(self, port: int) -> None:
        """Connect. Raises OSError."""
        await self._loop.sock_connect(self._socket, (addresses.text(self._address), port))

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError."""
        await self._loop.sock_sendall(self._socket, data)

    async def receive(self) -> bytes:
        """What comes next, nothing at the end. Raises OSError."""
        return await self._loop.sock_recv(self._socket, _READ_BYTES)

    def drop(self) -> None:
        """Close by a reset: neither side has to remember the connection for a minute."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROPPED)

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class TlsStream(Stream):
    """The same with TLS on it. Where `context` verifies, it is for the name; without one for the address."""

    def __init__(self, address: bytes, server_name: str, context: ssl.SSLContext) -> None:
        super().__init__(address)
        if not server_name and context.check_hostname:
            server_name = addresses.text(address)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=server_name or None)

    @property
    def protocol(self) -> str | None:
        """What both sides agreed to speak (ALPN), once connected; None where the other one did not say."""
        return self._tls.selected_alpn_protocol()

    async def connect(self, port: int) -> None:
        """Connect and shake hands. Raises OSError, of which SSLError is one."""
        await super().connect(port)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                self._fill(await super().receive())
            else:
                await self._flush()
                return

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError."""
        self._tls.write(data)
        await self._flush()

    async def receive(self) -> bytes:
        """What comes next, nothing at the end. Raises OSError."""
        while True:
            try:
                return self._tls.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()
                self._fill(await super().receive())
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def _flush(self) -> None:
        if data := self._out.read():
            await super().send(data)

    def _fill(self, data: bytes) -> None:
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()
