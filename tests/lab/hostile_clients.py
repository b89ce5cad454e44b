"""Clients that mean no good, run as a script: python -m tests.lab.hostile_clients HOST PORT[,PORT...] COUNT.

So many connections are held to each port, of every kind in turn; whichever is cut off is made anew.
Prints a line once each has been connected, and goes on until it is ended.
"""

import asyncio
import collections.abc
import contextlib
import sys

HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
AGAIN_S = 0.2
Writer = asyncio.StreamWriter


async def slow(writer: Writer) -> None:
    """A byte a second, for as long as the request is never complete."""
    while True:
        for byte in HEAD:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1)


async def silent(_writer: Writer) -> None:
    """Connected, and nothing more."""
    await asyncio.Event().wait()


async def headers(writer: Writer) -> None:
    """One request with headers without end."""
    writer.write(HEAD)
    while True:
        writer.write(b"X-Header: " + b"x" * 4000 + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def pipelined(writer: Writer) -> None:
    """Requests one after another, whose answers are not read."""
    while True:
        writer.write((HEAD + b"\r\n") * 1000)
        await writer.drain()
        await asyncio.sleep(0.01)


async def body(writer: Writer) -> None:
    """A body without end."""
    writer.write(b"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


Kind = collections.abc.Callable[[Writer], collections.abc.Awaitable[None]]
# Most are slow or silent. A few that send all they can keep one CPU busy.
KINDS: tuple[Kind, ...] = (*(slow, silent) * 48, headers, pipelined, body, slow)


async def again(host: str, port: int, kind: Kind, connected: asyncio.Event) -> None:
    """Be such a client, and whenever that is over, once more."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            connected.set()
            try:
                await kind(writer)
            finally:
                writer.close()
        await asyncio.sleep(AGAIN_S)


async def main() -> None:
    """Begin with all, say so once each has been connected, and go on."""
    host, ports, count = sys.argv[1:]
    async with asyncio.TaskGroup() as tasks:
        events = []
        for port in ports.split(","):
            for number in range(int(count)):
                events.append(asyncio.Event())
                tasks.create_task(again(host, int(port), KINDS[number % len(KINDS)], events[-1]))
        for event in events:
            await event.wait()
        print("connected", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
