"""Requests to the kernel over netlink, in the network namespace of the thread that asks.

pyroute2 knows neither all of them nor how to do without ten megabytes.
"""

import collections.abc
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
_RECEIVE_BYTES: typing.Final = 65536
_TIMEOUT_S: typing.Final = 10.0
_HEADER: typing.Final = struct.Struct("=IHHII")  # nlmsghdr
_ATTRIBUTE: typing.Final = struct.Struct("=HH")  # nlattr


class Netlink:
    """A netlink socket, to be used in a `with`."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT_S)

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, request: bytes) -> collections.abc.Iterator[bytes]:
        """What each message of a dump holds. Raises OSError."""
        self._send(kind, _DUMP, request)
        while True:
            answer = self._socket.recv(_RECEIVE_BYTES)
            for answered, start, end in _messages(answer):
                if answered == _DONE:
                    return
                if answered == _ERROR:
                    _check(answer[start:end])
                else:
                    yield answer[start:end]

    def request(self, kind: int, request: bytes) -> None:
        """Have something done. Raises OSError with the kernel's reason where it is not."""
        self._send(kind, _ACK, request)
        answer = self._socket.recv(_RECEIVE_BYTES)
        for answered, start, end in _messages(answer):
            if answered == _ERROR:
                _check(answer[start:end])

    def _send(self, kind: int, flags: int, request: bytes) -> None:
        self._socket.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST | flags, 1, 0) + request)


def attributes(packed: bytes) -> dict[int, bytes]:
    """The attributes that follow a message's fixed part, by number."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(packed):
        length, number = _ATTRIBUTE.unpack_from(packed, at)
        found[number] = packed[at + _ATTRIBUTE.size : at + length]
        at += max(_aligned(length), _ATTRIBUTE.size)
    return found


def _messages(answer: bytes) -> collections.abc.Iterator[tuple[int, int, int]]:
    """Kind of each message in a datagram, and where its payload begins and ends."""
    at = 0
    while at + _HEADER.size <= len(answer):
        length, kind, _, _, _ = _HEADER.unpack_from(answer, at)
        yield kind, at + _HEADER.size, at + length
        at += max(_aligned(length), _HEADER.size)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _check(message: bytes) -> None:
    number = -int.from_bytes(message[:4], sys.byteorder, signed=True)
    if number:
        raise OSError(number, os.strerror(number))
