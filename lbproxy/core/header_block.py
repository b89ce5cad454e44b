"""Header blocks of HTTP/2 (RFC 7541), as far as a client needs them that allows no dynamic table.

A client that has announced a table size of 0 is sent nothing but literals and names
of the static table: so one block can be read without those before it.
"""

import typing
from collections.abc import Iterable

Header = tuple[bytes, bytes]

LONGEST_BYTES: typing.Final = 16384  # of all names and values of a block

_STATIC: typing.Final = tuple(
    tuple(line.partition(b" ")[::2])
    for line in b"""\
:authority
:method GET
:method POST
:path /
:path /index.html
:scheme http
:scheme https
:status 200
:status 204
:status 206
:status 304
:status 400
:status 404
:status 500
accept-charset
accept-encoding gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate""".splitlines()
)
_LENGTHS: typing.Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b08060606"
    "0505050606060606060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c14161414161616171617171717171817"
    "181816171817171717151617161717181615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a17"
    "1a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a1e"
)
_END_OF_STRING: typing.Final = 256


class BlockError(ValueError):
    """A header block breaks RFC 7541, or uses what it was told not to; says what."""


def encode(headers: Iterable[Header]) -> bytes:
    """Write headers as literals that nobody is to keep, without compression."""
    return b"".join(b"\x10" + _string(name) + _string(value) for name, value in headers)


def decode(block: bytes) -> list[Header]:
    """Read a block. Raises BlockError."""
    headers: list[Header] = []
    at = total = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:
            index, at = _integer(block, at, 7)
            name, value = _static(index)
        elif first & 0xE0 == 0x20:
            size, at = _integer(block, at, 5)
            if size:
                raise BlockError("a dynamic table, which was not allowed")
            continue
        else:
            index, at = _integer(block, at, 6 if first & 0x40 else 4)
            if index:
                name = _static(index)[0]
            else:
                name, at = _text(block, at)
            value, at = _text(block, at)
        total += len(name) + len(value)
        if total > LONGEST_BYTES:
            raise BlockError("too many headers")
        headers.append((name, value))
    return headers


def _static(index: int) -> Header:
    if not 1 <= index <= len(_STATIC):
        raise BlockError(f"header {index}, which nobody has named")
    name, value = _STATIC[index - 1]
    return name, value


def _string(text: bytes) -> bytes:
    length = len(text)
    if length < 127:
        return bytes([length]) + text
    rest, packed = length - 127, bytearray(b"\x7f")
    while rest >= 128:
        packed.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*packed, rest]) + text


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """Read an integer whose first `bits` bits are the low ones of a byte; and where it ends."""
    full = (1 << bits) - 1
    number = block[at] & full
    at += 1
    if number < full:
        return number, at
    for shift in range(0, 28, 7):
        if at == len(block):
            break
        number += (block[at] & 0x7F) << shift
        at += 1
        if not block[at - 1] & 0x80:
            return number, at
    raise BlockError("a number that does not end")


def _text(block: bytes, at: int) -> tuple[bytes, int]:
    if at == len(block):
        raise BlockError("a header that does not end")
    compressed = block[at] & 0x80
    length, at = _integer(block, at, 7)
    text = block[at : at + length]
    if len(text) < length:
        raise BlockError("a header that does not end")
    return (_expand(text) if compressed else text), at + length


def _codes() -> dict[tuple[int, int], int]:
    """Number the symbols' codes: in order of their length, then of the symbol, one after another."""
    codes = {}
    code = length_before = 0
    for symbol in sorted(range(len(_LENGTHS)), key=lambda symbol: (_LENGTHS[symbol], symbol)):
        code <<= _LENGTHS[symbol] - length_before
        length_before = _LENGTHS[symbol]
        codes[length_before, code] = symbol
        code += 1
    return codes


_CODES: typing.Final = _codes()


def _expand(text: bytes) -> bytes:
    """Undo Huffman's compression; what remains of the last byte is all ones."""
    found = bytearray()
    code = length = 0
    for byte in text:
        for bit in range(7, -1, -1):
            code = code << 1 | byte >> bit & 1
            length += 1
            symbol = _CODES.get((length, code))
            if symbol is None:
                continue
            if symbol == _END_OF_STRING:
                raise BlockError("text that ends before its end")
            found.append(symbol)
            code = length = 0
    if length > 7 or code != (1 << length) - 1:
        raise BlockError("text that stops in the middle of a character")
    return bytes(found)
