import asyncio
import contextlib
import time
import typing
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest

from lbproxy.core import events, model
from lbproxy.kube import client, reflector
from lbproxy.lab import apiserver
from tests.kube import objects
from tests.kube.conftest import Recorder, Running, eventually

WEB = ("services", ("default", "web"))


def line(kind: str, obj: dict[str, Any], version: int) -> bytes:
    obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(version)}}
    return msgspec.json.encode({"type": kind, "object": obj}) + b"\n"


def queries(server: apiserver.ApiServer, *, watch: bool) -> list[dict[str, str]]:
    return [request.query for request in server.requests if ("watch" in request.query) is watch]


async def test_a_list_comes_in_chunks_and_synced_comes_last(server: apiserver.ApiServer) -> None:
    for number in range(1200):
        server.store.put(objects.service(f"s{number:04}"))
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        assert [query["limit"] for query in queries(server, watch=False)] == ["500"] * 3
        assert [len(batch) for batch in running.seen.batches] == [500, 500, 200, 1]
        assert running.seen.all[-1] == events.Synced(events.Kind.SERVICE)
        assert len(running.seen.present) == 1200
        assert isinstance(running.seen.present["default/s0000"].value, model.Service)


async def test_an_empty_list_is_complete_too(server: apiserver.ApiServer) -> None:
    async with Running(server, reflector.endpoint_slices()).work() as running:
        await running.until_watching()
        assert running.seen.all == [events.Synced(events.Kind.ENDPOINT_SLICE)]


async def test_changes_arrive_through_the_watch(services: Running) -> None:
    store = services.server.store
    store.put(objects.service("new"))
    store.patch(*WEB, {"spec": {"ports": [{"port": 81}]}})
    store.delete("services", ("default", "db"))
    await services.until_present("web", "new")
    value = services.seen.present["default/web"].value
    assert isinstance(value, model.Service)
    assert value.ports[0].port == 81
    assert services.state.lists == 1


async def test_what_is_not_selected_is_not_seen_and_comes_and_goes_with_its_label(
    server: apiserver.ApiServer,
) -> None:
    label = "service.kubernetes.io/service-proxy-name"
    server.store.put(objects.service("headless", "None"))
    server.store.put(objects.service("other", metadata={"labels": {label: ""}}))
    server.store.put(objects.service("web"))
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        await running.until_present("web")
        server.store.patch(*WEB, {"metadata": {"labels": {label: "mine"}}})
        server.store.patch("services", ("default", "other"), {"metadata": {"labels": None}})
        await running.until_present("other")
        assert running.state.lists == 1


async def test_only_the_own_node_is_watched(server: apiserver.ApiServer) -> None:
    server.store.put(objects.node("node-a"))
    server.store.put(objects.node("node-b"))
    async with Running(server, reflector.node("node-b")).work() as running:
        await running.until_watching()
        assert list(running.seen.present) == ["node-b"]


async def test_slices_of_headless_services_are_not_seen(server: apiserver.ApiServer) -> None:
    headless = objects.endpoint_slice("db-1", ["10.244.0.2"])
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    server.store.put(headless)
    server.store.put(objects.endpoint_slice("web-1", ["10.244.0.1"]))
    async with Running(server, reflector.endpoint_slices()).work() as running:
        await running.until_watching()
        assert list(running.seen.present) == ["default/web-1"]


async def test_bookmarks_move_the_version(services: Running) -> None:
    server = services.server
    server.store.put(objects.node("elsewhere"))  # the version grows without an event for us
    server.bookmark("services")
    await eventually(lambda: services.state.version == str(server.store.version))
    server.cut("services")
    await eventually(lambda: len(queries(server, watch=True)) == 2)
    assert queries(server, watch=True)[1]["resourceVersion"] == str(server.store.version)
    assert services.state.last_bookmark_s > 0
    assert services.seen.of(events.Delete) == []


async def test_a_watch_that_ends_is_followed_by_one_from_the_same_place(services: Running) -> None:
    server = services.server
    server.store.put(objects.service("third"))
    await services.until_present("db", "web", "third")
    server.cut("services")
    await eventually(lambda: len(queries(server, watch=True)) == 2)
    server.store.put(objects.service("fourth"))
    await services.until_present("db", "web", "third", "fourth")
    assert services.state.lists == 1
    assert services.pauses.asked_s == []
    assert len(services.seen.of(events.Upsert)) == 4


@pytest.mark.parametrize("as_status", [False, True], ids=["as an event", "as a status"])
async def test_after_410_a_relist_deletes_what_vanished(services: Running, as_status: bool) -> None:
    server = services.server
    server.faults.gone_as_status = as_status
    server.deafen("services")
    server.store.delete("services", ("default", "db"))
    server.store.put(objects.service("new"))
    server.store.compact()
    server.cut("services")
    await eventually(lambda: services.state.lists == 2)
    await services.until_present("web", "new")
    assert services.seen.of(events.Delete) == [
        events.Delete(events.Kind.SERVICE, events.ObjectName("default", "db"))
    ]
    assert "too old" in services.state.last_error


async def test_a_410_on_continue_starts_the_list_again(server: apiserver.ApiServer) -> None:
    for number in range(600):
        server.store.put(objects.service(f"s{number:04}"))
    server.faults.gone_continues = 1
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        assert len(running.seen.of(events.Synced)) == 1
        assert running.seen.of(events.Delete) == []
        assert len(running.seen.present) == 600
        assert ["continue" in query for query in queries(server, watch=False)] == [False, True, False, True]


async def test_nothing_is_deleted_while_a_relist_is_incomplete(server: apiserver.ApiServer) -> None:
    for number in range(600):
        server.store.put(objects.service(f"s{number:04}"))
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        server.deafen("services")
        server.faults.gone_continues = 3
        server.store.delete("services", ("default", "s0000"))
        server.store.compact()
        server.cut("services")
        await eventually(lambda: len(running.seen.of(events.Synced)) == 2)
        kinds = [type(event) for event in running.seen.all]
        assert running.state.lists == 5
        assert kinds.index(events.Delete) > len(kinds) - 3
        assert len(running.seen.of(events.Delete)) == 1


async def test_what_a_broken_off_list_delivered_is_deleted_by_the_next(server: apiserver.ApiServer) -> None:
    for number in range(600):
        server.store.put(objects.service(f"s{number:04}"))
    server.faults.gone_continues = 1
    running = Running(server, reflector.services())

    def deleted_meanwhile(batch: list[events.Event]) -> None:
        if not running.seen.batches:
            server.store.delete("services", ("default", "s0000"))
        running.seen(batch)

    async with running.work(deleted_meanwhile):
        await running.until_watching()
        assert len(running.seen.present) == 599
        assert running.seen.of(events.Delete) == [
            events.Delete(events.Kind.SERVICE, events.ObjectName("default", "s0000"))
        ]


async def test_a_relist_knows_what_the_watch_brought_and_took(services: Running) -> None:
    server = services.server
    server.store.put(objects.service("new"))
    server.store.delete("services", ("default", "db"))
    await services.until_present("web", "new")
    server.deafen("services")
    server.store.delete("services", ("default", "new"))
    server.store.compact()
    server.cut("services")
    await eventually(lambda: len(services.seen.of(events.Synced)) == 2)
    assert [event.name.name for event in services.seen.of(events.Delete)] == ["db", "new"]


async def test_bookmarks_are_asked_for() -> None:
    async with (
        apiserver.ApiServer(bookmark_interval_s=0.01) as server,
        Running(server, reflector.services()).work() as running,
    ):
        await eventually(lambda: running.state.last_bookmark_s)


async def test_a_failing_list_is_tried_again_ever_more_slowly(server: apiserver.ApiServer) -> None:
    server.store.put(objects.service("web"))
    server.faults.fail = 8
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        assert running.pauses.asked_s == [0.5, 1, 2, 4, 8, 16, 30, 30]
        assert "500 Internal Server Error: injected failure" in running.state.last_error
        assert running.state.failures == 8
        assert list(running.seen.present) == ["default/web"]


async def test_progress_shortens_the_backoff_again(services: Running) -> None:
    server = services.server
    for version in (10_000, 20_000):
        server.faults.fail = 2
        server.drop_after("services", line("MODIFIED", objects.service("web"), version))
        server.store.version = version
        await eventually(lambda: server.faults.fail == 0)
        await services.until_watching()
    assert services.pauses.asked_s == [0.5, 1, 2] * 2


async def test_a_watch_refused_with_500_resumes_without_a_list(services: Running) -> None:
    server = services.server
    server.faults.fail = 3
    server.cut("services")
    await eventually(lambda: server.faults.fail == 0)
    server.store.put(objects.service("new"))
    await services.until_present("db", "web", "new")
    assert services.state.lists == 1


async def test_a_line_cut_off_by_a_dropped_connection_comes_again_whole(services: Running) -> None:
    server = services.server
    server.faults.stall = True
    server.store.put(objects.service("new"))
    whole = line("ADDED", objects.service("new"), server.store.version)
    for watcher in server.watching("services"):
        watcher.lines[:] = [whole[: len(whole) // 2]]
        watcher.end(broken=True)
    server.faults.stall = False
    await services.until_present("db", "web", "new")
    assert services.state.lists == 1
    assert services.seen.of(events.Rejected) == []
    assert "broke in the middle" in services.state.last_error


async def test_half_a_line_followed_by_others_is_rejected_and_listed_again(services: Running) -> None:
    server = services.server
    half = line("MODIFIED", objects.service("web"), 999)[:120]
    server.deafen("services")  # only the list can tell of it
    server.store.put(objects.service("new"))
    server.send("services", half + b"\n")
    await services.until_present("db", "web", "new")
    assert services.state.lists == 2
    assert [str(event.name) for event in services.seen.of(events.Rejected)] == ["default/web"]
    assert services.seen.of(events.Delete) == []


async def test_invalid_utf8_in_one_object_leaves_the_watch_going(services: Running) -> None:
    server = services.server
    bad = line("MODIFIED", objects.service("web", type="XX"), 999).replace(b"XX", b"\xff\xfe")
    bad = bad.replace(b'"name":"http"', b'"name":"\xff\xfe"')
    server.send("services", bad)
    server.store.version = 1000
    server.store.put(objects.service("new"))
    await services.until_present("db", "web", "new")
    rejected = services.seen.of(events.Rejected)
    assert [(str(event.name), event.kind) for event in rejected] == [("default/web", events.Kind.SERVICE)]
    assert (services.state.lists, services.state.watches, services.state.rejected) == (1, 1, 1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\xfd\n",
        b"[]\n",
        b"5\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ERROR","object":7}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["not text", "array", "number", "no object", "strange error", "deep nesting"],
)
async def test_a_line_that_is_no_event_leads_to_a_list(services: Running, garbage: bytes) -> None:
    services.server.send("services", garbage)
    await eventually(lambda: services.state.lists == 2 and services.state.connected)
    await services.until_present("db", "web")
    taken_back = [(event.kind, event.name) for event in services.seen.of(events.Accepted)]
    assert taken_back == [(event.kind, event.name) for event in services.seen.of(events.Rejected)]
    assert services.seen.of(events.Delete) == []


async def test_an_event_of_a_kind_unheard_of_is_passed_over(services: Running) -> None:
    services.server.send("services", line("RENAMED", objects.service("web"), 999))
    await eventually(lambda: services.state.version == "999")
    assert len(services.seen.batches) == 2


async def test_an_error_event_of_another_kind_resumes_the_watch(services: Running) -> None:
    status = {"kind": "Status", "code": 500, "message": "etcd is away"}
    services.server.send("services", msgspec.json.encode({"type": "ERROR", "object": status}) + b"\n")
    await eventually(lambda: services.state.watches == 2)
    assert services.state.lists == 1
    assert "etcd is away" in services.state.last_error


async def test_a_watch_that_fails_time_and_again_where_it_is_leads_to_a_list(services: Running) -> None:
    status = {"kind": "Status", "code": 500, "message": "no kind is registered for this"}

    async def fails() -> None:
        await services.until_watching()
        before = services.state.failures
        services.server.send("services", msgspec.json.encode({"type": "ERROR", "object": status}) + b"\n")
        await eventually(lambda: services.state.failures > before)

    for name in ("web", "one", "other"):
        # What a watch brings in between is progress.
        for _ in range(reflector.MOST_FAILURES - 1):
            await fails()
        await services.until_watching()
        services.server.store.put(objects.service(name))
        await eventually(lambda: services.state.version == str(services.server.store.version))
    assert services.state.lists == 1
    for _ in range(reflector.MOST_FAILURES):
        await fails()
    await eventually(lambda: services.state.lists == 2)


async def test_one_malformed_object_in_a_list_is_rejected_alone(server: apiserver.ApiServer) -> None:
    server.store.put(objects.service("web"))
    server.store.put(objects.service("bad", "not-an-ip", metadata={"uid": "u-1"}))
    server.store.plant("services", ("default", "null"), b"null")
    server.store.plant(
        "services", ("default", "utf8"), b'{"metadata":{"name":"utf8"},"spec":{"clusterIP":"\xff"}}'
    )
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        assert list(running.seen.present) == ["default/web"]
        rejected = [event for event in running.seen.all if isinstance(event, events.Rejected)]
        assert {event.name.name: event.uid for event in rejected} == {
            "bad": "u-1",
            "(unnamed)": "",
            "utf8": "",
        }
        assert "clusterIP" in next(event.reason for event in rejected if event.name.name == "bad")


async def test_the_last_good_version_of_an_object_outlives_a_relist(services: Running) -> None:
    server = services.server
    server.store.patch(*WEB, {"spec": {"clusterIP": "nonsense", "clusterIPs": ["nonsense"]}})
    await eventually(lambda: services.state.rejected == 1)
    server.store.compact()
    server.cut("services")
    await eventually(lambda: len(services.seen.of(events.Synced)) == 2)
    await services.until_present("db", "web")
    assert services.seen.of(events.Delete) == []


async def test_a_slice_of_10000_endpoints_arrives_in_one_line(server: apiserver.ApiServer) -> None:
    async with Running(server, reflector.endpoint_slices()).work() as running:
        await running.until_watching()
        addresses = [f"10.{200 + n // 65536}.{n // 256 % 256}.{n % 256}" for n in range(10_000)]
        server.store.put(objects.endpoint_slice("huge", addresses))
        await running.until_present("huge")
        value = running.seen.present["default/huge"].value
        assert isinstance(value, model.EndpointSlice)
        assert len(value.endpoints) == 10_000


async def test_many_events_come_in_few_batches_and_in_order(services: Running) -> None:
    for port in range(1, 2001):
        services.server.store.patch(*WEB, {"spec": {"ports": [{"port": port}]}})
    await eventually(lambda: len(services.seen.of(events.Upsert)) == 2 + 2000)
    values = [event.value for event in services.seen.of(events.Upsert)[2:]]
    ports = [value.ports[0].port for value in values if isinstance(value, model.Service)]
    assert ports == list(range(1, 2001))
    assert len(services.seen.batches) < 200


async def test_a_stalled_watch_is_given_up(server: apiserver.ApiServer) -> None:
    server.store.put(objects.service("web"))
    async with Running(server, reflector.services(), idle_timeout_s=1).work() as running:
        await running.until_watching()

        def recover() -> None:
            server.faults.stall = False

        # Before the next watch is opened: one that began in the stall would stay silent too.
        running.pauses.meanwhile = recover
        server.faults.stall = True
        server.store.put(objects.service("new"))
        await running.until_present("web", "new")
        assert "silent for 1 s" in running.state.last_error
        assert (running.state.lists, running.state.watches) == (1, 2)


async def test_an_outage_changes_nothing_until_the_server_is_back() -> None:
    first = apiserver.ApiServer()
    first.store.put(objects.service("web"))
    first.store.put(objects.service("old"))
    await first.start()
    port = int(first.url.rpartition(":")[2])
    later_s = 0.0
    async with Running(first, reflector.services()).work(
        monotonic=lambda: time.monotonic() + later_s
    ) as running:
        await running.until_watching()
        before = len(running.seen.all)
        later_s += 2 * reflector.SILENT_S
        assert running.reflector.problem == ""
        await first.stop()
        await eventually(lambda: "connection refused" in running.state.last_error)
        assert len(running.seen.all) == before
        assert not running.state.connected
        assert running.reflector.problem == ""
        later_s += 2 * reflector.SILENT_S
        assert running.reflector.problem.startswith("the API server has told nothing of Service for ")
        second = apiserver.ApiServer(port=port)
        second.store.version = 1_000_000
        second.store.put(objects.service("web"))
        second.store.compact()
        async with second:
            await running.until_present("web")


@contextlib.asynccontextmanager
async def restored(services: Running, **more: Any) -> AsyncIterator[apiserver.ApiServer]:
    """The server from a backup: at the same address, without `db`, long before the version that we know."""
    old = services.server
    await old.stop()
    server = apiserver.ApiServer(port=int(old.url.rpartition(":")[2]), **more)
    server.store.put(objects.service("web"))
    async with server:
        yield server


async def test_a_server_that_was_restored_from_a_backup_is_listed_again(server: apiserver.ApiServer) -> None:
    server.store.version = 1_000_000
    for name in ("db", "web"):
        server.store.put(objects.service(name))
    async with Running(server, reflector.services()).work() as running:
        await running.until_present("db", "web")
        # It takes a watch from a version that it has not come to yet, and says nothing, but for bookmarks.
        async with restored(running, bookmark_interval_s=0.05) as again:
            await running.until_present("web")
            again.store.put(objects.service("new"))
            await running.until_present("web", "new")


async def test_a_server_that_is_behind_says_so_and_is_listed_again(server: apiserver.ApiServer) -> None:
    server.store.version = 1_000_000
    server.store.put(objects.service("web"))
    async with Running(server, reflector.services()).work() as running:
        await running.until_watching()
        server.faults.fail, server.faults.fail_status = 1, 504
        server.faults.fail_message = "Timeout: Too large resource version: 1000001, current: 5"
        server.cut()
        await eventually(lambda: running.state.lists == 2)


async def test_a_server_that_only_ever_is_silent_is_listed_again(server: apiserver.ApiServer) -> None:
    server.store.put(objects.service("web"))
    async with Running(server, reflector.services(), idle_timeout_s=0.1).work() as running:
        await running.until_watching()
        server.faults.stall = True
        server.store.put(objects.service("new"))
        await running.until_present("web", "new")
        assert running.state.watches > reflector.MOST_SILENCES


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
async def test_a_wall_clock_that_jumps_is_no_failure(server: apiserver.ApiServer, jump_s: float) -> None:
    server.store.put(objects.service("web"))
    wall_s = 1_000_000.0
    async with Running(server, reflector.services()).work(clock=lambda: wall_s) as running:
        await running.until_watching()
        wall_s += jump_s
        # Long enough to count as a watch that served, had it said nothing.
        await asyncio.sleep(reflector.SHORT_WATCH_S)
        server.cut()
        await eventually(lambda: running.state.watches == 2 and running.state.connected)
        assert running.pauses.asked_s == []


async def test_a_list_that_is_none_is_an_error(server: apiserver.ApiServer) -> None:
    server.store.plant("services", ("default", "broken"), b'{"metadata":')
    async with Running(server, reflector.services()).work() as running:
        await eventually(lambda: "not a list" in running.state.last_error)
        assert running.seen.all == []


async def test_cancelling_ends_it(services: Running) -> None:
    task = asyncio.create_task(services.reflector.run())
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


class Chunks:
    """A list of two chunks by hand: the second waits for `release`, and fails if there is an `error`."""

    def __init__(self, error: client.ClientError | None = None) -> None:
        self.release = asyncio.Event()
        self.asked: list[str] = []
        self.cancelled = False
        self._error = error

    async def get(self, _path: str, query: Mapping[str, str]) -> bytes:
        chunk = query.get("continue", "")
        self.asked.append(chunk)
        metadata: dict[str, str] = {"resourceVersion": "7"}
        if not chunk:
            metadata["continue"] = "more"
        else:
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
            if self._error is not None:
                raise self._error
        items = [objects.service(f"s{chunk}{number}") for number in range(60)]
        return msgspec.json.encode({"metadata": metadata, "items": items})

    def stream(self, *_: object) -> typing.Any:
        raise AssertionError("it never comes to that")


async def test_the_next_chunk_is_on_its_way_before_this_one_is_emitted() -> None:
    transport = Chunks()
    seen: list[list[str]] = []

    def emit(_batch: list[events.Event]) -> None:
        seen.append([*transport.asked])

    listing = asyncio.create_task(reflector.Reflector(transport, reflector.services(), emit)._list())
    await eventually(lambda: seen)
    assert seen == [["", "more"]]
    transport.release.set()
    await listing
    assert len(seen) == 3


async def test_a_chunk_that_fails_takes_nothing_back_of_the_one_before() -> None:
    transport = Chunks(client.ClientError("gone", 410))
    transport.release.set()
    seen = Recorder()
    with pytest.raises(client.ClientError, match="gone"):
        await reflector.Reflector(transport, reflector.services(), seen)._list()
    assert [len(batch) for batch in seen.batches] == [60]
    assert seen.of(events.Synced) == []


async def test_a_list_that_is_given_up_gives_up_its_request() -> None:
    transport = Chunks()
    seen = Recorder()
    listing = asyncio.create_task(reflector.Reflector(transport, reflector.services(), seen)._list())
    await eventually(lambda: seen.batches)
    listing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listing
    assert transport.cancelled
