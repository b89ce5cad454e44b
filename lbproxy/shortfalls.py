"""Which service ports are not served as planned, and why; the log has each reason once."""

import dataclasses
import itertools
import logging
import typing

from lbproxy.core import addresses, claims, listing, model, pools, reconcile, tables

_log = logging.getLogger(__name__)

_REASONS: typing.Final = 10  # of each kind: health answers are read by people
_AGAIN_S: typing.Final = 60.0  # how often the log tells of a table that refuses ever more

Starved = typing.Mapping[model.PortKey, pools.Exhausted]


@dataclasses.dataclass
class _Full:
    """A table that has refused somebody at every look so far, through each size that it had meanwhile."""

    said: typing.Collection[model.PortKey] = ()  # that were refused when the log told of it last
    due_s: float = 0.0  # when it may tell of more
    most: int = 0  # service ports that were refused at one time


class Shortfalls:
    """Looks at a reconciler after each pass."""

    def __init__(self) -> None:
        self._full: dict[str, _Full] = {}
        self._contested: dict[bytes, frozenset[model.PortKey]] = {}
        self._spared: dict[model.PortKey, int] = {}

    def look(self, reconciler: reconcile.Reconciler, now_s: float) -> None:
        """Log what is new.

        Tables that are full for service ports; service ports whose backends are all unhealthy; frontends
        that several claim.
        """
        self._look_at_tables(reconciler.starved, now_s)
        known = self._contested
        # Whoever claims one for clients outside claims the same place for the others, too.
        self._contested = {
            key: frozenset(ports)
            for key, ports in reconciler.ledger.claims.contested.items()
            if not claims.is_for_outside(key)
        }
        for frontend, ports in self._contested.items():
            if known.get(frontend) != ports:
                _log.warning("%s", _contest(frontend, ports))
        before, self._spared = self._spared, dict(reconciler.spared)
        for key, bits in self._spared.items():
            if before.get(key) != bits:
                _log.warning("%s", _spared(reconciler, key, bits))
        for key in before.keys() - self._spared.keys():
            _log.info("%s has enough healthy backends again: only those are used", key)

    def _look_at_tables(self, starved: Starved, now_s: float) -> None:
        """One line where a table begins to refuse, one at the end, and seldom one in between.

        While it is about to grow, every pass may find more that it refuses, a hundred times a second.
        """
        refused: dict[str, dict[model.PortKey, pools.Exhausted]] = {}
        for key, full in starved.items():
            refused.setdefault(full.table, {})[key] = full
        for table in [table for table in self._full if table not in refused]:
            most = self._full.pop(table).most
            _log.info("the %s table refuses nobody any more: up to %d service ports had no room", table, most)
        for table, ports in refused.items():
            known = self._full.setdefault(table, _Full(due_s=now_s))
            known.most = max(known.most, len(ports))
            if now_s < known.due_s or not ports.keys() - known.said:
                continue
            key, full = next(iter(ports.items()))
            _log.error("%d service ports are not served as planned, such as %s: %s", len(ports), key, full)
            known.said, known.due_s = frozenset(ports), now_s + _AGAIN_S

    def reasons(self, reconciler: reconcile.Reconciler) -> list[str]:
        """What there is now, one line each."""
        contested = [_contest(key, ports) for key, ports in self._contested.items()]
        spared = [_spared(reconciler, key, bits) for key, bits in self._spared.items()]
        return self.unserved(reconciler) + contested[:_REASONS] + spared[:_REASONS]

    def unserved(self, reconciler: reconcile.Reconciler) -> list[str]:
        """Those of service ports that found no room."""
        first = itertools.islice(reconciler.starved.items(), _REASONS)
        return [f"{key}: {full}" for key, full in first]


def _spared(reconciler: reconcile.Reconciler, key: model.PortKey, bits: int) -> str:
    sets = " and ".join(listing.set_names(bits))
    service = reconciler.state.service(key.service)
    asked = service.probe_of(key.port_name) if service is not None else None
    panics = asked is not None and asked.panic
    ill = "is unhealthy, or more of them than panic= allows" if panics else "is unhealthy"
    return f"{key}: every backend it may use under policy {sets} {ill}: all of them are used"


def _contest(key: bytes, ports: typing.Collection[model.PortKey]) -> str:
    frontend = tables.frontend_key(key)
    first, *others = sorted(ports)
    address = addresses.text(frontend.addr)
    where = f"[{address}]" if ":" in address else address
    number = int.from_bytes(frontend.port, "big")
    return f"{where}:{number} is claimed by {first}, which has it, and by {', '.join(map(str, others))}"
