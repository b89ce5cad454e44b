"""Which service ports are not served as planned, and why; the log has each reason once."""

import itertools
import logging
import typing

from lbproxy.core import addresses, claims, listing, model, reconcile, tables

_log = logging.getLogger(__name__)

_REASONS: typing.Final = 10  # of each kind: health answers are read by people


class Shortfalls:
    """Looks at a reconciler after each pass."""

    def __init__(self) -> None:
        self._starved: frozenset[model.PortKey] = frozenset()
        self._contested: dict[bytes, frozenset[model.PortKey]] = {}
        self._spared: dict[model.PortKey, int] = {}

    def look(self, reconciler: reconcile.Reconciler) -> None:
        """Log what is new.

        Service ports that found a table full, or whose backends are all unhealthy; frontends that
        several claim.
        """
        said, self._starved = self._starved, frozenset(reconciler.starved)
        if self._starved - said:
            key, full = next(iter(reconciler.starved.items()))
            _log.error(
                "%d service ports are not served as planned, such as %s: %s", len(self._starved), key, full
            )
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
