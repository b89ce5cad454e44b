"""Zone preference that spills over: a zone keeps its own clients' flows while it can bear them.

A node prefers the backends of its zone, but never for more than so many times (the factor) what
each would get if all flows were shared out evenly:

- of a zone of which a part is not usable, for the factor times the part that is;
- of a zone with few backends, for the factor times its backends by the average of all zones
  that have any: as if each of these zones sent as much as every other, which no node can know.

What is left goes to the other zones' backends, by their weights.
"""

import re
import typing
from collections.abc import Sequence

from lbproxy.core import model, tables, topology, weights

LEAST: typing.Final = 1.0
MOST: typing.Final = 10.0

_FACTOR = re.compile(r"[0-9]{1,2}(\.[0-9]{1,3})?")
_CLUSTER: typing.Final = tables.BackendSet.CLUSTER.value
_WHOLE: typing.Final = 1000  # of a share


def parse(text: str) -> float:
    """Read a factor. Raises ValueError, which says what is wrong."""
    factor = float(text) if _FACTOR.fullmatch(text.strip()) else 0.0
    if not LEAST <= factor <= MOST:
        raise ValueError("no number from 1 to 10")
    return factor


def kept(factor: float, usable: int, known: int, others: int, zones: int) -> float:
    """Return the share of a zone's flows that stays in it, 0 to 1.

    `usable` and `known` are sums of the weights of the zone's own backends, `others` of the usable
    ones of other zones; `zones` is how many have usable backends, this one included.
    """
    average = (usable + others) / zones
    return min(1.0, factor * usable / known, factor * usable / average)


def shares(
    factor: float,
    zone: str,
    endpoints: Sequence[model.Endpoint],
    sets: Sequence[int],
    given: Sequence[int],
    said: model.Weights | None,
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the sets and weights of endpoints as seen from a zone; `given` are their weights in their sets.

    The Cluster set alone is narrowed; a Local one lies within the zone, where proportions stay.
    """
    mine = [bool(zone) and endpoint.location.zone == zone for endpoint in endpoints]
    of_set = [bool(bits & _CLUSTER) for bits in sets]
    usable = sum(w for w, here, used in zip(given, mine, of_set, strict=True) if here and used)
    others = sum(w for w, here, used in zip(given, mine, of_set, strict=True) if not here and used)
    if not usable or not others:
        return sets, given
    known = usable + sum(
        _weight(endpoint, said)
        for endpoint, here, used in zip(endpoints, mine, of_set, strict=True)
        if here and not used and not topology.is_going(endpoint)
    )
    zones = {endpoint.location.zone for endpoint, used in zip(endpoints, of_set, strict=True) if used}
    stays = round(_WHOLE * kept(factor, usable, known, others, len(zones)))
    if stays >= _WHOLE:
        left = [bits if here else bits & ~_CLUSTER for bits, here in zip(sets, mine, strict=True)]
        return left, given
    scaled = [
        weight * (stays * others if here else (_WHOLE - stays) * usable)
        for weight, here in zip(given, mine, strict=True)
    ]
    return sets, weights.reduced(scaled)


def _weight(endpoint: model.Endpoint, said: model.Weights | None) -> int:
    return endpoint.weight if said is None else weights.of(said, endpoint)
