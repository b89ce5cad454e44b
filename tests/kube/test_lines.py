import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.kube import lines


@given(
    st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"") + b"x"), max_size=8),
    st.lists(st.integers(min_value=0, max_value=200), max_size=10),
)
def test_lines_come_out_whole_wherever_the_stream_is_cut(wanted: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + b"\n" for line in wanted)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    splitter = lines.LineSplitter()
    got = [line for a, b in itertools.pairwise(edges) for line in splitter.feed(stream[a:b])]
    assert got == wanted


def test_a_character_cut_in_two_is_whole_again() -> None:
    splitter = lines.LineSplitter()
    encoded = "ä\n".encode()
    assert splitter.feed(encoded[:1]) == []
    assert splitter.feed(encoded[1:]) == ["ä".encode()]


def test_what_follows_the_last_newline_waits() -> None:
    splitter = lines.LineSplitter()
    assert splitter.feed(b"a\nhalf") == [b"a"]
    assert splitter.feed(b" a line\n\r\n \n") == [b"half a line"]


def test_a_line_without_end_is_given_up() -> None:
    splitter = lines.LineSplitter(longest_bytes=10)
    assert splitter.feed(b"0123456789\n012345") == [b"0123456789"]
    with pytest.raises(lines.LineTooLong, match="more than 10 bytes"):
        splitter.feed(b"67890")
