"""The stand-in is used by other tests and benchmarks, so what it promises is tested too."""

import asyncio
import json
import pathlib
import signal
import sys
from typing import Any

import aiohttp
import pytest

from lbproxy.lab import apiserver, apistore
from tests.kube import objects

MERGE = {"Content-Type": "application/merge-patch+json"}


async def test_another_process_can_change_objects(server: apiserver.ApiServer) -> None:
    url = f"{server.url}/api/v1/namespaces/shop/services/web"
    async with aiohttp.ClientSession() as session:
        async with session.put(url, json={"spec": {"clusterIP": "10.96.0.1"}}) as reply:
            created = await reply.json()
        async with session.patch(url, json={"spec": {"clusterIP": None, "x": 1}}, headers=MERGE) as reply:
            patched = await reply.json()
        async with session.get(url) as reply:
            assert (await reply.json()) == patched
        async with session.delete(url) as reply:
            assert reply.status == 200
        async with session.delete(url) as reply:
            assert reply.status == 404
    assert created["kind"] == "Service"
    assert created["metadata"]["namespace"] == "shop"
    assert patched["spec"] == {"x": 1}
    assert int(patched["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])
    assert patched["metadata"]["uid"] == created["metadata"]["uid"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/namespaces/shop/services/none", 404),
        ("GET", "/api/v1/secrets", 404),
        ("PATCH", "/api/v1/nodes/none", 415),
        ("GET", "/apis/discovery.k8s.io/v1beta1/endpointslices", 404),
        ("GET", "/api/v1/services?continue=junk", 400),
        ("GET", "/api/v1/services?limit=x", 400),
        ("GET", "/api/v1/services?watch=1&sendInitialEvents=true", 400),
        ("GET", "/api/v1/services?labelSelector=a+in+(b)", 400),
        ("PUT", "/api/v1/services", 405),
        ("GET", "/apis/networking.k8s.io/v1/servicecidrs", 200),
    ],
)
async def test_strange_requests(server: apiserver.ApiServer, method: str, path: str, status: int) -> None:
    async with aiohttp.ClientSession() as session, session.request(method, server.url + path) as reply:
        body = await reply.json()
    assert reply.status == status
    assert body.get("code", 200) == status


async def test_a_list_in_chunks_shows_one_moment(server: apiserver.ApiServer) -> None:
    for name in "abcd":
        server.store.put(objects.service(name))
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/api/v1/services?limit=2") as reply:
            first = await reply.json()
        server.store.delete("services", ("default", "d"))
        token = first["metadata"]["continue"]
        async with session.get(
            f"{server.url}/api/v1/services", params={"limit": 2, "continue": token}
        ) as reply:
            second = await reply.json()
    assert [item["metadata"]["name"] for item in second["items"]] == ["c", "d"]
    assert first["metadata"]["remainingItemCount"] == 2
    assert "continue" not in second["metadata"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert "kind" not in second["items"][0]


async def test_a_watch_may_begin_with_the_list_and_says_where_that_ends(
    server: apiserver.ApiServer,
) -> None:
    for name in ("a", "b"):
        server.store.put(objects.service(name))
    params = {"watch": "1", "sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}/api/v1/services", params=params) as reply,
    ):
        events = [json.loads(await reply.content.readline()) for _ in range(3)]
        server.store.put(objects.service("c"))
        events.append(json.loads(await reply.content.readline()))
    names = [event["object"]["metadata"].get("name") for event in events]
    assert list(zip([event["type"] for event in events], names, strict=True)) == [
        ("ADDED", "a"),
        ("ADDED", "b"),
        ("BOOKMARK", None),
        ("ADDED", "c"),
    ]
    bookmark = events[2]["object"]["metadata"]
    assert bookmark["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert bookmark["resourceVersion"] == events[1]["object"]["metadata"]["resourceVersion"]


async def test_bodies_in_protobuf_are_refused(server: apiserver.ApiServer) -> None:
    url = f"{server.url}/apis/events.k8s.io/v1/namespaces/default/events"
    headers = {"Content-Type": "application/vnd.kubernetes.protobuf"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=b"k8s\0", headers=headers) as reply,
    ):
        assert reply.status == 415
        assert (await reply.json())["reason"] == "UnsupportedMediaType"


@pytest.mark.parametrize(
    ("text", "labels", "held"),
    [
        ("a=1", {"a": "1"}, True),
        ("a==1", {"a": "1"}, True),
        ("a!=1", {"a": "1"}, False),
        ("a!=1", {}, True),
        ("a", {"a": ""}, True),
        ("!a", {"a": ""}, False),
        ("!a,b=2", {"b": "2"}, True),
        ("", {}, True),
    ],
)
def test_selectors(text: str, labels: dict[str, str], held: bool) -> None:
    stored = apistore.Stored(b"", labels, {})
    assert apistore.selector(text, "").admits(stored) is held


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patches_as_in_the_rfc(target: Any, patch: Any, result: Any) -> None:
    assert apistore.merged(target, patch) == result


def test_history_has_an_end() -> None:
    store = apistore.Store(history=10)
    for number in range(30):
        store.put(objects.service(f"s{number}"))
    with pytest.raises(apistore.Gone):
        store.since("services", 5)
    assert [change.version for change in store.since("services", store.version - 2)] == [30, 31]


async def test_it_runs_on_its_own(tmp_path: pathlib.Path) -> None:
    cluster = tmp_path / "cluster.json"
    cluster.write_text(json.dumps({"kind": "List", "items": [objects.service("web"), objects.node("n")]}))
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "lbproxy.lab.apiserver",
            "--port",
            "0",
            "--load",
            str(cluster),
            "--token",
            "t",
        ),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/api/v1/services") as reply:
                assert reply.status == 401
            headers = {"Authorization": "Bearer t"}
            async with session.get(f"{url}/api/v1/services", headers=headers) as reply:
                names = [item["metadata"]["name"] for item in (await reply.json())["items"]]
        assert names == ["web"]
    finally:
        process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
