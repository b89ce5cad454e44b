"""One question of grpc.health.v1: is this service serving? Frames in, frames out, no socket.

HTTP/2 (RFC 9113), which the server is taken to speak where there is no TLS to agree on it, as
gRPC clients do.
There is one connection for each question, so that a server which takes no new ones
is found out. Whatever a server sends, it ends in an answer: nothing raises. Written here
since a library that keeps whole connections costs ten times the processor time
(300 µs a question) and 5 MB.
"""

import typing

from lbproxy.core import header_block

LONGEST_BYTES: typing.Final = 65536  # of everything that a server sends
MOST_FRAMES: typing.Final = 1000
MOST_BLOCKS: typing.Final = 4  # of headers: two of an answer, and what may come before it

_PATH: typing.Final = b"/grpc.health.v1.Health/Check"
_PREFACE: typing.Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
# A header table of 0 bytes, no pushes.
_OUR_SETTINGS: typing.Final = b"\0\1\0\0\0\0" + b"\0\2\0\0\0\0"
_WANTED: typing.Final = frozenset([b":status", b"grpc-status"])
_FRAME_HEAD: typing.Final = 9
_LONGEST_FRAME: typing.Final = 16384
_SERVING: typing.Final = 1
_STATUSES: typing.Final = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_CODES: typing.Final = {
    b"1": "CANCELLED",
    b"2": "UNKNOWN",
    b"4": "DEADLINE_EXCEEDED",
    b"5": "NOT_FOUND: it does not know this service",
    b"7": "PERMISSION_DENIED",
    b"8": "RESOURCE_EXHAUSTED",
    b"12": "UNIMPLEMENTED: it has no health service",
    b"13": "INTERNAL",
    b"14": "UNAVAILABLE",
    b"16": "UNAUTHENTICATED",
}


class _Broken(Exception):  # noqa: N818 - how reading a frame ends early
    """The server has said what does not let us go on."""


class Exchange:
    """Send `request`, give `receive` what comes and send what it returns, until there is an `answer`."""

    def __init__(self, authority: str, service: str, *, over_tls: bool = False) -> None:
        self._over_tls = over_tls
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https" if over_tls else b"http"),
            (b":path", _PATH),
            (b":authority", authority.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"user-agent", b"lbproxy-probe"),
        ]
        self.request = (
            _PREFACE
            + _frame(_SETTINGS, 0, 0, _OUR_SETTINGS)
            + _frame(_HEADERS, _END_HEADERS, 1, header_block.encode(headers))
            + _frame(_DATA, _END_STREAM, 1, _question(service))
        )
        self.answer: str | None = None  # empty: it is serving; else why not
        self._buffer = bytearray()
        self._received = self._frames_seen = self._blocks = 0
        self._block: bytearray | None = None  # of headers that go on in the next frame
        self._ends = False  # whether those headers are the last
        self._headers: dict[bytes, bytes] = {}
        self._message = bytearray()

    def receive(self, data: bytes) -> bytes:
        """Take what has come, nothing where the connection was closed; returns what is to be sent."""
        if self.answer is not None:
            return b""
        if not data:
            self.answer = "closed the connection without an answer"
            return b""
        self._received += len(data)
        self._buffer += data
        try:
            if self._received > LONGEST_BYTES:
                raise _Broken("said more than an answer is long")
            return b"".join(self._frames())
        except header_block.BlockError as error:
            self.answer = f"sent {error}"
        except _Broken as broken:
            self.answer = str(broken)
        return b""

    def _frames(self) -> typing.Iterator[bytes]:
        while self.answer is None and len(self._buffer) >= _FRAME_HEAD:
            length = int.from_bytes(self._buffer[:3], "big")
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big") & 0x7FFFFFFF
            if length > _LONGEST_FRAME:
                raise _Broken(f"does not speak HTTP/2{'' if self._over_tls else ' without TLS'}")
            if len(self._buffer) < _FRAME_HEAD + length:
                return
            payload = bytes(self._buffer[_FRAME_HEAD : _FRAME_HEAD + length])
            del self._buffer[: _FRAME_HEAD + length]
            self._frames_seen += 1
            if self._frames_seen > MOST_FRAMES:
                raise _Broken("said more than an answer is long")
            yield self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        if (self._block is not None) != (kind == _CONTINUATION):
            raise _Broken("sent frames out of order")
        if kind == _SETTINGS and not flags & _ACK:
            return _frame(_SETTINGS, _ACK, 0, b"")
        if kind == _PING and not flags & _ACK:
            return _frame(_PING, _ACK, 0, payload)
        if kind == _GOAWAY:
            last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
            if last < 1:
                raise _Broken(f"refused the connection ({_number(payload[4:8])})")
        elif stream != 1:
            pass
        elif kind == _RST_STREAM:
            raise _Broken(f"reset the request ({_number(payload[:4])})")
        elif kind == _DATA:
            self._message += _unpadded(flags, payload)
            self._end_if(flags & _END_STREAM)
        elif kind == _HEADERS:
            block = _unpadded(flags, payload)
            self._block = bytearray(block[5:] if flags & _PRIORITY else block)
            self._ends = bool(flags & _END_STREAM)
            self._end_of_headers_if(flags & _END_HEADERS)
        elif kind == _CONTINUATION and self._block is not None:
            self._block += payload
            self._end_of_headers_if(flags & _END_HEADERS)
        return b""

    def _end_of_headers_if(self, end: int) -> None:
        if end and self._block is not None:
            self._blocks += 1
            if self._blocks > MOST_BLOCKS:
                raise _Broken("said more than an answer is long")
            self._headers.update(header_block.decode(bytes(self._block), _WANTED))
            self._block = None
            self._end_if(self._ends)

    def _end_if(self, end: int) -> None:
        if not end:
            return
        status, code = self._headers.get(b":status"), self._headers.get(b"grpc-status")
        if status != b"200":
            self.answer = f"HTTP status {_shown(status)}"
        elif code not in (None, b"0"):
            self.answer = f"gRPC status {_CODES.get(code or b'') or _shown(code)}"
        else:
            self.answer = _verdict(bytes(self._message))


def _verdict(message: bytes) -> str:
    """What a HealthCheckResponse says, with the five bytes that gRPC puts in front."""
    if len(message) < 5 or message[0] or int.from_bytes(message[1:5], "big") != len(message) - 5:
        return "answered with no message"
    number = _status(message[5:])
    if number == _SERVING:
        return ""
    return f"is {_STATUSES[number] if 0 <= number < len(_STATUSES) else 'no message of health'}"


def _status(message: bytes) -> int:
    """Field 1 of a protobuf message, 0 where it is not there; -1 where this is no message."""
    found = at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            found = value if key >> 3 == 1 else found
        elif wire_type == 2:
            length, at = _varint(message, at)
            at += length
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        else:
            return -1
        if at < 0:
            return -1
    return found if at == len(message) else -1


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; far below 0 where it does not."""
    number = 0
    for shift in range(0, 70, 7):
        if not 0 <= at < len(message):
            break
        number |= (message[at] & 0x7F) << shift
        at += 1
        if not message[at - 1] & 0x80:
            return number, at
    return 0, -(1 << 80)


def _question(service: str) -> bytes:
    name = service.encode()
    message = b"" if not name else b"\x0a" + _varint_of(len(name)) + name
    return b"\0" + len(message).to_bytes(4, "big") + message


def _varint_of(number: int) -> bytes:
    packed = bytearray()
    while number >= 128:
        packed.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*packed, number])


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _Broken("sent a frame that is all padding")
    return payload[1 : len(payload) - payload[0]]


def _number(packed: bytes) -> str:
    return f"error {int.from_bytes(packed, 'big')}"


def _shown(text: bytes | None) -> str:
    return "missing" if text is None else ascii(text[:40].decode("latin-1"))
