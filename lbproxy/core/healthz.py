"""How healthy the proxy is, and what /healthz and /livez say of it.

Healthy means that no change has waited too long for a pass to succeed; a proxy
that has nothing to do is healthy, and so is one that no longer hears from the
API server (HZ-3, HZ-11). Times are seconds of one monotonic clock.
"""

import datetime
import json
import typing

from lbproxy.core import model

_NEVER: typing.Final = "0001-01-01T00:00:00Z"  # as Go writes a time that was never set


class ProxyHealth:
    """Since when a change waits, and when a pass last succeeded. A pass writes both families."""

    def __init__(self, sync_period_s: float) -> None:
        self._patience_s = 2 * sync_period_s
        self.oldest_queued_s: float | None = None
        self.last_synced_s: float | None = None

    def queued(self, now_s: float) -> None:
        """Note that something has changed; the oldest change counts."""
        if self.oldest_queued_s is None:
            self.oldest_queued_s = now_s

    def synced(self, now_s: float) -> None:
        """Note that everything is in the kernel as planned."""
        self.oldest_queued_s = None
        self.last_synced_s = now_s

    def waiting_s(self, now_s: float) -> float:
        """How long the oldest change has been waiting; 0 where none is."""
        return 0.0 if self.oldest_queued_s is None else now_s - self.oldest_queued_s

    def healthy(self, now_s: float) -> bool:
        """Whether no change has waited for two sync periods.

        Before the first success it is healthy (HZ-4): the first full state may be
        long in coming where the API server is slow, and restarting would not help.
        """
        if self.last_synced_s is None or self.oldest_queued_s is None:
            return True
        return self.waiting_s(now_s) < self._patience_s


class Moment(typing.NamedTuple):
    """Now, by the clock that health is kept in and by that of the wall (Unix time)."""

    monotonic_s: float
    wall_s: float


class Answer(typing.NamedTuple):
    """An HTTP status, 200 or 503, and a JSON body."""

    status: int
    body: bytes


def livez(health: ProxyHealth, now: Moment, reasons: typing.Iterable[str] = ()) -> Answer:
    """Answer /livez: 200 where the proxy is healthy (HZ-1)."""
    healthy = health.healthy(now.monotonic_s)
    return _answer(health, now, healthy, healthy, None, reasons)


def healthz(
    health: ProxyHealth, now: Moment, *, ready: bool, ineligible: str, reasons: typing.Iterable[str] = ()
) -> Answer:
    """Answer /healthz: 200 where traffic may be sent to this node (HZ-1).

    Unlike kube-proxy's it says no until the first full state is in the kernel.
    `ineligible` says why load balancers may not use this node, and is empty where they may.
    """
    healthy = ready and health.healthy(now.monotonic_s)
    eligible = not ineligible
    told = reasons if eligible else (ineligible, *reasons)
    return _answer(health, now, healthy and eligible, healthy, eligible, told)


def _answer(
    health: ProxyHealth,
    now: Moment,
    passed: bool,
    healthy: bool,
    eligible: bool | None,
    reasons: typing.Iterable[str],
) -> Answer:
    last_synced = _last_synced(health, now)
    current = _rfc3339(now.wall_s)
    body: dict[str, object] = {
        # HZ-6: older consumers take this for proof of life.
        "lastUpdated": current if passed else last_synced,
        "currentTime": current,
    }
    if eligible is not None:
        body["nodeEligible"] = eligible
    body["healthy"] = healthy
    if health.last_synced_s is not None:
        status = {"lastUpdated": last_synced, "healthy": health.healthy(now.monotonic_s)}
        body["status"] = {f"IPv{family.value}": status for family in model.Family}
    body["reasons"] = list(dict.fromkeys((*_own_reasons(health, now), *reasons)))
    return Answer(200 if passed else 503, json.dumps(body).encode())


def _own_reasons(health: ProxyHealth, now: Moment) -> list[str]:
    if health.healthy(now.monotonic_s):
        return []
    waited_s = health.waiting_s(now.monotonic_s)
    return [f"changes have been waiting to be written to the kernel for {waited_s:.0f} s"]


def _last_synced(health: ProxyHealth, now: Moment) -> str:
    if health.last_synced_s is None:
        return _NEVER
    return _rfc3339(now.wall_s - (now.monotonic_s - health.last_synced_s))


def _rfc3339(unix_s: float) -> str:
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    return moment.isoformat().replace("+00:00", "Z")
