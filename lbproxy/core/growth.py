"""Which maps are to be made larger, and how large.

A map grows before it is full, so that nobody has to wait for room, and below the
fill that people are alerted of: an alert then tells that it can not grow.
Those that forget by themselves stay as they are. A flood of SYNs has half of `flows` at most, whatever its
size: so it grows for a flood only as far as the flows of those who answer have a quarter of it.
"""

import typing

from lbproxy.core import fill

GROWABLE: typing.Final = (*fill.MUST_NOT_FILL, "earlier_slots")
GROW_AT: typing.Final = 0.75
_FACTOR: typing.Final = 2


class Growth(typing.NamedTuple):
    """New sizes of those maps that are to grow, in rows; and those that should, but may not any more."""

    sizes: dict[str, int]
    stuck: tuple[str, ...]


def expected(used: typing.Mapping[str, int], served: int, refused: int) -> dict[str, int]:
    """What will be in use once the service ports that are refused are served: as much each as the others."""
    served = max(served, 1)
    return {name: -(-rows * (served + refused) // served) for name, rows in used.items()}


def growth(
    used: typing.Mapping[str, int],
    rows: typing.Mapping[str, int],
    starved: typing.Collection[str],
    most: typing.Mapping[str, int],
) -> Growth:
    """Decide from the rows in use, or soon to be; those there are; who refused; and how many may be.

    Doubled as often as what is in use asks for, and at least once where somebody was refused: the room
    may be in pieces. The last step goes as far as is allowed.
    """
    sizes, stuck = {}, []
    for name in GROWABLE:
        wanted = _FACTOR * rows[name] if name in starved else rows[name]
        while used.get(name, 0) >= GROW_AT * fill.usable_rows(name, wanted):
            wanted = _FACTOR * max(wanted, 1)
        if wanted == rows[name]:
            continue
        if rows[name] >= most[name]:
            # Nothing is wrong yet where there is room left.
            if name in starved or used.get(name, 0) >= fill.WARN_AT * fill.usable_rows(name, rows[name]):
                stuck.append(name)
            continue
        sizes[name] = min(wanted, most[name])
    return Growth(sizes, tuple(stuck))
