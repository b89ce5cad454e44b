"""What a probe asks of an HTTP server, and what it reads of the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import http_probe, probe

ASKED = probe.Probe(probe.Kind.HTTP, "/healthz")


def read(*chunks: bytes) -> http_probe.StatusReader:
    reader = http_probe.StatusReader()
    for chunk in chunks:
        reader.receive(chunk)
    return reader


def test_a_request_is_one_request() -> None:
    lines = http_probe.request(ASKED, "[fd00::1]:8080").split(b"\r\n")
    assert lines[:2] == [b"GET /healthz HTTP/1.1", b"Host: [fd00::1]:8080"]
    assert b"Connection: close" in lines
    assert lines[-2:] == [b"", b""]
    named = probe.Probe(probe.Kind.HTTP, "/", host="web.example")
    assert b"Host: web.example\r\n" in http_probe.request(named, "10.0.0.1:80")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", 200),
        (b"HTTP/1.0 503 Service Unavailable\r\n", 503),
        (b"HTTP/1.1 204\r\n", 204),
        (b"HTTP/1.1 404 \n", 404),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 302 Found\r\n",
            302,
        ),
    ],
)
def test_a_status_is_read_in_whatever_pieces_it_comes(answer: bytes, status: int) -> None:
    assert read(answer).status == status
    assert read(*(bytes([byte]) for byte in answer)).status == status


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ((b"",), "closed the connection without an answer"),
        ((b"HTTP/1.1 2", b""), "closed the connection without an answer"),
        ((b"SSH-2.0-OpenSSH_9\r\n",), "does not speak HTTP/1"),
        ((b"HTTP/2 200\r\n",), "does not speak HTTP/1"),
        ((b"HTTP/1.1 20\r\n",), "does not speak HTTP/1"),
        ((b"HTTP/1.1 2000\r\n",), "does not speak HTTP/1"),
        ((b"x" * 4096,) * 5, "answered with no status line"),
        ((b"HTTP/1.1 100 Continue\r\n" + b"a: b\r\n" * 4000,), "answered with no status line"),
    ],
)
def test_other_answers_say_what_is_wrong(chunks: tuple[bytes, ...], problem: str) -> None:
    reader = read(*chunks)
    assert (reader.status, reader.problem) == (0, problem)


@pytest.mark.parametrize(("status", "passes"), [(199, False), (200, True), (399, True), (400, False)])
def test_a_status_passes_within_its_range(status: int, passes: bool) -> None:
    assert http_probe.verdict(ASKED, status) == ("" if passes else f"HTTP status {status}")


@given(st.lists(st.binary(max_size=50), max_size=10))
def test_no_bytes_raise(chunks: list[bytes]) -> None:
    reader = read(*chunks)
    assert not (reader.status and reader.problem)
