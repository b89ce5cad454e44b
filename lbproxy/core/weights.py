"""How much of a service's new flows each backend gets: what the weights annotation says.

    node:worker-1=3, zone:eu-a=2, 10.1.2.3=5

An address comes before a node, and a node before a zone; who is not named has the
weight 1. Weights count against each other: 2 and 4 are as 1 and 2. Who has the weight
0 gets no new flow while another backend of its set has more.
"""

import math
import re
import typing
from collections.abc import Sequence

from lbproxy.core import addresses, model

LARGEST = 1000
DEFAULT = 1
# Of the products of several factors: so that a row of the kernel has room for them, and no
# table needs more slots than there are.
LARGEST_PRODUCT = 10_000

_QUOTED = 40  # characters of what was not understood
_NUMBER = re.compile(r"[0-9]{1,4}")


def parse(text: str) -> tuple[model.Weights | None, list[str]]:
    """Return what a text says, None where that is nothing, and what was passed over and why."""
    said = model.Weights({}, {}, {})
    kinds: dict[str, dict[typing.Any, int]] = {"": said.addresses, "node": said.nodes, "zone": said.zones}
    problems = []
    for entry in filter(None, map(str.strip, text.split(","))):
        who, _, number = (part.strip() for part in entry.rpartition("="))
        kind, name = _who(who)
        if not name:
            problems.append(f"{_quoted(entry)} names no address, node:NAME or zone:NAME")
        elif not _NUMBER.fullmatch(number) or int(number) > LARGEST:
            problems.append(f"{_quoted(entry)} has no weight of 0 to {LARGEST}")
        elif name in kinds[kind]:
            problems.append(f"{_quoted(entry)} says it a second time")
        else:
            kinds[kind][name] = int(number)
    return said if any(kinds.values()) else None, problems


def of(said: model.Weights, endpoint: model.Endpoint) -> int:
    """Return the weight of an endpoint."""
    weight = said.addresses.get(endpoint.address)
    if weight is None:
        weight = said.nodes.get(endpoint.location.node_name)
    if weight is None:
        weight = said.zones.get(endpoint.location.zone)
    return DEFAULT if weight is None else weight


def shares(
    said: model.Weights | None, endpoints: Sequence[model.Endpoint], sets: tuple[int, ...]
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the sets that each endpoint is in, and its weight.

    One of weight 0 is in no set that has another; where all have 0 they are equal.
    """
    if said is None:
        return sets, [endpoint.weight for endpoint in endpoints]
    each = [of(said, endpoint) for endpoint in endpoints]
    taken = 0  # the sets that have somebody to draw
    for bits, weight in zip(sets, each, strict=True):
        taken |= bits if weight else 0
    left = [bits if weight else bits & ~taken for bits, weight in zip(sets, each, strict=True)]
    return left, [weight or int(bits != 0) for bits, weight in zip(left, each, strict=True)]


def reduced(weights: Sequence[int]) -> list[int]:
    """Return the smallest weights in these proportions; none above the largest product, none lost.

    Rounding only moves weights that are a ten-thousandth of the largest one.
    """
    divisor = math.gcd(*weights) or 1
    small = [weight // divisor for weight in weights]
    largest = max(small, default=0)
    if largest <= LARGEST_PRODUCT:
        return small
    return [max(1, round(weight * LARGEST_PRODUCT / largest)) if weight else 0 for weight in small]


def _who(text: str) -> tuple[str, str | bytes]:
    """What an entry is about, and its name; an empty one where that is not understood."""
    kind, colon, name = text.partition(":")
    if colon and kind in ("node", "zone"):
        return kind, name.strip()
    address = addresses.parse(text) or b""
    # Of 010.1.2.3 nobody can tell whether it is octal; an endpoint's may be so, what a person writes not.
    sloppy = address and ":" not in text and addresses.text(address) != text
    return "", b"" if sloppy else address


def _quoted(entry: str) -> str:
    return ascii(entry) if len(entry) <= _QUOTED else f"{entry[:_QUOTED]!a}..."
