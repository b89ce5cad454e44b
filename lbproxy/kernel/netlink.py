"""Requests to the kernel over netlink, in the network namespace of the thread that asks.

pyroute2 knows neither all of them nor how to do without ten megabytes.
"""

import collections.abc
import contextlib
import os
import socket
import struct
import sys
import typing

_REQUEST: typing.Final = 0x1
_ACK: typing.Final = 0x4
_DUMP: typing.Final = 0x300
_ERROR: typing.Final = 2
_DONE: typing.Final = 3
_DUMP_INTERRUPTED: typing.Final = 0x10
_BATCH_BEGIN: typing.Final = 0x10
_BATCH_END: typing.Final = 0x11
_NESTED: typing.Final = 0x8000
_NUMBER: typing.Final = 0x3FFF  # of an attribute, without what is said of its value
_BATCH_GENERATION: typing.Final = 1
_SO_SNDBUFFORCE: typing.Final = 32
_LAST: typing.Final = 2  # sequence number of a batch's last request; all others have 1
SEVERAL_TRIES: typing.Final = 4  # to be told of everything while nothing changes
_RECEIVE_BYTES: typing.Final = 65536
_TIMEOUT_S: typing.Final = 10.0
_HEADER: typing.Final = struct.Struct("=IHHII")  # nlmsghdr
_ATTRIBUTE: typing.Final = struct.Struct("=HH")  # nlattr


class Netlink:
    """A netlink socket, to be used in a `with`."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT_S)
        self.torn = False  # there were changes during the last dump: what was there throughout may be missing

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, request: bytes) -> collections.abc.Iterator[bytes]:
        """What each message of a dump holds; `torn` is of all of them, once they are read. Raises OSError."""
        self._send(kind, _DUMP, request)
        self.torn = False
        while True:
            answer = self._socket.recv(_RECEIVE_BYTES)
            for answered, start, end, flags in messages(answer):
                self.torn |= bool(flags & _DUMP_INTERRUPTED)
                if answered == _DONE:
                    return
                if answered == _ERROR:
                    _check(answer[start:end])
                else:
                    yield answer[start:end]

    def dump_again(self, kind: int, request: bytes) -> tuple[bytes, ...]:
        """What each message of a dump holds, asked for again where there were changes. Raises OSError.

        Where the changes do not cease, all that was told of counts.
        """
        seen: dict[bytes, None] = {}
        for _ in range(SEVERAL_TRIES):
            now = dict.fromkeys(self.dump(kind, request))
            if not self.torn:
                return tuple(now)
            seen |= now
        return tuple(seen)

    def request(self, kind: int, request: bytes, flags: int = 0) -> None:
        """Have something done. Raises OSError with the kernel's reason where it is not."""
        self._send(kind, _ACK | flags, request)
        answer = self._socket.recv(_RECEIVE_BYTES)
        for answered, start, end, _ in messages(answer):
            if answered == _ERROR:
                _check(answer[start:end])

    def get(self, kind: int, request: bytes) -> bytes:
        """What the one message holds that answers. Raises OSError."""
        self._send(kind, 0, request)
        answered, start, end, _ = next(messages(answer := self._socket.recv(_RECEIVE_BYTES)))
        if answered == _ERROR:
            _check(answer[start:end])
        return answer[start:end]

    def batch(
        self,
        subsystem: int,
        requests: collections.abc.Sequence[tuple[int, int, bytes]],
        generation: int = 0,
    ) -> None:
        """Have several things of a netfilter subsystem done at once, or none.

        Of each: kind, flags and payload. With a generation only where nobody has changed anything
        since (else ERESTART). Raises OSError with the kernel's reason for the first one that it does
        not take.
        """
        if not requests:
            return
        ends = struct.pack("=BBH", 0, 0, socket.htons(subsystem))
        since = attribute(_BATCH_GENERATION, generation.to_bytes(4, "big")) if generation else b""
        *first, last = requests
        packed = [_packed(_BATCH_BEGIN, _REQUEST, ends + since)]
        packed += [_packed(kind, _REQUEST | flags, request) for kind, flags, request in first]
        # Of what goes well only the last is told: there is no room for an answer to each.
        packed.append(_packed(last[0], _REQUEST | _ACK | last[1], last[2], _LAST))
        whole = b"".join((*packed, _packed(_BATCH_END, _REQUEST, ends)))
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * len(whole))
        self._socket.send(whole)
        while True:
            answer = self._socket.recv(_RECEIVE_BYTES)
            for answered, start, end, _ in messages(answer):
                if answered == _ERROR:
                    _check(answer[start:end])
                    if _HEADER.unpack_from(answer, start + 4)[3] == _LAST:
                        return

    def _send(self, kind: int, flags: int, request: bytes) -> None:
        self._socket.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST | flags, 1, 0) + request)


def _packed(kind: int, flags: int, request: bytes, sequence: int = 1) -> bytes:
    size = _HEADER.size + len(request)
    return _HEADER.pack(size, kind, flags, sequence, 0) + request + bytes(aligned(size) - size)


def attribute(number: int, value: bytes | collections.abc.Iterable[bytes]) -> bytes:
    """Pack an attribute: of bytes, or one that holds others."""
    if not isinstance(value, bytes):
        number, value = number | _NESTED, b"".join(value)
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, number) + value + bytes(aligned(size) - size)


def attributes(packed: bytes) -> dict[int, bytes]:
    """The attributes that follow a message's fixed part, by number."""
    return dict(each_attribute(packed))


def each_attribute(packed: bytes) -> collections.abc.Iterator[tuple[int, bytes]]:
    """Number and value of each attribute, where one may be there more than once."""
    at = 0
    while at + _ATTRIBUTE.size <= len(packed):
        length, number = _ATTRIBUTE.unpack_from(packed, at)
        yield number & _NUMBER, packed[at + _ATTRIBUTE.size : at + length]
        at += max(aligned(length), _ATTRIBUTE.size)


def messages(answer: bytes) -> collections.abc.Iterator[tuple[int, int, int, int]]:
    """Kind of each message in a datagram, where its payload begins and ends, and its flags."""
    at = 0
    while at + _HEADER.size <= len(answer):
        length, kind, flags, _, _ = _HEADER.unpack_from(answer, at)
        yield kind, at + _HEADER.size, at + length, flags
        at += max(aligned(length), _HEADER.size)


def aligned(length: int) -> int:
    """How far what comes next is from where something of this length begins."""
    return (length + 3) & ~3


def _check(message: bytes) -> None:
    number = -int.from_bytes(message[:4], sys.byteorder, signed=True)
    if number:
        raise OSError(number, os.strerror(number))
