"""The question whether a gRPC service is serving, and what servers answer, as they were recorded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import grpc_health, header_block

# What grpcio 1.85 sends before its answer: settings, a window, an acknowledgement, another window, a ping.
GREETING = (
    "000018040000000000000400400000000500400000000600004000fe0300000001000004080000000000003f0001"
    "000000040100000000000004080000000000000000050000080600000000009f76cf9c96b9f9f0"
)
PING_ACK = "0000080601000000009f76cf9c96b9f9f0"
SETTINGS_ACK = "000000040100000000"
OPENING = (
    "00004f0104000000012088400c636f6e74656e742d74797065106170706c69636174696f6e2f677270634014677270"
    "632d6163636570742d656e636f64696e67176964656e746974792c206465666c6174652c20677a6970"
)
MESSAGE = "000007000000000001000000000208"
ENDING = "00001e010500000001400b677270632d737461747573013{}000c677270632d6d65737361676500"
SERVING = GREETING + OPENING + MESSAGE + "01" + ENDING.format(0)
NOT_SERVING = GREETING + OPENING + MESSAGE + "02" + ENDING.format(0)
NOT_FOUND = GREETING + OPENING + "0000050000000000010000000000" + ENDING.format(5)
UNIMPLEMENTED = GREETING + (
    "0000510105000000012088400c636f6e74656e742d74797065106170706c69636174696f6e2f67727063400b67727063"
    "2d737461747573023132000c677270632d6d657373616765114d6574686f64206e6f7420666f756e6421"
)


def frame(kind: int, flags: int, payload: bytes, stream: int = 1) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(*pairs: tuple[bytes, bytes], flags: int = 4) -> bytes:
    return frame(1, flags, header_block.encode(pairs))


OK = headers((b":status", b"200"))
TRAILERS = headers((b"grpc-status", b"0"), flags=5)
UP = frame(0, 0, b"\0\0\0\0\2\x08\x01")


def answer_to(*parts: bytes) -> str | None:
    exchange = grpc_health.Exchange("10.0.0.1:50051", "")
    for part in parts:
        exchange.receive(part)
    return exchange.answer


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (SERVING, ""),
        (NOT_SERVING, "is NOT_SERVING"),
        (NOT_FOUND, "gRPC status NOT_FOUND: it does not know this service"),
        (UNIMPLEMENTED, "gRPC status UNIMPLEMENTED: it has no health service"),
    ],
)
def test_a_real_server_is_understood(recorded: str, expected: str) -> None:
    exchange = grpc_health.Exchange("127.0.0.1:50051", "good")
    answered = exchange.receive(bytes.fromhex(recorded))
    assert exchange.answer == expected
    # It wants its settings and its ping acknowledged.
    assert answered.hex() == SETTINGS_ACK + PING_ACK


@given(
    st.lists(st.integers(1, 40), min_size=1),
    st.sampled_from([SERVING, NOT_SERVING, NOT_FOUND, UNIMPLEMENTED]),
)
def test_it_does_not_matter_in_which_pieces_an_answer_comes(sizes: list[int], recorded: str) -> None:
    whole = bytes.fromhex(recorded)
    exchange = grpc_health.Exchange("127.0.0.1:50051", "good")
    answered = b""
    at = 0
    while at < len(whole):
        for size in sizes:
            answered += exchange.receive(whole[at : at + size]) if whole[at : at + size] else b""
            at += size
    assert exchange.answer == answer_to(whole)
    assert answered.hex() == SETTINGS_ACK + PING_ACK


def test_the_question_is_what_a_grpc_client_sends() -> None:
    request = grpc_health.Exchange("10.0.0.1:50051", "shop.Cart").request
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert request.startswith(preface)
    frames = request[len(preface) :]
    found = []
    while frames:
        length = int.from_bytes(frames[:3], "big")
        found.append((frames[3], frames[4], frames[5:9].hex(), frames[9 : 9 + length]))
        frames = frames[9 + length :]
    (settings, head, data) = found
    assert settings[:3] == (4, 0, "00000000")
    assert head[:3] == (1, 4, "00000001")
    sent = dict(header_block.decode(head[3], frozenset([b":path", b":authority"])))
    assert sent == {b":path": b"/grpc.health.v1.Health/Check", b":authority": b"10.0.0.1:50051"}
    assert data == (0, 1, "00000001", b"\0\0\0\0\x0b\x0a\x09shop.Cart")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((OK, UP, TRAILERS), ""),
        ((OK, frame(0, 8, b"\2\0\0\0\0\2\x08\x01xx"), TRAILERS), ""),  # with padding
        ((frame(1, 0x20, b"\0\0\0\0\x10\x88"), frame(9, 4, b""), UP, TRAILERS), ""),  # with a priority
        ((OK, frame(0, 0, b"\0\0\0\0\4\x12\x00\x08\x01"), TRAILERS), ""),  # with a field that is not known
        ((OK, frame(0, 0, b"\0\0\0\0\0"), TRAILERS), "is UNKNOWN"),
        ((OK, frame(0, 0, b"\0\0\0\0\2\x08\x03"), TRAILERS), "is SERVICE_UNKNOWN"),
        ((OK, frame(0, 0, b"\0\0\0\0\2\x08\x07"), TRAILERS), "is no message of health"),
        ((OK, frame(0, 0, b"\0\0\0\0\1\xff"), TRAILERS), "is no message of health"),
        ((OK, frame(0, 0, b"\1\0\0\0\2\x08\x01"), TRAILERS), "answered with no message"),  # compressed
        ((OK, frame(0, 1, b"<html>")), "answered with no message"),
        ((OK, TRAILERS), "answered with no message"),
        ((headers((b":status", b"404"), flags=5),), "HTTP status '404'"),
        ((headers((b"server", b"x"), flags=5),), "HTTP status missing"),
        ((OK, headers((b"grpc-status", b"99"), flags=5)), "gRPC status '99'"),
        ((OK, b""), "closed the connection without an answer"),
        ((b"",), "closed the connection without an answer"),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), "does not speak HTTP/2 without TLS"),
        ((frame(7, 0, bytes(4) + b"\0\0\0\x0b", stream=0),), "refused the connection (error 11)"),
        ((frame(7, 0, b"\0\0\0\1" + bytes(4), stream=0), OK, UP, TRAILERS), ""),  # it ends after this one
        ((frame(3, 0, b"\0\0\0\x07"),), "reset the request (error 7)"),
        ((frame(1, 0, b"\x88"), UP), "sent frames out of order"),
        ((frame(9, 4, b""),), "sent frames out of order"),
        ((frame(1, 4, b"\xff"),), "sent a number that does not end"),
        ((frame(0, 8, b"\5abc"),), "sent a frame that is all padding"),
        ((frame(2, 0, bytes(5), stream=3), frame(99, 0, b"?"), OK, UP, TRAILERS), ""),  # of no concern
        ((OK, UP), None),
    ],
)  # fmt: skip
def test_answers_are_judged(parts: tuple[bytes, ...], expected: str | None) -> None:
    assert answer_to(*parts) == expected
    if expected is not None and b"" not in parts:
        assert answer_to(b"".join(parts)) == expected


def test_what_a_server_sends_is_bounded() -> None:
    exchange = grpc_health.Exchange("10.0.0.1:50051", "")
    pings = 0
    while exchange.answer is None:
        exchange.receive(frame(6, 0, bytes(8), stream=0))
        pings += 1
    assert exchange.answer == "said more than an answer is long"
    assert pings <= grpc_health.LONGEST_BYTES / 17 + 1
    assert exchange.receive(b"more") == b""


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frame(4, 1, b"", stream=0) * 2000, id="frames"),
        pytest.param(frame(1, 4, b"\x88" * 400) * 100, id="header blocks"),
    ],
)
def test_an_answer_of_little_pieces_is_not_read_to_its_end(flood: bytes) -> None:
    assert len(flood) < grpc_health.LONGEST_BYTES
    assert answer_to(flood) == "said more than an answer is long"


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_no_bytes_raise(chunks: list[bytes]) -> None:
    answer_to(*chunks)


@given(
    st.lists(
        st.tuples(st.integers(0, 10), st.integers(0, 255), st.binary(max_size=30), st.integers(0, 2)),
        max_size=8,
    )
)
def test_no_frames_raise(frames: list[tuple[int, int, bytes, int]]) -> None:
    answer_to(*(frame(kind, flags, payload, stream) for kind, flags, payload, stream in frames))
