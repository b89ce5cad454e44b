"""Header blocks of HTTP/2: what others have written is read, and what is no block is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import header_block

# Every byte there is, compressed by python-hpack.
EVERY_BYTE = (
    "204081f3ffc803ffc7fffd8fffffe2fffffe3fffffe4fffffe5fffffe6fffffe7fffffe8ffffeafffffff3fffffa7fff"
    "ffabffffffdfffffebfffffecfffffedfffffeefffffefffffff0ffffff1ffffff2fffffffbfffffcffffffd3fffffd7"
    "fffffdbfffffdffffffe3fffffe7fffffebfffffed4fe3f9ffaffcabf1febfafefe7fdfd2cbb00089969b71d79fb9f7f"
    "ff20ffbff3ff50ddbd7f061c58f265cd9f469d5af66dddbf871e5f9cff7ff7fffc3ff9ffe45fff4719242cb34e6e9d68"
    "a6a3d7dac426defe3cfaf7fffbfe7ffbffdffffffcfffe6ffff4bfff9ffffa3fffd3ffff53fffd5ffffb3fffeb7fffda"
    "ffffb7ffff73fffeeffffdeffffebffffbfffffd9ffffdbfffebffffe0ffffeeffffc3ffff8bffff1ffffe4fffee7fff"
    "b1ffff97fffd9ffffcdffff9fffffbffffdafffeeffff4ffffb7fffee7fffe8ffffd3fffdeffffd5fffeeffffbdffffe"
    "1fffdfffff7fffff5ffffecffff07fff87fffe0ffff17fffedffff87ffff77fffeffffeaffff8bfffe3ffff93ffff87f"
    "ffcbffff37ffff1fffff83ffffe1fffebfffe3ffff3fffff2ffffa3ffffd9fffff17ffffc7fffff27ffffdefffffbfff"
    "fff2fffff8fffffb7fff97fff8fffffe6fffffc1fffff87ffffe7fffffc5ffffe5fffe4ffff2fffffd1fffff4ffffffe"
    "fffffe3fffffc9fffff97fffb3ffffcffffb7fffcdffff4ffff9ffffd1ffffcffffeaffffafffffddffffeffffff4fff"
    "ff5fffffabffffa7ffffd7fffff9bffffecfffffb7fffff3fffffe8fffffd3fffffabfffff5fffffff7ffffecfffffdb"
    "fffffbbfffff7ffffff0fffffbbf"
)
STATUS_200 = (b":status", b"200")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        # RFC 7541, C.2.1, C.4.1 and C.6.1, these with names and values compressed.
        (
            "400a637573746f6d2d6b65790d637573746f6d2d686561646572",
            [(b"custom-key", b"custom-header")],
        ),
        (
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            [
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":path", b"/"),
                (b":authority", b"www.example.com"),
            ],
        ),
        (
            "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff"
            "6e919d29ad171863c78f0b97c8e9ae82ae43d3",
            [
                (b":status", b"302"),
                (b"cache-control", b"private"),
                (b"date", b"Mon, 21 Oct 2013 20:13:21 GMT"),
                (b"location", b"https://www.example.com"),
            ],
        ),
        # As python-h2 writes an answer, with the update that a table of 0 bytes asks for.
        (
            "20885f8b1d75d0620d263d4c4d65647689aa6355e580ae26d767",
            [STATUS_200, (b"content-type", b"application/grpc"), (b"server", b"nginx/1.25.3")],
        ),
        (
            "40889acac8b21234da8f8208bf40899acac8b5254207317f9bb6aeb51fc54a20b677310aa4d65645e728e84cebf70af8"
            "ca3a133f",
            [(b"grpc-status", b"12"), (b"grpc-message", b"unknown service grpc.health.v1.Health")],
        ),
        (EVERY_BYTE, [(b"x", bytes(range(256)))]),
    ],
)
def test_what_others_write_is_read(block: str, expected: list[header_block.Header]) -> None:
    wanted = frozenset(name for name, _ in expected)
    assert header_block.decode(bytes.fromhex(block), wanted) == expected
    for name in wanted:
        one = [(known, value) for known, value in expected if known == name]
        assert header_block.decode(bytes.fromhex(block), frozenset([name])) == one


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("3fe11f", "a dynamic table, which was not allowed"),
        ("80", "header 0, which nobody has named"),
        ("be", "header 62, which nobody has named"),
        ("00", "a header that does not end"),
        ("000361", "a header that does not end"),
        ("ffffffffffffffff", "a number that does not end"),
        ("0001788100", "text that stops in the middle of a character"),
        ("00017881fe", "text that stops in the middle of a character"),
        ("00017884ffffffff", "text that ends before its end"),
    ],
)
def test_what_is_no_block_is_refused(block: str, reason: str) -> None:
    with pytest.raises(header_block.BlockError, match=reason):
        header_block.decode(bytes.fromhex(block), frozenset([b"x"]))


OTHERS = frozenset([b"y"])


def test_headers_are_bounded() -> None:
    with pytest.raises(header_block.BlockError, match="too many"):
        header_block.decode(header_block.encode([(b"x", b"y" * 100)] * 200), OTHERS)
    for empty in (b"\x88", b"\x20", b"\0\0\0"):
        with pytest.raises(header_block.BlockError, match="too many"):
            header_block.decode(empty * 513, OTHERS)


def test_nothing_is_expanded_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    expanded: list[bytes] = []

    def expand(text: bytes) -> bytes:
        expanded.append(text)
        return text

    monkeypatch.setattr(header_block, "_expand", expand)
    name, value = b"\x87" + b"\xfe" * 7, b"\x88" + b"\xfd" * 8
    block = (b"\0" + name + value) * 100 + b"\0\1x" + value
    header_block.decode(block, OTHERS)
    assert expanded == []
    header_block.decode(block, frozenset([b"x"]))
    assert expanded == [b"\xfd" * 8]
    # And of what is wanted no more than a status could need.
    with pytest.raises(header_block.BlockError, match="a value that is too long"):
        header_block.decode((b"\0\1x" + value) * 200, frozenset([b"x"]))
    assert sum(map(len, expanded)) <= header_block.LONGEST_COMPRESSED_BYTES + 8


headers = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=6)


@given(headers)
def test_what_is_written_is_read(written: list[header_block.Header]) -> None:
    wanted = frozenset(name for name, _ in written)
    assert header_block.decode(header_block.encode(written), wanted) == written


@given(st.binary(max_size=40))
def test_what_is_compressed_is_expanded(text: bytes) -> None:
    assert header_block._expand(header_block._compress(text)) == text


@given(st.binary(max_size=80))
def test_any_bytes_are_a_block_or_refused(block: bytes) -> None:
    try:
        found = header_block.decode(block, frozenset([b"", b"x", b":status"]))
    except header_block.BlockError:
        return
    assert sum(len(name) + len(value) for name, value in found) <= header_block.LONGEST_BYTES
