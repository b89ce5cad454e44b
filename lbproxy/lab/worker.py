"""Socket calls on behalf of a test, made where this program runs, with the standard library alone.

Reads one JSON object a line, `{"do": …, …}`, and answers each with one line:
`{"ok": …}`, or `{"errno": n}` when the call failed. Sockets stay open between
lines and are named by number. Bytes travel as Latin-1 text.
"""

import errno
import json
import os
import select
import socket
import struct
import sys
import typing

Request = dict[str, typing.Any]


class Worker:
    """The open sockets, and what can be done with them; all waiting ends at the request's `timeout_s`."""

    def __init__(self) -> None:
        self.sockets: dict[int, socket.socket] = {}

    def handle(self, request: Request) -> object:
        """Do one request and return what goes into `ok`."""
        action = getattr(self, f"_{request['do']}")
        return action(request)

    def _open(self, request: Request) -> int:
        family = socket.AF_INET if request["family"] == 4 else socket.AF_INET6
        kind = socket.SOCK_DGRAM if request["udp"] else socket.SOCK_STREAM
        opened = socket.socket(family, kind)
        opened.setblocking(not request["nonblocking"])
        number = opened.fileno()
        self.sockets[number] = opened
        return number

    def _connect(self, request: Request) -> None:
        chosen, timeout_s = self._limited(request)
        code = chosen.connect_ex((request["address"], request["port"]))
        if code == errno.EINPROGRESS:
            # A blocking socket says so too, when its send timeout has passed.
            code = errno.ETIMEDOUT if chosen.getblocking() else _outcome(chosen, timeout_s)
        if code:
            raise OSError(code, os.strerror(code))

    def _bind(self, request: Request) -> None:
        self.sockets[request["socket"]].bind((request["address"], request["port"]))

    def _send(self, request: Request) -> int:
        chosen, _ = self._limited(request)
        return chosen.send(request["data"].encode("latin-1"))

    def _sendto(self, request: Request) -> int:
        chosen, _ = self._limited(request)
        return chosen.sendto(request["data"].encode("latin-1"), (request["address"], request["port"]))

    def _recv(self, request: Request) -> list[object]:
        chosen, timeout_s = self._limited(request)
        readable, _, _ = select.select([chosen], [], [], timeout_s)
        if not readable:
            raise TimeoutError(errno.ETIMEDOUT, "nothing came")
        data, sender = chosen.recvfrom(65536)
        return [data.decode("latin-1"), list(sender[:2]) if sender else None]

    def _getpeername(self, request: Request) -> list[object]:
        return list(self.sockets[request["socket"]].getpeername()[:2])

    def _getsockname(self, request: Request) -> list[object]:
        return list(self.sockets[request["socket"]].getsockname()[:2])

    def _close(self, request: Request) -> None:
        self.sockets.pop(request["socket"]).close()

    def _where(self, request: Request) -> list[str]:
        """Say which namespace and cgroup this process is in."""
        with open("/proc/self/cgroup", encoding="utf-8") as lines:
            unified = next(line[3:].rstrip("\n") for line in lines if line.startswith("0::"))
        return [os.readlink("/proc/self/ns/net"), unified]

    def _limited(self, request: Request) -> tuple[socket.socket, float]:
        chosen = self.sockets[request["socket"]]
        timeout_s = float(request["timeout_s"])
        seconds, fraction = divmod(timeout_s, 1)
        limit = struct.pack("ll", int(seconds), int(fraction * 1_000_000))
        chosen.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return chosen, timeout_s


def _outcome(connecting: socket.socket, timeout_s: float) -> int:
    _, writable, _ = select.select([], [connecting], [], timeout_s)
    if not writable:
        return errno.ETIMEDOUT
    return connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def main() -> None:
    """Serve requests until standard input ends."""
    worker = Worker()
    for line in sys.stdin:
        try:
            reply: dict[str, object] = {"ok": worker.handle(json.loads(line))}
        except OSError as error:
            reply = {"errno": error.errno or errno.EIO}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
