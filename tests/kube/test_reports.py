import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest

from lbproxy.core import events, migration, model
from lbproxy.kube import client, reports
from lbproxy.lab import apiserver
from tests.kube.conftest import eventually

WEB = events.ObjectName("shop", "web")


def rejection(name: str = "web", reason: str = "spec.ports[0].port: 0 is not in 1..65535") -> events.Rejected:
    return events.Rejected(events.Kind.SERVICE, events.ObjectName("shop", name), reason, "uid-1")


class Post:
    """Takes Events, or refuses them."""

    def __init__(self) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.refusals = 0

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        if self.refusals:
            self.refusals -= 1
            raise client.ClientError("403 Forbidden", 403)
        if any(one["metadata"]["name"] == body["metadata"]["name"] for one in self.bodies):  # type: ignore[index]
            raise client.ClientError("409 Conflict", 409)
        self.bodies.append(body)


@contextlib.asynccontextmanager
async def running(reporter: reports.Reports) -> AsyncIterator[None]:
    task = asyncio.create_task(reporter.run())
    try:
        yield
    finally:
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_an_event_regards_the_rejected_object(server: apiserver.ApiServer) -> None:
    api = await client.connect(master=server.url)
    reporter = reports.Reports(api, "node-a", clock=lambda: 1_800_000_000.25)
    async with running(reporter):
        reporter.rejected(rejection())
        await eventually(lambda: reporter.posted == 1)
    await api.close()
    ((key, stored),) = server.store.objects["events"].items()
    event = json.loads(stored.raw)
    assert key[0] == "shop"
    assert key[1].startswith("web.")
    assert event["regarding"] == {
        "kind": "Service",
        "namespace": "shop",
        "name": "web",
        "uid": "uid-1",
        "apiVersion": "v1",
    }
    assert event["eventTime"] == "2027-01-15T08:00:00.250000Z"
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "InvalidObject", "Decode")
    assert (event["reportingController"], event["reportingInstance"]) == ("lbproxy", "lbproxy-node-a")
    assert "spec.ports[0].port: 0 is not" in event["note"]


async def test_the_start_is_reported_for_the_node_in_the_default_namespace() -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a")
    async with running(reporter):
        reporter.started()
        await eventually(lambda: post.bodies)
    body = post.bodies[0]
    assert body["metadata"]["namespace"] == "default"
    assert body["regarding"] == {"kind": "Node", "name": "node-a", "apiVersion": "v1"}
    assert (body["type"], body["reason"], body["note"]) == ("Normal", "Starting", "")


@pytest.mark.parametrize(
    ("server", "reason"),
    [("health", "FailedToStartProxierHealthcheck"), ("metrics", "FailedToStartMetricServer")],
)
async def test_what_ends_the_agent_is_said_before_it_ends(server: str, reason: str) -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a")
    async with running(reporter):
        await reporter.cannot_serve(server, "in use")
        assert [body["reason"] for body in post.bodies] == [reason]
    assert post.bodies[0]["action"] == "StartKubeProxy"


async def test_last_words_are_not_waited_for_long() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "LAST_WORDS_S", 0.01)
        await reports.Reports(Post(), "node-a").cannot_serve("health", "in use")


async def test_a_health_check_that_can_not_be_served_is_said_on_its_service() -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a")
    async with running(reporter):
        reporter.health_check_failed(model.ServiceName("shop", "web"), 30100, "Address already in use")
        await eventually(lambda: post.bodies)
    body = post.bodies[0]
    assert (body["type"], body["reason"], body["action"]) == (
        "Warning",
        "FailedToStartServiceHealthcheck",
        "Listen",
    )
    assert body["regarding"] == {"kind": "Service", "namespace": "shop", "name": "web", "apiVersion": "v1"}
    assert body["note"] == (
        "node node-a cannot serve the health check of shop/web on port 30100: Address already in use"
    )


async def test_each_reason_is_given_once_in_a_row() -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a")
    async with running(reporter):
        for reason in ("one", "one", "two", "two", "one"):
            reporter.rejected(rejection(reason=reason))
        await eventually(lambda: len(post.bodies) == 3)
    assert [body["note"].rpartition(": ")[2] for body in post.bodies] == ["one", "two", "one"]


async def test_what_is_passed_over_is_one_event_of_the_object() -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a", monotonic=lambda: 0.0)
    wrong = events.Upsert(events.Kind.SERVICE, WEB, None, ("weights: odd", "probe: odd"), "uid-1")
    async with running(reporter):
        for upsert in (wrong, wrong, wrong._replace(warnings=("probe: odd",))):
            reporter.warned(upsert)
        for number in range(100):  # many mistakes leave room for a rejection
            reporter.warned(wrong._replace(name=events.ObjectName("shop", f"a{number}")))
        reporter.rejected(rejection(reason="one"))
        await eventually(lambda: len(post.bodies) == reports.BURST + 1)
    first, second, *_, last = post.bodies
    assert (first["type"], first["reason"], first["note"]) == (
        "Warning",
        "InvalidField",
        "weights: odd; probe: odd",
    )
    assert first["regarding"] == {
        "kind": "Service",
        "namespace": "shop",
        "name": "web",
        "uid": "uid-1",
        "apiVersion": "v1",
    }
    assert second["note"] == "probe: odd"
    assert last["reason"] == "InvalidObject"


async def test_a_flood_is_cut_to_a_burst_and_a_trickle() -> None:
    post, now_s = Post(), 0.0
    reporter = reports.Reports(post, "node-a", monotonic=lambda: now_s)
    async with running(reporter):
        for number in range(100):
            reporter.rejected(rejection(f"a{number}"))
        await eventually(lambda: len(post.bodies) == reports.BURST)
        now_s = 10.0
        for number in range(100):
            reporter.rejected(rejection(f"b{number}"))
        await eventually(lambda: len(post.bodies) == reports.BURST + 2)
    assert reporter.dropped == 200 - reports.BURST - 2


async def test_what_was_not_admitted_may_be_said_later() -> None:
    post, now_s = Post(), 0.0
    reporter = reports.Reports(post, "node-a", monotonic=lambda: now_s)
    for number in range(reports.BURST + 1):
        reporter.rejected(rejection(f"a{number}"))
    now_s = 100.0
    async with running(reporter):
        reporter.rejected(rejection(f"a{reports.BURST}"))
        await eventually(lambda: len(post.bodies) == reports.BURST + 1)


async def test_a_server_that_takes_no_events_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    post = Post()
    post.refusals = 3
    reporter = reports.Reports(post, "node-a")
    async with running(reporter):
        for number in range(4):
            reporter.rejected(rejection(f"a{number}"))
        await eventually(lambda: reporter.posted == 1)
    assert [record.message for record in caplog.records] == ["cannot post Events: 403 Forbidden"]
    assert reporter.dropped == 3


async def test_nothing_waits_for_a_server_that_does_not_answer() -> None:
    reporter = reports.Reports(Post(), "node-a", monotonic=lambda: 1e9)
    for number in range(1000):
        reporter.rejected(rejection(f"a{number}"))
    assert reporter.dropped == 1000 - reports.BURST


@pytest.mark.parametrize(
    "name",
    [
        events.ObjectName("shop", "(unnamed)"),
        events.ObjectName("../..", "web"),
        events.ObjectName("a", "x/../y"),
    ],
    ids=str,
)
async def test_an_object_without_a_possible_name_has_no_event(name: events.ObjectName) -> None:
    reporter = reports.Reports(Post(), "node-a")
    reporter.rejected(events.Rejected(events.Kind.SERVICE, name, "reason"))
    reporter.rejected(events.Rejected(events.Kind.MANIFEST, WEB, "reason"))
    assert reporter.dropped == 0
    assert reporter._queue.empty()


async def test_the_limits_of_an_event_are_kept() -> None:
    post = Post()
    reporter = reports.Reports(post, "n" * 253)
    async with running(reporter):
        reporter.rejected(rejection("w" * 253, "ä" * 2000))
        await eventually(lambda: post.bodies)
    body = post.bodies[0]
    assert len(body["metadata"]["name"]) <= 253
    assert len(body["reportingInstance"]) <= 128
    assert len(body["note"].encode()) <= 1024


async def test_the_health_of_backends_is_said_on_their_service_and_keeps_nobody_from_being_heard() -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a", monotonic=lambda: 1.0)
    service = model.ServiceName("shop", "web")
    async with running(reporter):
        for _ in range(reports.BURST):
            reporter.backend_changed(service, healthy=False, action="Probe", note="10.0.0.1 is down")
        await eventually(lambda: len(post.bodies) == reports.BURST)
        reporter.backend_changed(service, healthy=True, action="Probe", note="10.0.0.1 is up")
        reporter.rejected(rejection())
        await eventually(lambda: len(post.bodies) == reports.BURST + 1)
    body = post.bodies[0]
    said = (body["type"], body["reason"], body["action"], body["note"])
    assert said == ("Warning", "BackendUnhealthy", "Probe", "node node-a: 10.0.0.1 is down")
    assert (body["regarding"]["kind"], body["regarding"]["name"]) == ("Service", "web")
    assert post.bodies[-1]["reason"] == "InvalidObject"
    assert reporter.dropped == 1


async def test_what_became_of_an_order_is_said_to_people_and_to_programs() -> None:
    post = Post()
    reporter = reports.Reports(post, "node-a")
    told = migration.Report(
        "take-over/1", obeys=True, serving=True, removed=("table",), flows_of_kube_proxy={"TCP": 2}
    )
    async with running(reporter):
        reporter.migration(told)
        await eventually(lambda: len(post.bodies) == 1)
        reporter.migration(migration.Report("return/2", "no rules"))
        await eventually(lambda: len(post.bodies) == 2)
    done, failed = post.bodies
    assert done["regarding"] == {"kind": "Node", "name": "node-a", "apiVersion": "v1"}
    assert (done["reason"], done["type"], failed["type"]) == (migration.REASON, "Normal", "Warning")
    assert done["note"] == (
        "take-over/1: done; removed: table; lbproxy serves, going on with kube-proxy: 2 TCP"
    )
    carried = done["metadata"]["annotations"][migration.REPORT]
    assert msgspec.json.decode(carried, type=migration.Report) == told


class Deaf(Post):
    """Has the first answer lost on the way back."""

    lost = True

    async def post(self, path: str, body: Mapping[str, object]) -> None:
        await super().post(path, body)
        if self.lost:
            self.lost = False
            raise client.ClientError("connection reset")


@pytest.mark.parametrize("kind", [Post, Deaf])
async def test_an_answer_is_posted_until_it_is_there(
    kind: type[Post], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reports, "ANSWER_RETRY_S", (0.01, 0.01))
    post = kind()
    post.refusals = 0 if kind is Deaf else 3
    reporter = reports.Reports(post, "node-a")
    async with running(reporter):
        reporter.migration(migration.Report("take-over/1", "not yet"))
        reporter.migration(migration.Report("take-over/1"))
        await eventually(lambda: reporter.posted == 1)
        assert [body["note"].partition(";")[0] for body in post.bodies] == ["take-over/1: done"]
        # Once it is there it is not posted any more, and the next one is.
        reporter.migration(migration.Report("status/2"))
        await eventually(lambda: reporter.posted == 2)
        await asyncio.sleep(0.05)
    assert len(post.bodies) == reporter.posted == 2
    assert len(caplog.records) == 1


async def test_the_last_answer_waits_for_its_turn() -> None:
    post, now_s = Post(), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "ANSWER_RETRY_S", (0.01, 0.01))
        reporter = reports.Reports(post, "node-a", monotonic=lambda: now_s)
        async with running(reporter):
            for number in range(reports.BURST):
                reporter.migration(migration.Report(f"status/{number}"))
                await eventually(lambda number=number: len(post.bodies) == number + 1)  # type: ignore[misc]
            reporter.migration(migration.Report("take-over/last"))
            await asyncio.sleep(0.05)
            assert len(post.bodies) == reports.BURST
            now_s = 60.0
            await eventually(lambda: len(post.bodies) == reports.BURST + 1)
    assert post.bodies[-1]["note"].startswith("take-over/last")
