"""Split a byte stream into lines, wherever its pieces are cut.

Works on bytes, so that a character cut in two is no special case; a line of
several MB that comes in many pieces is put together once.
"""

LONGEST_LINE_BYTES = 64 << 20


class LineTooLong(ValueError):  # noqa: N818
    """A line has grown past what any object can have."""


class LineSplitter:
    """Turns pieces into complete lines; what follows the last newline waits for more."""

    def __init__(self, longest_bytes: int = LONGEST_LINE_BYTES) -> None:
        self._parts: list[bytes] = []
        self._waiting_bytes = 0
        self._longest_bytes = longest_bytes

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the lines that this piece completes, without their newlines and without empty ones."""
        first, newline, rest = piece.partition(b"\n")
        self._parts.append(first)
        self._waiting_bytes += len(first)
        if self._waiting_bytes > self._longest_bytes:
            raise LineTooLong(f"a line of more than {self._longest_bytes} bytes")
        if not newline:
            return []
        *middle, last = rest.split(b"\n")
        lines = [b"".join(self._parts), *middle]
        self._parts = [last]
        self._waiting_bytes = len(last)
        return [line for line in lines if line and not line.isspace()]
