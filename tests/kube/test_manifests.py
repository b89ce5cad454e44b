import asyncio
import contextlib
import json
import os
import pathlib
from typing import Any

import pytest
import yaml

from lbproxy.core import events, model
from lbproxy.kube import documents, manifests
from tests.kube import objects
from tests.kube.conftest import Recorder, eventually


class Folder:
    """A folder of manifests, and what the source makes of it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.seen = Recorder()
        self.source = manifests.Manifests(path, self.seen)

    def write(self, name: str, *written: Any) -> pathlib.Path:
        """Put objects into a file the safe way: under another name, then renamed over it."""
        text = "---\n".join(yaml.safe_dump(obj) for obj in written)
        return self.write_text(name, text)

    def write_text(self, name: str, text: str | bytes) -> pathlib.Path:
        draft = self.path / f".{name}.draft"
        draft.write_bytes(text if isinstance(text, bytes) else text.encode())
        return draft.rename(self.path / name)

    def look(self) -> list[events.Event]:
        """Look as often as it takes for any change to be settled; returns what has changed."""
        before = len(self.seen.all)
        for _ in range(manifests.LONGEST_SETTLING_SCANS + 2):
            self.seen(self.source.look())
        return self.seen.all[before:]

    @property
    def names(self) -> set[str]:
        return set(self.seen.present)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Folder:
    return Folder(tmp_path)


def rejected(batch: list[events.Event]) -> list[events.Rejected]:
    return [event for event in batch if isinstance(event, events.Rejected)]


def test_the_first_look_delivers_everything_and_then_synced(folder: Folder) -> None:
    folder.write("a.yaml", objects.service("web"), objects.endpoint_slice("web-1", ["10.244.0.1"]))
    folder.write_text("b.json", json.dumps({"kind": "List", "items": [objects.node("node-a")]}))
    batch = folder.source.look()
    assert [type(event) for event in batch] == [events.Upsert] * 3 + [events.Synced] * 3
    assert {event.kind for event in batch if isinstance(event, events.Synced)} == {
        events.Kind.SERVICE,
        events.Kind.ENDPOINT_SLICE,
        events.Kind.NODE,
    }
    assert folder.look() == []


def test_an_empty_folder_is_a_complete_cluster(folder: Folder) -> None:
    assert [type(event) for event in folder.look()] == [events.Synced] * 3


def test_files_change_come_and_go(folder: Folder) -> None:
    folder.write("a.yaml", objects.service("web"))
    folder.look()
    folder.write("b.yml", objects.service("db"))
    folder.look()
    assert folder.names == {"default/web", "default/db"}
    folder.write("a.yaml", objects.service("web", ports=[{"port": 81}]))
    changed = folder.look()
    assert [type(event) for event in changed] == [events.Upsert]
    (folder.path / "a.yaml").unlink()
    assert folder.look() == [events.Delete(events.Kind.SERVICE, events.ObjectName("default", "web"))]


def test_a_rewrite_in_place_of_the_same_size_is_seen(folder: Folder) -> None:
    path = folder.write("a.yaml", objects.service("web", "10.96.0.1"))
    folder.look()
    path.write_text(path.read_text().replace("10.96.0.1", "10.96.0.2"))
    assert [type(event) for event in folder.look()] == [events.Upsert]


def test_a_rewrite_within_one_tick_of_the_clock_is_seen(folder: Folder) -> None:
    path = folder.write("a.yaml", objects.service("web", "10.96.0.1"))
    folder.seen(folder.source.look())
    tick_ns = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("10.96.0.1", "10.96.0.2"))
    os.utime(path, ns=(tick_ns, tick_ns))
    assert [type(event) for event in folder.look()] == [events.Upsert]


def test_a_file_is_not_read_while_it_is_being_written(folder: Folder) -> None:
    path = folder.write("a.yaml", objects.service("web"), objects.service("db"))
    folder.look()
    whole = path.read_text()
    path.write_text(whole.partition("---\n")[0])
    assert folder.source.look() == []
    path.write_text(whole + "\n")
    assert folder.look() == []


def test_a_file_that_never_rests_is_read_in_the_end(folder: Folder) -> None:
    path = folder.write("a.yaml", objects.service("web"))
    folder.look()
    for number in range(manifests.LONGEST_SETTLING_SCANS):
        path.write_text(yaml.safe_dump(objects.service("db")) + "\n" * number)
        batch = folder.source.look()
    assert {type(event) for event in batch} == {events.Upsert, events.Delete}


def test_the_links_of_a_mounted_configmap_are_followed(folder: Folder) -> None:
    def version(name: str, cluster_ip: str) -> None:
        (folder.path / name).mkdir()
        (folder.path / name / "web.yaml").write_text(yaml.safe_dump(objects.service("web", cluster_ip)))
        os.symlink(name, folder.path / "..new")
        (folder.path / "..new").rename(folder.path / "..data")

    version("..v1", "10.96.0.1")
    (folder.path / "web.yaml").symlink_to("..data/web.yaml")
    assert len(folder.look()) == 4
    version("..v2", "10.96.0.2")
    assert [type(event) for event in folder.look()] == [events.Upsert]


def test_a_link_that_leads_nowhere_and_other_files_are_passed_over(folder: Folder) -> None:
    (folder.path / "broken.yaml").symlink_to("none")
    (folder.path / "sub.yaml").mkdir()
    folder.write_text("README.md", "kind: Service")
    folder.write(".hidden.yaml", objects.service("web"))
    assert [type(event) for event in folder.look()] == [events.Synced] * 3


def test_a_link_to_itself_is_rejected_alone(folder: Folder) -> None:
    loop = folder.path / "loop.yaml"
    loop.symlink_to(loop.name)
    folder.write("z.yaml", objects.service("web"))
    batch = folder.look()
    assert rejected(batch) == [
        events.Rejected(
            events.Kind.MANIFEST, events.ObjectName("", str(loop)), "Too many levels of symbolic links"
        )
    ]
    assert events.Synced(events.Kind.SERVICE) in batch
    assert folder.names == {"default/web"}
    loop.unlink()
    folder.write("loop.yaml", objects.service("db"))
    assert [type(event) for event in folder.look()] == [events.Upsert, events.Accepted]


def test_an_object_stays_while_its_file_is_a_link_to_itself(folder: Folder) -> None:
    path = folder.write("a.yaml", objects.service("web"))
    folder.look()
    path.unlink()
    path.symlink_to(path.name)
    assert len(rejected(folder.look())) == 1
    assert folder.names == {"default/web"}


@pytest.mark.parametrize("after", ["# nothing\n", None], ids=["comment", "removed"])
def test_an_emptied_file_keeps_its_objects_until_it_says_otherwise(folder: Folder, after: str | None) -> None:
    path = folder.write("a.yaml", objects.service("web"))
    folder.look()
    whole = path.read_text()
    path.write_text("")
    (rejection,) = folder.look()
    assert isinstance(rejection, events.Rejected)
    assert rejection.name.name == str(path)
    assert rejection.reason.startswith("empty: ")
    path.write_text(whole)
    assert folder.look() == [events.Accepted(rejection.kind, rejection.name)]
    path.write_text("")
    folder.look()
    assert folder.names == {"default/web"}
    if after is None:
        path.unlink()
    else:
        path.write_text(after)
    folder.look()
    assert folder.names == set()


def test_a_file_that_never_held_anything_may_be_empty(folder: Folder) -> None:
    folder.write_text("a.yaml", "")
    assert [type(event) for event in folder.look()] == [events.Synced] * 3


def test_malformed_yaml_names_file_and_line_and_keeps_the_last_good_state(folder: Folder) -> None:
    folder.write("a.yaml", objects.service("web"), objects.service("db"))
    folder.write("b.yaml", objects.service("other"))
    folder.look()
    good = yaml.safe_dump(objects.service("web"))
    bad_line = good.count("\n") + 3
    path = folder.write_text("a.yaml", f"{good}---\nkind: Service\nmetadata: {{name: [\n")
    folder.write("b.yaml", objects.service("another"))
    (rejection,) = rejected(folder.look())
    assert rejection.kind is events.Kind.MANIFEST
    assert rejection.name.name == str(path)
    assert rejection.reason.startswith(f"line {bad_line + 1}: malformed YAML: ")
    assert "\n" not in rejection.reason
    assert folder.names == {"default/web", "default/db", "default/another"}
    folder.write("a.yaml", objects.service("web"))
    folder.look()
    assert folder.names == {"default/web", "default/another"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"kind":\n "Service",\n}', "line 3: malformed JSON"),
        ("a.json", b"[" * 100_000, "malformed JSON"),
        ("a.yaml", b"kind: Service\nmetadata: {name: \xff\xfe}\n", "line 2: malformed YAML"),
        ("a.yaml", b"a: !!python/object:os.system x\n", "line 1: malformed YAML"),
        ("a.yaml", b"\tkind: x\n", "line 1: malformed YAML"),
        ("a.yaml", b"just text\n", "line 1: a document that is not an object"),
        ("a.yaml", b"kind: Node\nmetadata: {name: n}\n---\n42\n", "line 3: a document that is not an object"),
        ("a.json", b"7", "line 1: a document that is not an object"),
        ("a.yaml", b"a: b\n---\n&a [*a]\n", "line 2: malformed YAML: nested"),
        ("a.yaml", b"kind: List\nitems: &a [{kind: List, items: *a}]\n", "line 1: malformed YAML: nested"),
        ("a.yaml", b"[" * 100_000, "line 1: malformed YAML: nested too deeply"),
        ("a.yaml", b"a: b\n---\n" + b"- " * 100_000, "line 3: malformed YAML: nested too deeply"),
        ("a.yaml", b"? " * 100_000, "line 1: malformed YAML: nested too deeply"),
        ("a.yaml", b"{a: " * 100_000, "line 1: malformed YAML: nested too deeply"),
        ("a.yaml", b"[a: " * 100_000, "line 1: malformed YAML: nested too deeply"),
        ("a.yaml", "[".encode("utf-16") * 100_000, "line 1: malformed YAML"),
        ("a.yaml", ("- " * 100_000).encode("utf-16"), "line 1: malformed YAML: nested too deeply"),
        (
            "a.yaml",
            "".join(f"{' ' * depth}a:\n" for depth in range(1000)).encode(),
            "line 401: malformed YAML: nested too deeply",
        ),
        (
            "a.yaml",
            "".join(f"{' ' * depth}a:\r{' ' * depth}-\r" for depth in range(1000)).encode(),
            "line 401: malformed YAML: nested too deeply",
        ),
        ("a.yaml", b"!!bool foo\n", "line 1: malformed YAML: a value that its tag does not allow"),
        ("a.yaml", b"a: !!int ''\n", "line 1: malformed YAML: a value that its tag does not allow"),
    ],
)
def test_what_can_not_be_read_is_said_in_one_line(
    folder: Folder, name: str, content: bytes, said: str
) -> None:
    folder.write("z.yaml", objects.service("web"))
    folder.write_text(name, content)
    (rejection,) = rejected(folder.look())
    assert rejection.kind is events.Kind.MANIFEST
    assert rejection.name.name == str(folder.path / name)
    assert said in rejection.reason
    assert "\n" not in rejection.reason
    assert "default/web" in folder.names


@pytest.mark.parametrize("opening", ["- ", "[", "{a: "])
def test_nesting_below_the_bound_is_no_harm(folder: Folder, opening: str) -> None:
    levels = documents.DEEPEST - 2
    ignored = opening * levels + "x" + {"- ": "", "[": "]", "{a: ": "}"}[opening] * levels
    text = yaml.safe_dump(objects.service("web")) + f"more:\n  {ignored}\n"
    folder.write_text("a.yaml", text)
    assert rejected(folder.look()) == []
    assert folder.names == {"default/web"}


def test_one_malformed_object_is_rejected_alone_and_its_last_good_version_stays(folder: Folder) -> None:
    folder.write("a.yaml", objects.service("web"), objects.service("db"))
    folder.look()
    folder.write("a.yaml", objects.service("db", "10.96.0.9"), objects.service("web", "nonsense"))
    batch = folder.look()
    (rejection,) = rejected(batch)
    assert str(rejection.name) == "default/web"
    assert "clusterIP" in rejection.reason
    assert "(a.yaml line" in rejection.reason
    assert len(batch) == 2
    assert folder.names == {"default/web", "default/db"}
    assert folder.source.state.rejected == 1


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_a_slice_without_a_name_and_one_of_another_version_are_rejected(folder: Folder, name: str) -> None:
    nameless = objects.endpoint_slice("x", ["10.244.0.1"])
    del nameless["metadata"]["name"]
    old = objects.endpoint_slice("old", ["10.244.0.1"]) | {"apiVersion": "discovery.k8s.io/v1beta1"}
    folder.write_text(name, json.dumps({"kind": "List", "items": [nameless, old]}))
    first, second = rejected(folder.look())
    assert "name" in first.reason
    assert "v1beta1" in second.reason


def test_what_is_not_read_is_passed_over_and_said_once(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    knative = objects.service("web") | {"apiVersion": "serving.knative.dev/v1"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}
    folder.write("a.yaml", pod, pod, knative, {"metadata": {"name": "no kind"}})
    assert [type(event) for event in folder.look()] == [events.Synced] * 3
    folder.write("b.yaml", pod, knative)
    folder.look()
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "v1 Pod is not read",
        "serving.knative.dev/v1 Service is not read",
        "what has no kind is not read",
    ]


def test_the_first_file_by_name_wins_and_the_second_is_mentioned(folder: Folder) -> None:
    folder.write("b.yaml", objects.service("web", "10.96.0.2"))
    folder.write("a.yaml", objects.service("web", "10.96.0.1"))
    folder.look()
    upsert = folder.seen.present["default/web"]
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.cluster_ips[0][-1] == 1
    assert upsert.warnings == ("ignored in b.yaml line 1: it is already in a.yaml line 1",)
    (folder.path / "a.yaml").unlink()
    folder.look()
    upsert = folder.seen.present["default/web"]
    assert isinstance(upsert.value, model.Service)
    assert upsert.value.cluster_ips[0][-1] == 2
    assert upsert.warnings == ()


def test_a_missing_namespace_means_default(folder: Folder) -> None:
    service = objects.service("web")
    del service["metadata"]["namespace"]
    folder.write("a.yaml", service)
    folder.look()
    assert folder.names == {"default/web"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([objects.service("a"), objects.service("b")]),
        json.dumps({"kind": "ServiceList", "items": [{**objects.service(n), "kind": None} for n in "ab"]}),
        json.dumps(
            {"kind": "List", "items": [{"kind": "List", "items": [objects.service(n)]} for n in "ab"]}
        ),
        "".join(json.dumps(objects.service(name)) + "\n" for name in "ab"),
    ],
    ids=["array", "typed list", "nested lists", "lines"],
)
def test_json_comes_in_many_shapes(folder: Folder, text: str) -> None:
    folder.write_text("a.json", text)
    folder.look()
    assert folder.names == {"default/a", "default/b"}


@pytest.mark.parametrize(
    "text",
    [
        f"%YAML 1.1\n---\n{yaml.safe_dump(objects.service('a'))}",
        f"\ufeff{yaml.safe_dump(objects.service('a'))}",
        f"--- # a comment\n{yaml.safe_dump(objects.service('a'))}...\n---\n# nothing\n",
        yaml.safe_dump(objects.service("a")).replace("\n", "\r\n"),
        yaml.safe_dump(objects.service("a"), default_flow_style=True),
        yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [objects.service("a")]}),
        f"{yaml.safe_dump(objects.service('a', metadata={'annotations': {'text': '0'}}))}".replace(
            "'0'", "|\n      a\n      ---\n      b"
        ),
        yaml.safe_dump(objects.service("a", metadata={"creationTimestamp": "X"})).replace(
            "X", "2026-01-01T00:00:00Z"
        ),
    ],
    ids=["directive", "mark", "comments", "CRLF", "flow", "list", "block text", "timestamp"],
)
def test_yaml_comes_in_many_shapes(folder: Folder, text: str) -> None:
    folder.write_text("a.yaml", text)
    assert rejected(folder.look()) == []
    assert folder.names == {"default/a"}


def test_an_unquoted_timestamp_is_the_text_it_is_in_the_api(folder: Folder) -> None:
    written = objects.endpoint_slice("web-1", ["10.244.0.1"])
    written["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": "X"}
    folder.write_text("a.yaml", yaml.safe_dump(written).replace(" X", " 2027-01-15T08:00:00Z"))
    assert rejected(folder.look()) == []
    value = folder.seen.present["default/web-1"].value
    assert isinstance(value, model.EndpointSlice)
    assert value.trigger_time_s == 1_800_000_000


def test_one_file_may_be_given_by_any_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cluster"
    path.write_text(yaml.safe_dump(objects.service("web")))
    seen = Recorder()
    source = manifests.Manifests(path, seen)
    seen(source.look())
    assert set(seen.present) == {"default/web"}


def test_a_file_that_comes_back_as_bad_as_it_was_is_still_rejected(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("kind: Service\n  spec: [1, 2\n")
    source = manifests.Manifests(path, lambda _batch: None)
    (bad, *_) = rejected(source.look())
    path.rename(tmp_path / "moved")
    (gone,) = source.look()
    (tmp_path / "moved").rename(path)
    assert source.look() == [events.Accepted(gone.kind, gone.name), bad]  # type: ignore[union-attr]


def test_a_path_that_goes_away_changes_nothing_until_it_is_back(folder: Folder) -> None:
    away = Folder(folder.path / "later")
    gone = (events.Kind.MANIFEST, events.ObjectName("", str(away.path)))
    reason = "No such file or directory; the last state stays in force"
    assert away.look() == [events.Rejected(*gone, reason)]
    assert away.look() == []
    assert away.source.state.last_error == reason
    away.path.mkdir()
    away.write("a.yaml", objects.service("web"))
    assert away.look()[0] == events.Accepted(*gone)
    assert away.names == {"default/web"}
    away.path.rename(folder.path / "moved")
    assert away.look() == [events.Rejected(*gone, reason)]
    (folder.path / "moved").rename(away.path)
    # Nothing in it has changed, and that it is back is told all the same.
    assert away.look() == [events.Accepted(*gone)]
    away.write("a.yaml", objects.service("db"))
    away.look()
    assert away.names == {"default/db"}


def test_in_a_file_of_10000_documents_only_the_changed_one_is_parsed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [
        yaml.dump(objects.service(f"s{n}", f"10.96.{n // 250}.{n % 250 + 1}"), Dumper=yaml.CSafeDumper)
        for n in range(10_000)
    ]
    folder.write_text("a.yaml", "---\n".join(documents))
    folder.look()
    assert len(folder.names) == 10_000
    parsed: list[bytes] = []
    load_all = yaml.load_all

    def counted(piece: bytes, **more: Any) -> Any:
        parsed.append(piece)
        return load_all(piece, **more)

    monkeypatch.setattr(yaml, "load_all", counted)
    documents[5000] = yaml.safe_dump(objects.service("s5000", "10.97.0.1"))
    folder.write_text("a.yaml", "---\n".join(documents))
    assert [str(event.name) for event in folder.look() if not isinstance(event, events.Synced)] == [
        "default/s5000"
    ]
    assert len(parsed) == 1


async def test_changes_arrive_while_it_runs(folder: Folder) -> None:
    folder.write("a.yaml", objects.service("web"))
    task = asyncio.create_task(folder.source.run())
    await eventually(lambda: folder.names == {"default/web"})
    folder.write("a.yaml", objects.service("db"))
    await eventually(lambda: folder.names == {"default/db"})
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("bad", ["nonsense", "["], ids=["object", "file"])
def test_a_problem_that_goes_is_taken_back_and_said_again_when_it_returns(folder: Folder, bad: str) -> None:
    good = yaml.safe_dump(objects.service("web"))
    folder.write_text("a.yaml", good)
    folder.look()
    for _ in range(2):
        folder.write_text("a.yaml", good.replace("10.96.0.1", bad))
        (rejection,) = folder.look()
        assert isinstance(rejection, events.Rejected)
        folder.write_text("a.yaml", good)
        assert folder.look() == [events.Accepted(rejection.kind, rejection.name)]
