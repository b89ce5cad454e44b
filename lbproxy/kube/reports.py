"""Tell the cluster, through Events, which objects, or what in them, could not be understood.

Reporting is a courtesy: it waits for nobody, says each thing once, and gives up
quietly. The log and the metrics have every rejection whatever happens here. Only
what became of an order somebody waits for: that is said until it is heard.
"""

import asyncio
import collections
import contextlib
import datetime
import logging
import re
import secrets
import time
import typing
from collections.abc import Callable, Mapping

import msgspec

from lbproxy import secrecy
from lbproxy.core import events, migration, model, token_bucket
from lbproxy.kube import client

CONTROLLER = "lbproxy"
BURST = 25  # Events at once, as client-go's recorder allows for one object
REFILL_PER_S = 0.2
QUEUE_EVENTS = 100
REMEMBERED_OBJECTS = 4096
NOTE_BYTES = 1024  # the API server's limits
INSTANCE_CHARACTERS = 128
NAME_CHARACTERS = 253
LAST_WORDS_S = 3.0
ANSWER_RETRY_S = (5.0, 60.0)

API_VERSIONS = {
    events.Kind.SERVICE: "v1",
    events.Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1",
    events.Kind.NODE: "v1",
}

_CANNOT_SERVE = {"health": "FailedToStartProxierHealthcheck", "metrics": "FailedToStartMetricServer"}  # EV-3
_EXISTS = 409
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_log = logging.getLogger(__name__)


class Poster(typing.Protocol):
    """What is needed of `client.Client`."""

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        """Create an object."""


class Reports:
    """Events about this node's agent and about objects it rejected."""

    def __init__(
        self,
        poster: Poster,
        node_name: str,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.posted = 0
        self.dropped = 0
        self._poster = poster
        self._node_name = node_name
        self._node = {"kind": "Node", "name": node_name, "apiVersion": "v1"}
        self._instance = f"{CONTROLLER}-{node_name}"[:INSTANCE_CHARACTERS]
        self._monotonic = monotonic
        self._clock = clock
        self._bucket = token_bucket.TokenBucket(BURST, REFILL_PER_S, monotonic())
        # Of its own: a service that falls and rises all day keeps nobody else from being heard.
        self._health_bucket = token_bucket.TokenBucket(BURST, REFILL_PER_S, monotonic())
        self._said: collections.OrderedDict[tuple[events.Kind, events.ObjectName], str] = (
            collections.OrderedDict()
        )
        # Likewise: many small mistakes do not keep a rejection from being told.
        self._warning_bucket = token_bucket.TokenBucket(BURST, REFILL_PER_S, monotonic())
        self._order_bucket = token_bucket.TokenBucket(BURST, REFILL_PER_S, monotonic())
        self._queue: asyncio.Queue[_Event] = asyncio.Queue(QUEUE_EVENTS)
        self._answer: _Event | None = None  # the last one to an order
        self._answered = asyncio.Event()  # until it is posted
        self._failing = False

    def started(self) -> None:
        """Say that the agent has started, as kube-proxy does (EV-2)."""
        self._enqueue(self._node, "Normal", "Starting", "StartKubeProxy", "")

    async def cannot_serve(self, server: str, problem: str) -> None:
        """Say that the agent ends for want of a server's address; waits a little until it is said."""
        self._enqueue(self._node, "Warning", _CANNOT_SERVE[server], "StartKubeProxy", problem)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._queue.join()

    def rejected(self, rejected: events.Rejected) -> None:
        """Say why an object was rejected, unless that was the last thing said about it."""
        note = f"ignored by lbproxy, the last good version stays in force: {rejected.reason}"
        self._say_of(rejected, "InvalidObject", note, self._bucket)

    def warned(self, upsert: events.Upsert) -> None:
        """Say what in an object is passed over, unless that was the last thing said about it."""
        self._say_of(upsert, "InvalidField", "; ".join(upsert.warnings), self._warning_bucket)

    def health_check_failed(self, service: model.ServiceName, port: int, why: str) -> None:
        """Say on a Service that its health check node port can not be served (HC-9)."""
        regarding = _regarding(events.Kind.SERVICE, service)
        note = f"node {self._node_name} cannot serve the health check of {service} on port {port}: {why}"
        self._enqueue(regarding, "Warning", "FailedToStartServiceHealthcheck", "Listen", note)

    def backend_changed(self, service: model.ServiceName, *, healthy: bool, action: str, note: str) -> None:
        """Say on a Service that this node has found a backend unhealthy, or healthy again."""
        regarding = _regarding(events.Kind.SERVICE, service)
        kind, reason = ("Normal", "BackendHealthy") if healthy else ("Warning", "BackendUnhealthy")
        note = f"node {self._node_name}: {note}"
        self._enqueue(regarding, kind, reason, action, note, self._health_bucket)

    def grew(self, what: str) -> None:
        """Say that tables of this node were made larger."""
        self._enqueue(self._node, "Normal", "MapsGrown", "GrowMaps", what)

    def migration(self, report: migration.Report) -> None:
        """Say what became of what the Node told its agent, to people and to whoever told it."""
        kind = "Warning" if report.problem else "Normal"
        told = {migration.REPORT: msgspec.json.encode(report).decode()}
        note = migration.described(report)
        # An earlier one that was not heard is no answer any more.
        self._answer = self._event(self._node, kind, migration.REASON, "Migrate", note, told)
        self._answered.set()

    async def run(self) -> typing.NoReturn:
        """Post what is queued until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._post_answers())
            while True:
                event = await self._queue.get()
                if not await self._post(event):
                    self.dropped += 1
                self._queue.task_done()

    async def _post_answers(self) -> typing.NoReturn:
        pause_s = ANSWER_RETRY_S[0]
        while True:
            await self._answered.wait()
            self._answered.clear()
            assert self._answer is not None
            if self._order_bucket.take(self._monotonic()) and await self._post(self._answer):
                pause_s = ANSWER_RETRY_S[0]
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._answered.wait()
            pause_s = min(2 * pause_s, ANSWER_RETRY_S[1])
            self._answered.set()

    async def _post(self, event: "_Event") -> bool:
        """Whether it is there now."""
        try:
            await self._poster.post(event.path, event.body)
        except client.ClientError as error:
            # Of an earlier attempt whose answer was lost.
            if error.status != _EXISTS:
                # Once per outage: an agent that may not post Events is still a working agent.
                if not self._failing:
                    _log.warning("cannot post Events: %s", error)
                self._failing = True
                return False
        self.posted += 1
        self._failing = False
        return True

    def _say_of(
        self, event: events.Rejected | events.Upsert, reason: str, note: str, bucket: token_bucket.TokenBucket
    ) -> None:
        key = (event.kind, event.name)
        if event.kind not in API_VERSIONS or self._said.get(key) == note:
            return
        # A malformed object may have any text for a name; such an Event would be refused.
        if not all(_DNS_NAME.fullmatch(part) for part in event.name if part):
            return
        regarding = _regarding(event.kind, event.name, event.uid)
        if self._enqueue(regarding, "Warning", reason, "Decode", note, bucket):
            self._said[key] = note
            self._said.move_to_end(key)
            if len(self._said) > REMEMBERED_OBJECTS:
                self._said.popitem(last=False)

    def _enqueue(
        self,
        regarding: dict[str, str],
        kind: str,
        reason: str,
        action: str,
        note: str,
        bucket: token_bucket.TokenBucket | None = None,
    ) -> bool:
        if self._queue.full() or not (bucket or self._bucket).take(self._monotonic()):
            self.dropped += 1
            return False
        self._queue.put_nowait(self._event(regarding, kind, reason, action, note))
        return True

    def _event(
        self,
        regarding: dict[str, str],
        kind: str,
        reason: str,
        action: str,
        note: str,
        annotations: Mapping[str, str] | None = None,
    ) -> "_Event":
        regarding = {field: value for field, value in regarding.items() if value}
        # Events about objects without a namespace are kept in this one (EV-1).
        namespace = regarding.get("namespace", "default")
        stem = regarding["name"][: NAME_CHARACTERS - 17]
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        metadata: dict[str, object] = {"name": f"{stem}.{secrets.token_hex(8)}", "namespace": namespace}
        if annotations:
            metadata["annotations"] = {name: secrecy.without(text) for name, text in annotations.items()}
        body: dict[str, object] = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": metadata,
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
            "type": kind,
            "reason": reason,
            "action": action,
            "regarding": regarding,
            "note": secrecy.without(note).encode()[:NOTE_BYTES].decode(errors="ignore"),
        }
        return _Event(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", body)


def _regarding(kind: events.Kind, name: events.ObjectName, uid: str = "") -> dict[str, str]:
    """What an Event is about; an empty uid is left out."""
    return {
        "kind": str(kind),
        "namespace": name.namespace,
        "name": name.name,
        "uid": uid,
        "apiVersion": API_VERSIONS[kind],
    }


class _Event(typing.NamedTuple):
    """One that is to be posted."""

    path: str
    body: dict[str, object]
