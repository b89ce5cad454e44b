"""Which objects can not be understood as they are now, and which are odd; the log has each once."""

import logging
import typing

from lbproxy.core import events, wording
from lbproxy.metrics import metrics

_log = logging.getLogger(__name__)
_LINES: typing.Final = 10  # health answers are read by people

Key = tuple[events.Kind, events.ObjectName]
Report = typing.Callable[[events.Rejected | events.Upsert], None]
"""Takes an object that was rejected, or one whose warnings are other ones than before."""


class Rejections:
    """Follows the events of every object; `reasons` holds those that are rejected now."""

    def __init__(self, telemetry: metrics.Metrics, report: Report) -> None:
        self.reasons: dict[Key, str] = {}
        self._telemetry = telemetry
        self._report = report
        self._warned: dict[Key, tuple[str, ...]] = {}

    @property
    def lines(self) -> list[str]:
        """What is rejected now, one line each; of many the first.

        Without the reason, which may quote the object: anybody who reaches /healthz may read these.
        """
        lines = (events.rejection(kind, name, "`lbproxy status` says why") for kind, name in self.reasons)
        rest = "objects are rejected: see lbproxy_rejected_objects and the log"
        return list(wording.first(lines, len(self.reasons), _LINES, rest))

    def take(self, event: events.Event) -> None:
        """Say what is new about an object, and forget what is no longer so."""
        match event:
            case events.Rejected():
                self._rejected(event)
            case events.Upsert(kind, name):
                self.reasons.pop((kind, name), None)
                self._warn(event)
            case events.Accepted(kind, name):
                self.reasons.pop((kind, name), None)
            case events.Delete(kind, name):
                self.reasons.pop((kind, name), None)
                self._warned.pop((kind, name), None)

    def _rejected(self, event: events.Rejected) -> None:
        key = (event.kind, event.name)
        if self.reasons.get(key) == event.reason:
            return
        self.reasons[key] = event.reason
        _log.warning("rejected %s %s: %s", event.kind, event.name, event.reason)
        self._telemetry.rejected(event.kind)
        self._report(event)

    def _warn(self, event: events.Upsert) -> None:
        key = (event.kind, event.name)
        if not event.warnings:
            self._warned.pop(key, None)
            return
        known = self._warned.get(key, ())
        self._warned[key] = event.warnings
        new = [warning for warning in event.warnings if warning not in known]
        for warning in new:
            _log.warning("%s %s: %s", event.kind, event.name, warning)
        if new:
            self._telemetry.warned(event.kind, len(new))
            self._report(event)
