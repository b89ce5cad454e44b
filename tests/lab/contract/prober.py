"""Dials many addresses at once from where it runs, with the standard library alone, and says who answered.

Reads one JSON line, a list of chains. A chain is a list of jobs to be done one after
another; chains go side by side. A job: `address`, `port`, `udp`, `timeout_s`, how many
different servers are `wanted`, and how often to dial at least and at most; `sendto`
says to use unconnected UDP sockets every other time. Writes one JSON line: for each
chain and job a list of [outcome, client address as the server saw it, how often].
"""

import collections
import errno
import json
import os
import selectors
import socket
import sys
import time
import typing

WINDOW = 48
QUESTION = b"?\n"
ERRORS_TO_END = 2
Job = dict[str, typing.Any]


class Attempt:
    """One connection or datagram on its way."""

    def __init__(self, job: Job, number: int) -> None:
        self.dialled = (job["address"], job["port"])
        self.udp = job["udp"]
        self.connected = not (job.get("sendto") and number % 2)
        self.deadline = time.monotonic() + job["timeout_s"]
        self.asked = False
        self.answer = b""
        family = socket.AF_INET6 if ":" in job["address"] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM if self.udp else socket.SOCK_STREAM)
        self.socket.setblocking(False)

    def start(self) -> int:
        """Dial; what to wait for."""
        if self.udp:
            if self.connected:
                self.socket.connect(self.dialled)
                self.socket.send(QUESTION)
            else:
                self.socket.sendto(QUESTION, self.dialled)
            return selectors.EVENT_READ
        code = self.socket.connect_ex(self.dialled)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        return selectors.EVENT_WRITE

    def go_on(self) -> bool:
        """Do what has become possible; whether it is finished."""
        if self.udp:
            self.answer, sender = self.socket.recvfrom(512)
            return self._finish(self.socket.getpeername() if self.connected else sender)
        if not self.asked:
            code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self.socket.send(QUESTION)
            self.asked = True
            return False
        part = self.socket.recv(512)
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "closed before it answered")
        self.answer += part
        return self.answer.endswith(b"\n") and self._finish(self.socket.getpeername())

    def _finish(self, peer: tuple[typing.Any, ...]) -> bool:
        if tuple(peer[:2]) != self.dialled:
            self.answer = f"answered-by-{peer[0]}-{peer[1]} ? 0\n".encode()
        return True


class Chain:
    """Jobs in order, and what came of them."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.results: list[collections.Counter[tuple[str, str]]] = []

    def next(self) -> "Attempt | None":
        """Return the next attempt to make; None at the end of the chain."""
        if not self.results:
            self.results.append(collections.Counter())
        while self._is_done():
            if len(self.results) == len(self.jobs):
                return None
            self.results.append(collections.Counter())
        return Attempt(self.jobs[len(self.results) - 1], self.results[-1].total())

    def note(self, outcome: str, seen: str = "") -> None:
        """Record how an attempt ended."""
        self.results[-1][outcome, seen] += 1

    def _is_done(self) -> bool:
        job, result = self.jobs[len(self.results) - 1], self.results[-1]
        failed = sum(count for (_, seen), count in result.items() if not seen)
        servers = {outcome for outcome, seen in result if seen}
        done = result.total()
        return (
            failed >= ERRORS_TO_END
            or done >= job["at_most"]
            or (done >= job["at_least"] and len(servers) >= job["wanted"] > 0)
        )


def run(chains: list[Chain]) -> None:
    """Go through all chains, so many at a time."""
    waiting = collections.deque(chains)
    under_way: dict[Chain, Attempt] = {}
    selector = selectors.DefaultSelector()

    def begin(chain: Chain) -> None:
        while attempt := chain.next():
            try:
                selector.register(attempt.socket, attempt.start(), chain)
            except OSError as error:
                chain.note(errno.errorcode.get(error.errno or 0, str(error)))
                attempt.socket.close()
                continue
            under_way[chain] = attempt
            return

    def end(chain: Chain, outcome: str, seen: str = "") -> None:
        attempt = under_way.pop(chain)
        selector.unregister(attempt.socket)
        attempt.socket.close()
        chain.note(outcome, seen)
        begin(chain)

    while waiting or under_way:
        while waiting and len(under_way) < WINDOW:
            begin(waiting.popleft())
        if not under_way:
            continue
        first = min(attempt.deadline for attempt in under_way.values())
        for key, _ in selector.select(max(0.0, first - time.monotonic())):
            chain, attempt = key.data, under_way[key.data]
            try:
                if attempt.go_on():
                    server, seen, _ = attempt.answer.decode().rsplit(" ", 2)
                    end(chain, server, seen)
                elif attempt.asked:
                    selector.modify(attempt.socket, selectors.EVENT_READ, chain)
            except OSError as error:
                end(chain, errno.errorcode.get(error.errno or 0, str(error)))
        now = time.monotonic()
        for chain in [one for one, attempt in under_way.items() if attempt.deadline <= now]:
            end(chain, "ETIMEDOUT")


def main() -> None:
    """Serve one line."""
    chains = [Chain(jobs) for jobs in json.loads(sys.stdin.readline())]
    run(chains)
    results = [
        [[[*outcome, count] for outcome, count in result.items()] for result in chain.results]
        for chain in chains
    ]
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
