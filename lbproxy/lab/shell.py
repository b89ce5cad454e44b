"""Real sockets in a place of the lab, driven from a test: the near end of `lbproxy.lab.worker`.

A call that fails there raises the same `OSError` here, so a test can expect
`ConnectionRefusedError`. Blocking sockets block in the kernel; every wait has a
timeout, and ends in `TimeoutError`.
"""

import dataclasses
import errno
import json
import os
import pathlib
import select
import subprocess
import sys
import types
import typing

TIMEOUT_S = 5.0
# What a reply may take beyond the call's own timeout, on a machine with better things to do.
REPLY_GRACE_S = 30.0

WORKER = pathlib.Path(__file__).with_name("worker.py")
ARGV = (sys.executable, "-I", "-S", str(WORKER))

Address = tuple[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What became of one question; `error` is an errno's name, "" when there was an answer."""

    server: str = ""  # the name of the server that answered
    peer: Address | None = None  # getpeername, or for unconnected UDP whom the answer came from
    local: Address | None = None
    seen: Address | None = None  # the client's address as the server sees it
    error: str = ""


class Socket:
    """A socket in the shell's namespace and cgroup; closes at the end of a `with`."""

    def __init__(self, shell: "Shell", number: int) -> None:
        self._shell = shell
        self._number = number

    def connect(self, address: str, port: int, timeout_s: float = TIMEOUT_S) -> None:
        """Connect; a non-blocking socket starts, waits until it can be written and takes its error."""
        self._call("connect", timeout_s, address=address, port=port)

    def bind(self, address: str, port: int = 0) -> None:
        """Bind to a local address."""
        self._call("bind", address=address, port=port)

    def send(self, data: bytes, timeout_s: float = TIMEOUT_S) -> int:
        """Send on a connected socket; the number of bytes taken."""
        return int(self._call("send", timeout_s, data=data.decode("latin-1")))

    def sendto(self, data: bytes, address: str, port: int, timeout_s: float = TIMEOUT_S) -> int:
        """Send a datagram to an address."""
        text = data.decode("latin-1")
        return int(self._call("sendto", timeout_s, data=text, address=address, port=port))

    def recv(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """Receive what is there, b"" at the end of a stream."""
        return self.recvfrom(timeout_s)[0]

    def recvfrom(self, timeout_s: float = TIMEOUT_S) -> tuple[bytes, Address | None]:
        """Receive a datagram and whom it came from (None for a stream)."""
        data, sender = self._call("recv", timeout_s)
        return data.encode("latin-1"), (sender[0], sender[1]) if sender else None

    def getpeername(self) -> Address:
        """Return the peer's address as the application sees it."""
        address, port = self._call("getpeername")
        return address, port

    def getsockname(self) -> Address:
        """Return the local address."""
        address, port = self._call("getsockname")
        return address, port

    def ask(self, timeout_s: float = TIMEOUT_S) -> Answer:
        """Ask the lab server on this connected socket who it is; raises OSError."""
        self.send(b"?\n", timeout_s)
        answer = b""
        while not answer.endswith(b"\n"):
            part = self.recv(timeout_s)
            if not part:
                raise ConnectionResetError(errno.ECONNRESET, "closed before it answered")
            answer += part
        server, seen = parse_identity(answer)
        return Answer(server, self.getpeername(), self.getsockname(), seen)

    def close(self) -> None:
        """Close it; closing twice is harmless."""
        if self._number >= 0:
            self._call("close")
            self._number = -1

    def __enter__(self) -> "Socket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self.close()

    def _call(self, action: str, timeout_s: float = TIMEOUT_S, **arguments: object) -> typing.Any:
        return self._shell.call(action, timeout_s, socket=self._number, **arguments)


class Shell:
    """A process in one place of the lab that makes socket calls when told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def socket(
        self, family: int = 4, *, udp: bool = False, mapped: bool = False, nonblocking: bool = False
    ) -> Socket:
        """Open a socket of family 4 or 6; `mapped` makes it an IPv6 one for `::ffff:` addresses."""
        number = self.call(
            "open", TIMEOUT_S, family=6 if mapped else family, udp=udp, nonblocking=nonblocking
        )
        return Socket(self, int(number))

    def open(
        self, address: str, port: int, *, udp: bool = False, mapped: bool = False,
        nonblocking: bool = False, timeout_s: float = TIMEOUT_S,
    ) -> Socket:  # fmt: skip
        """Connect and keep the connection; raises OSError."""
        opened = self.socket(family_of(address), udp=udp, mapped=mapped, nonblocking=nonblocking)
        try:
            opened.connect(as_mapped(address) if mapped else address, port, timeout_s)
        except OSError:
            opened.close()
            raise
        return opened

    def tcp(
        self, address: str, port: int, *, mapped: bool = False, nonblocking: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer:  # fmt: skip
        """Connect, ask who answers, close; an error becomes `Answer.error`."""
        return self._question(
            address, port, udp=False, mapped=mapped, nonblocking=nonblocking, timeout_s=timeout_s
        )

    def udp(
        self, address: str, port: int, *, connected: bool = True, mapped: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer:  # fmt: skip
        """Ask by datagram who answers, on a connected socket or by sendto and recvfrom."""
        if connected:
            return self._question(
                address, port, udp=True, mapped=mapped, nonblocking=False, timeout_s=timeout_s
            )
        with self.socket(family_of(address), udp=True, mapped=mapped) as opened:
            try:
                opened.sendto(b"?\n", as_mapped(address) if mapped else address, port, timeout_s)
                data, sender = opened.recvfrom(timeout_s)
            except OSError as error:
                return Answer(error=error_name(error))
            server, seen = parse_identity(data)
            return Answer(server, sender, opened.getsockname(), seen)

    def where(self) -> tuple[str, str]:
        """Return the network namespace (`net:[…]`) and the cgroup v2 path this process is in."""
        namespace, cgroup = self.call("where", TIMEOUT_S)
        return namespace, cgroup

    def call(self, action: str, timeout_s: float, **arguments: object) -> typing.Any:
        """Have the worker do one thing and return its result, or raise its OSError."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"do": action, "timeout_s": timeout_s, **arguments}) + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], timeout_s + REPLY_GRACE_S)[0]:
            raise RuntimeError(f"the lab's worker does not answer to {action} {arguments}")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the lab's worker ended on {action} {arguments}")
        reply = json.loads(line)
        if "errno" in reply:
            raise OSError(reply["errno"], os.strerror(reply["errno"]))
        return reply["ok"]

    def close(self) -> None:
        """End the process, and with it every socket it holds."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def __enter__(self) -> "Shell":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self.close()

    def _question(
        self, address: str, port: int, *, udp: bool, mapped: bool, nonblocking: bool, timeout_s: float
    ) -> Answer:
        try:
            with self.open(
                address, port, udp=udp, mapped=mapped, nonblocking=nonblocking, timeout_s=timeout_s
            ) as opened:
                return opened.ask(timeout_s)
        except OSError as error:
            return Answer(error=error_name(error))


def parse_identity(answer: bytes) -> tuple[str, Address]:
    """Split a lab server's answer to `?` into its name and the client address it saw."""
    name, address, port = answer.decode().rstrip("\n").rsplit(" ", 2)
    return name, (address, int(port))


def error_name(error: OSError) -> str:
    """Return an error's symbolic name, such as ECONNREFUSED."""
    return errno.errorcode.get(error.errno or 0, str(error))


def family_of(address: str) -> int:
    """Tell the family, 4 or 6, of an address in text form."""
    return 6 if ":" in address else 4


def as_mapped(address: str) -> str:
    """Return an IPv4 address in IPv4-mapped IPv6 form."""
    return f"::ffff:{address}"
