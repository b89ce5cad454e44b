"""Slow start: a backend that has just become usable gets little at first, and all after a while.

Its weight grows in ten steps. Steps are taken at multiples of a tenth of the time, for all of
a service's backends at once: so however many come, its tables are written ten times in that
time at most. Who was there when a service became known, or an agent began, gets all at once;
so does everyone where nobody else is left. Time comes in, nothing here looks at a clock.
"""

import math
import re
import typing
from collections.abc import Iterable, Sequence

import msgspec

from lbproxy.core import model, plan, tables, topology, weights

STEPS: typing.Final = 10
SHORTEST_S: typing.Final = 1.0
LONGEST_S: typing.Final = 3600.0

_DURATION = re.compile(r"([0-9]{1,4})(s|m|h)")
_UNITS: typing.Final = {"s": 1, "m": 60, "h": 3600}
_EVER: typing.Final = -math.inf  # since when: for as long as anyone knows

Since = dict[topology.Place, float]


def parse_s(text: str) -> float:
    """Read 30s, 2m or 1h into seconds. Raises ValueError, which says what is wrong."""
    found = _DURATION.fullmatch(text.strip())
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise ValueError("no duration from 1s to 1h")
    return float(seconds)


class Ramps:
    """Since when the backends of services with slow start have been usable."""

    def __init__(self) -> None:
        self._since: dict[model.ServiceName, dict[model.PortKey, Since]] = {}
        self._due_s: dict[model.ServiceName, float] = {}

    @property
    def next_due_s(self) -> float | None:
        """When some service is to be planned again; None while nobody is starting."""
        return min(self._due_s.values(), default=None)

    def due(self, now_s: float) -> list[model.ServiceName]:
        """The services whose next step is due."""
        return [name for name, due_s in self._due_s.items() if due_s <= now_s]

    def apply(
        self, name: model.ServiceName, slow_start_s: float, ports: Sequence[plan.PortPlan], now_s: float
    ) -> list[plan.PortPlan]:
        """Return the plans of a service with the weights of now; `slow_start_s` is 0 where it has none."""
        self._due_s.pop(name, None)
        known = self._since.pop(name, {})
        if not slow_start_s or not ports:
            return list(ports)
        step_s = slow_start_s / STEPS
        tick_s = now_s - now_s % step_s
        since = {port.key: _since(port, known.get(port.key), tick_s, slow_start_s) for port in ports}
        self._since[name] = since
        if any(began_s != _EVER for places in since.values() for began_s in places.values()):
            self._due_s[name] = tick_s + step_s
        return [_weighed(port, since[port.key], tick_s, step_s) for port in ports]


def _since(port: plan.PortPlan, known: Since | None, tick_s: float, slow_start_s: float) -> Since:
    """Since when each usable backend is; whoever has had its time, as if for ever."""
    places = list(_usable(port))
    if known is None or known.keys().isdisjoint(places):
        return dict.fromkeys(places, _EVER)
    since = {place: known.get(place, tick_s) for place in places}
    return {place: began_s if tick_s - began_s < slow_start_s else _EVER for place, began_s in since.items()}


def _usable(port: plan.PortPlan) -> Iterable[topology.Place]:
    return (
        topology.Place(backend.address, backend.port)
        for backend in port.backends
        if backend.state is tables.BackendState.ACTIVE and not backend.health
    )


def _weighed(port: plan.PortPlan, since: Since, tick_s: float, step_s: float) -> plan.PortPlan:
    """Give each backend as many tenths of its weight as steps were taken, the first one at once."""
    if all(began_s == _EVER for began_s in since.values()):
        return port
    # Of DSR's tables all nodes need the same, and they do not begin at the same moment.
    if any(frontend.dsr for frontend in port.frontends):
        return port
    products = []
    for backend in port.backends:
        began_s = since.get(topology.Place(backend.address, backend.port), _EVER)
        taken = STEPS if began_s == _EVER else 1 + round((tick_s - began_s) / step_s)
        products.append(backend.weight * min(STEPS, taken))
    # A row has 16 bits for it, and where a zone spills over weights are large already.
    if max(products) > weights.LARGEST_PRODUCT:
        products = weights.reduced(products)
    ramped = zip(port.backends, products, strict=True)
    return msgspec.structs.replace(
        port, backends=tuple([msgspec.structs.replace(backend, weight=weight) for backend, weight in ramped])
    )
