"""What is known of backends' health besides what the API says, and what becomes of it in a plan.

Two sources speak against a backend of a service port: probes of this node, and what the
kernel saw of its connections. One that any of them speaks against gets no new flow while
another one of its set has none against it; it keeps the flows that it has, for its state is
still what the API says. Health never empties a set: where all of it are unhealthy all are
used, as nobody can tell then whether it is them or this node that is ill. A Service may say
(`panic`) that this is so where fewer than a share of them are healthy.
"""

import enum
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lbproxy import abi
from lbproxy.core import model, topology


class Source(enum.IntEnum):
    """Who speaks against a backend: a bit of backend.health."""

    ACTIVE = abi.constant("HEALTH_PROBE_FAILED")
    PASSIVE = abi.constant("HEALTH_EJECTED")


class Verdict(typing.NamedTuple):
    """What speaks against a backend: Source bits, never 0, and a line from each in order of the bits."""

    sources: int
    reasons: tuple[str, ...]


NOTHING_KNOWN: typing.Final[Mapping[topology.Place, Verdict]] = {}
_ROUNDING: typing.Final = 1e-6
_SETS: typing.Final = (topology.CLUSTER, topology.LOCAL)


class Exclusion(typing.NamedTuple):
    """For each endpoint, in order, the sets it is left in; `spared` are sets too ill to leave anybody out."""

    sets: tuple[int, ...]
    spared: int


class HealthBook:
    """Verdicts by service port and place; a backend that nothing speaks against is not in it."""

    def __init__(self) -> None:
        self._of: dict[model.ServiceName, dict[model.PortKey, dict[topology.Place, Verdict]]] = {}

    def note(
        self, port: model.PortKey, place: topology.Place, source: Source, usable: bool, reason: str = ""
    ) -> bool:
        """Take what a source says of a backend; returns whether its service has to be planned again.

        Another reason of the same source is kept, and changes nothing else.
        """
        before = self.of(port).get(place)
        said = _lines(before)
        if usable:
            said.pop(source.value, None)
        else:
            said[source.value] = reason
        if not said:
            self._drop(port, place)
            return before is not None
        bits = sorted(said)
        verdict = Verdict(sum(bits), tuple(said[bit] for bit in bits))
        self._of.setdefault(port.service, {}).setdefault(port, {})[place] = verdict
        return before is None or before.sources != verdict.sources

    def of(self, port: model.PortKey) -> Mapping[topology.Place, Verdict]:
        """The unhealthy backends of a service port: none of nearly every one."""
        ports = self._of.get(port.service)
        return NOTHING_KNOWN if ports is None else ports.get(port, NOTHING_KNOWN)

    def against(self, source: Source) -> Iterator[tuple[model.PortKey, topology.Place]]:
        """Every backend that a source speaks against now."""
        for ports in list(self._of.values()):
            for port, places in list(ports.items()):
                for place, verdict in list(places.items()):
                    if verdict.sources & source.value:
                        yield port, place

    def forget(self, port: model.PortKey, places: Iterable[topology.Place]) -> None:
        """Forget backends that are gone."""
        for place in places:
            self._drop(port, place)

    def keep(self, name: model.ServiceName, known: Mapping[model.PortKey, Iterable[topology.Place]]) -> None:
        """Forget whatever of a Service is not among these service ports and places."""
        for port, places in list(self._of.get(name, {}).items()):
            self.forget(port, places.keys() - set(known.get(port, ())))

    def __contains__(self, name: model.ServiceName) -> bool:
        return name in self._of

    def __len__(self) -> int:
        return sum(len(places) for ports in self._of.values() for places in ports.values())

    def _drop(self, port: model.PortKey, place: topology.Place) -> None:
        ports = self._of.get(port.service, {})
        places = ports.get(port, {})
        places.pop(place, None)
        if not places:
            ports.pop(port, None)
        if not ports:
            self._of.pop(port.service, None)


def exclude(sets: Sequence[int], down: Sequence[bool], panic: float = 0.0) -> Exclusion:
    """Take unhealthy endpoints out of the sets they are in, of each set but never all.

    And none of a set of which a smaller share than `panic` is healthy: the others could
    not bear what all of them are sent, or it is this node that is ill.
    """
    left = list(sets)
    spared = 0
    for bit in _SETS:
        ill = [index for index, bits in enumerate(sets) if bits & bit and down[index]]
        if not ill:
            continue
        known = sum(1 for bits in sets if bits & bit)
        if len(ill) == known or known - len(ill) < panic * known - _ROUNDING:
            spared |= bit
            continue
        for index in ill:
            left[index] &= ~bit
    return Exclusion(tuple(left), spared)


def _lines(verdict: Verdict | None) -> dict[int, str]:
    if verdict is None:
        return {}
    bits = [source.value for source in Source if verdict.sources & source.value]
    return dict(zip(bits, verdict.reasons, strict=True))
