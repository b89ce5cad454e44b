"""An HTTP/1.1 request whose status is all that is wanted, and the reader of its answer."""

import re
import typing

from lbproxy.core import probe

LONGEST_HEAD_BYTES: typing.Final = 16384  # of a status line, or of the informational answers before it

_STATUS_LINE: typing.Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n]*)?\r?\Z")


def request(asked: probe.Probe, authority: str) -> bytes:
    """Write the request; the connection is to end with the answer."""
    return (
        f"GET {asked.text} HTTP/1.1\r\n"
        f"Host: {asked.host or authority}\r\n"
        "User-Agent: lbproxy-probe\r\n"
        "Accept: */*\r\n"
        "Connection: close\r\n\r\n"
    ).encode()


class StatusReader:
    """Give `receive` what comes until there is a `status`, or a `problem`."""

    def __init__(self) -> None:
        self.status = 0
        self.problem = ""
        self._buffer = bytearray()
        self._received = 0
        self._skips = False  # the rest of an informational answer

    @property
    def done(self) -> bool:
        """Whether there is nothing more to find out."""
        return bool(self.status or self.problem)

    def receive(self, data: bytes) -> None:
        """Take what has come; nothing where the connection was closed."""
        if not data:
            self.problem = self.problem or "closed the connection without an answer"
            return
        self._received += len(data)
        self._buffer += data
        while not self.done and (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._line(line)
        if not self.done and self._received > LONGEST_HEAD_BYTES:
            self.problem = "answered with no status line"

    def _line(self, line: bytes) -> None:
        if self._skips:
            self._skips = line not in (b"", b"\r")
            return
        found = _STATUS_LINE.match(line)
        if found is None:
            self.problem = "does not speak HTTP/1"
        elif found[1].startswith(b"1"):
            self._skips = True
        else:
            self.status = int(found[1])


def verdict(asked: probe.Probe, status: int) -> str:
    """Why a status does not pass; empty where it does."""
    return "" if asked.lowest_status <= status <= asked.highest_status else f"HTTP status {status}"
