"""Connections that talk for as long as they are left to, and notice whatever befalls them.

A process of its own, run with -I -S in a place of the lab. Its argument is a JSON object:

    {"to": [[KIND, ADDRESS, PORT, COUNT], ...], "pause_s": 0.2}

KIND is `tcp`, `udp` (a connected socket) or `sendto` (one that is not). Each connection asks
the lab's server who it is and whom it sees, over and over. The backend that answered first,
and the address and port that it saw, must stay: another answer means that another backend was
chosen or that the connection was translated anew. Questions are numbered by their order: a
datagram may be asked for twice more before it counts as broken, and is counted as lost.

It prints one line when all are open, and on each line that it reads one JSON object:
{"open", "broken": {why: count}, "lost", "asked"}. It ends with its input.
"""

import contextlib
import errno
import json
import select
import socket
import sys
import time
import typing

WAIT_S = 1.0
TRIES = 3


class Connection:
    """One of them."""

    def __init__(self, kind: str, address: str, port: int) -> None:
        self.kind, self.place = kind, (address, port)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        self.socket.settimeout(10.0)
        if kind != "sendto":
            try:
                self.socket.connect(self.place)
            except OSError as error:
                raise OSError(f"{kind} to {address} port {port}: {error}") from error
        self.first: bytes | None = None
        self.broken = ""
        self.lost = self.asked = 0

    def send(self) -> None:
        if self.kind == "sendto":
            self.socket.sendto(b"?\n", self.place)
        else:
            self.socket.send(b"?\n")
        self.asked += 1

    def take(self) -> None:
        if self.kind == "sendto":
            answer, sender = self.socket.recvfrom(4096)
            if sender[:2] != self.place:
                self.broken = f"answered by {sender[0]}"
        else:
            answer = self.socket.recv(4096)
        if not answer:
            self.broken = "closed"
        elif self.first is None:
            self.first = answer
        elif answer != self.first:
            self.broken = f"{self.first.decode().strip()} became {answer.decode().strip()}"


def guarded(connection: Connection, action: typing.Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        connection.broken = errno.errorcode.get(error.errno or 0, type(error).__name__)


def ask(connections: list[Connection]) -> None:
    """One question on each that is whole."""
    waiting: dict[int, Connection] = {}
    for one in connections:
        if not one.broken:
            guarded(one, one.send)
        if not one.broken:
            waiting[one.socket.fileno()] = one
    for attempt in range(TRIES):
        due_s = time.monotonic() + WAIT_S * (1 if attempt < TRIES - 1 else 3)
        poll = select.poll()
        for number in waiting:
            poll.register(number, select.POLLIN)
        while waiting and time.monotonic() < due_s:
            for number, _ in poll.poll(max(0.0, due_s - time.monotonic()) * 1000):
                one = waiting.pop(number)
                poll.unregister(number)
                guarded(one, one.take)
        if attempt == TRIES - 1:
            break
        for number, one in list(waiting.items()):
            if one.kind != "tcp":
                one.lost += 1
                guarded(one, one.send)
                if one.broken:
                    del waiting[number]
    for one in waiting.values():
        one.broken = "no answer"


def report(connections: list[Connection]) -> dict[str, object]:
    broken: dict[str, int] = {}
    for one in connections:
        if one.broken:
            why = f"{one.kind} {one.place[0]}:{one.place[1]} {one.broken}"
            broken[why] = broken.get(why, 0) + 1
    return {
        "open": sum(not one.broken for one in connections),
        "broken": broken,
        "lost": sum(one.lost for one in connections),
        "asked": sum(one.asked for one in connections),
    }


def main() -> None:
    order = json.loads(sys.argv[1])
    connections = []
    for kind, address, port, count in order["to"]:
        for _ in range(count):
            connections.append(Connection(kind, address, port))
    ask(connections)
    print(json.dumps(report(connections)), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            ask(connections)
            if select.select([sys.stdin], [], [], order["pause_s"])[0]:
                if not sys.stdin.readline():
                    return
                # Once more from here: what has just been done to them shows in the answer.
                ask(connections)
                print(json.dumps(report(connections)), flush=True)


if __name__ == "__main__":
    main()
