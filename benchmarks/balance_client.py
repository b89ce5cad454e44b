"""Clients in a closed loop: each connects, asks, is answered, closes, pauses, and begins again.

    python3 balance_client.py ADDRESS PORT CLIENTS PAUSE_MS SECONDS

Prints one JSON line: how many were answered by whom, how many failed, and each time from socket
to close in µs. In the standard library alone, since it runs in a pod of the lab.
"""

import asyncio
import json
import socket
import sys
import time

_TIMEOUT_S = 5.0


class Clients:
    """All of them, and what they saw."""

    def __init__(self, address: str, port: int, pause_s: float, until_s: float) -> None:
        self._to = (address, port)
        self._pause_s = pause_s
        self._until_s = until_s
        self.servers: dict[str, int] = {}
        self.failed = 0
        self.took_us: list[float] = []

    async def one(self, first_s: float) -> None:
        """Go on until the time is up; begins after `first_s`, so that not all come at once."""
        await asyncio.sleep(first_s)
        while time.monotonic() < self._until_s:
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    name = await self._ask()
            except (OSError, TimeoutError):
                self.failed += 1
            else:
                self.servers[name] = self.servers.get(name, 0) + 1
                self.took_us.append((time.monotonic() - began_s) * 1e6)
            await asyncio.sleep(self._pause_s)

    async def _ask(self) -> str:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as opened:
            opened.setblocking(False)
            await loop.sock_connect(opened, self._to)
            await loop.sock_sendall(opened, b"?\n")
            answer = b""
            while not answer.endswith(b"\n"):
                part = await loop.sock_recv(opened, 256)
                if not part:
                    raise ConnectionResetError
                answer += part
        return answer.split()[0].decode()


async def main(address: str, port: int, clients: int, pause_s: float, seconds: float) -> None:
    """Run them and print what they saw."""
    began_s = time.monotonic()
    found = Clients(address, port, pause_s, began_s + seconds)
    await asyncio.gather(*(found.one(pause_s * number / clients) for number in range(clients)))
    took_s = time.monotonic() - began_s
    print(json.dumps({"servers": found.servers, "failed": found.failed, "seconds": took_s,
                      "took_us": [round(each) for each in found.took_us]}))  # fmt: skip


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]) / 1e3, float(sys.argv[5]))
    )
