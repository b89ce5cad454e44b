"""Header blocks of HTTP/2 (RFC 7541), as far as a client needs them that allows no dynamic table.

A client that has announced a table size of 0 is sent nothing but literals and names
of the static table: so one block can be read without those before it. Compressed text
costs a microsecond a byte to expand, so nothing is that nobody wants.
"""

import functools
import typing
from collections.abc import Iterable

Header = tuple[bytes, bytes]

LONGEST_BYTES: typing.Final = 16384  # of all names and values of a block, as RFC 9113, 6.5.2 counts
LONGEST_COMPRESSED_BYTES: typing.Final = 640  # of values of a block that are expanded
_OF_EACH: typing.Final = 32  # bytes that each header counts for besides

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


def decode(block: bytes, wanted: frozenset[bytes]) -> list[Header]:
    """Read the headers of these names. Raises BlockError; what is in others is not looked at."""
    forms = _forms(wanted)
    headers: list[Header] = []
    at = total = expanded = 0
    while at < len(block):
        first = block[at]
        total = _bounded(total + _OF_EACH)
        if first & 0xE0 == 0x20:
            size, at = _integer(block, at, 5)
            if size:
                raise BlockError("a dynamic table, which was not allowed")
            continue
        compressed = False
        name: bytes | None
        if first & 0x80:
            index, at = _integer(block, at, 7)
            name, value = _static(index)
        else:
            index, at = _integer(block, at, 6 if first & 0x40 else 4)
            if index:
                name = _static(index)[0]
            else:
                text, is_short, at = _text(block, at)
                total += len(text)
                name = forms.get((text, is_short))
            value, compressed, at = _text(block, at)
        total = _bounded(total + len(value))
        if name is None or name not in wanted:
            continue
        if compressed:
            expanded += len(value)
            if expanded > LONGEST_COMPRESSED_BYTES:
                raise BlockError("a value that is too long")
            value = _expand(value)
        headers.append((name, value))
    return headers


def _bounded(total: int) -> int:
    if total > LONGEST_BYTES:
        raise BlockError("too many headers")
    return total


@functools.lru_cache(maxsize=8)
def _forms(names: frozenset[bytes]) -> dict[tuple[bytes, bool], bytes]:
    """The two ways that each name may be written; compressed, there is but one."""
    return {form: name for name in names for form in ((name, False), (_compress(name), True))}


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


def _text(block: bytes, at: int) -> tuple[bytes, bool, int]:
    """Text as it stands, whether it is compressed, and where it ends."""
    if at == len(block):
        raise BlockError("a header that does not end")
    compressed = bool(block[at] & 0x80)
    length, at = _integer(block, at, 7)
    text = block[at : at + length]
    if len(text) < length:
        raise BlockError("a header that does not end")
    return text, compressed, at + length


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
_CODE_OF: typing.Final = {symbol: (code, length) for (length, code), symbol in _CODES.items()}


def _compress(text: bytes) -> bytes:
    """Compress by Huffman's code; the last byte is filled up with ones."""
    bits = "".join(f"{code:0{length}b}" for code, length in map(_CODE_OF.__getitem__, text))
    bits += "1" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big")


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
