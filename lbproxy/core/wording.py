"""Text of messages: what is said of many things, and of what others have written."""

import itertools
from collections.abc import Collection, Iterable, Iterator


def quote(value: object) -> str:
    """What is in an object, escaped: at most 80 characters of ASCII."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def few(names: Collection[str], most: int) -> str:
    """So many of them at most, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(itertools.islice(names, most))}{more}"


def first(lines: Iterable[str], of: int, most: int, rest: str) -> Iterator[str]:
    """So many of the lines at most; then how many more of `of` there are, and what the `rest` is."""
    yield from itertools.islice(lines, most)
    if of > most:
        yield f"and {of - most} more {rest}"
