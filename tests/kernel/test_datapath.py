"""The datapath on this kernel, in a bpffs and on a cgroup of its own, from one version to the next."""

import collections.abc
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import typing

import msgspec
import pytest

from lbproxy import abi, errors
from lbproxy.core import tables
from lbproxy.kernel import datapath, identity, libbpf, loader, map_rows, maps, programs
from tests import serving
from tests.kernel import conftest

SIZES = serving.SIZES
NAMES = [program.name for program in programs.SOCKET]


@pytest.fixture
def made(root: pathlib.Path, cgroup: pathlib.Path) -> collections.abc.Iterator[datapath.Datapath]:
    """A datapath that runs on `cgroup`."""
    found = datapath.Datapath(root)
    assert found.ensure(cgroup, SIZES).how == "created"
    yield found
    remove_links(found)


MOST_VERIFIED: typing.Final = 300_000
"""Instructions, each time that the verifier comes by one: a microsecond, of a start and of every upgrade."""


def test_the_verifier_is_soon_done(made: datapath.Datapath) -> None:
    verified = {}
    for path in made.programs_dir.iterdir():
        with opened(path) as fd:
            lines = pathlib.Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        values = dict(line.split(":\t") for line in lines if ":\t" in line)
        verified[path.name] = int(values["verified_insns"])
    assert verified.keys() == {program.name for program in programs.PROGRAMS}
    assert max(verified.values()) < MOST_VERIFIED, verified
    assert sum(verified.values()) < 3.2 * MOST_VERIFIED, verified


def remove_links(found: datapath.Datapath) -> None:
    """Let go of the cgroup, so that it can be removed."""
    shutil.rmtree(found.links_dir, ignore_errors=True)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> collections.abc.Iterator[int]:
    fd = libbpf.obj_get(str(path))
    try:
        yield fd
    finally:
        os.close(fd)


def links(found: datapath.Datapath) -> dict[str, libbpf.LinkInfo]:
    infos = {}
    for name in NAMES:
        with opened(found.links_dir / name) as fd:
            infos[name] = libbpf.link_info(fd)
    return infos


def pinned_programs(found: datapath.Datapath) -> dict[str, int]:
    ids = {}
    for path in found.programs_dir.iterdir():
        with opened(path) as fd:
            ids[path.name] = libbpf.prog_id(fd)
    return ids


def map_ids(found: datapath.Datapath) -> dict[str, int]:
    ids = {}
    for path in found.maps_dir.iterdir():
        with opened(path) as fd:
            ids[path.name] = libbpf.map_info(fd).id
    return ids


def assert_runs(found: datapath.Datapath, cgroup: pathlib.Path) -> None:
    """Every link holds the pinned program of its name at the cgroup, and nothing else is pinned."""
    held = links(found)
    pinned = pinned_programs(found)
    assert pinned.keys() == {program.name for program in programs.PROGRAMS}
    assert {name: info.prog_id for name, info in held.items()} == {name: pinned[name] for name in NAMES}
    assert {info.cgroup_id for info in held.values()} == {cgroup.stat().st_ino}
    assert {info.attach_type for info in held.values()} == {p.attach_type for p in programs.SOCKET}
    assert sorted(path.name for path in found.links_dir.iterdir()) == sorted(NAMES)
    assert sorted(path.name for path in found.maps_dir.iterdir()) == sorted([*abi.MAPS, abi.TAILS])
    assert found.verify(cgroup) == []


def rows_of(found: datapath.Datapath) -> dict[str, dict[bytes, bytes]]:
    with contextlib.closing(maps.BpfMaps(str(found.maps_dir))) as kernel:
        return {name: dict(kernel.rows(name)) for name in abi.MAPS}


def fill(found: datapath.Datapath) -> dict[str, dict[bytes, bytes]]:
    """Two rows in every map; a socket record's row goes by its cookie."""
    written: dict[str, dict[bytes, bytes]] = {}
    for name, spec in abi.MAPS.items():
        numbers = (0,) if abi.map_rows(spec, SIZES) == 1 else (2, 3)
        written[name] = {}
        for number in numbers:
            row = bytes([number + 1]) * spec.value_size
            if name == "sockets":
                row = number.to_bytes(8, "little") + row[8:]
            elif name == "socket_spill":
                row = abi.LAYOUTS["socket_record"].pack(
                    number, bytes(16), bytes(16), bytes(2), bytes(2), 1, 1
                )
            written[name][number.to_bytes(spec.key_size, "little")] = row
    for name, rows in written.items():
        with opened(found.maps_dir / name) as fd:
            for key, row in rows.items():
                map_rows.update(fd, key, row)
    return written


def never(*_: typing.Any) -> None:
    raise AssertionError("it was compiled again")


# --- nothing to do ---


def test_a_datapath_that_fits_is_adopted_as_it_stands(
    made: datapath.Datapath, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_runs(made, cgroup)
    before = (map_ids(made), pinned_programs(made), links(made), fill(made))
    monkeypatch.setattr(loader, "compile_and_pin", never)
    outcome = datapath.Datapath(made.root).ensure(cgroup, SIZES)
    assert (outcome.how, outcome.notes) == ("adopted", ())
    assert outcome.identity == identity.read(made.root)
    assert (map_ids(made), pinned_programs(made), links(made), rows_of(made)) == before


def test_a_hook_that_was_taken_away_is_put_back(
    made: datapath.Datapath, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lost in (NAMES[:1], NAMES[-2:], NAMES):
        for name in lost:
            (made.links_dir / name).unlink()
        assert made.verify(cgroup) == lost
        assert_runs(made, cgroup)

    # At start, too, and without compiling.
    (made.links_dir / "connect4").unlink()
    monkeypatch.setattr(loader, "compile_and_pin", never)
    assert made.ensure(cgroup, SIZES).how == "relinked"
    assert_runs(made, cgroup)


def test_another_cgroup_takes_the_links_with_it(
    made: datapath.Datapath, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "compile_and_pin", never)
    with conftest.child_cgroup() as other:
        outcome = made.ensure(other, SIZES)
        assert (outcome.how, outcome.identity.cgroup) == ("relinked", str(other))
        assert_runs(made, other)
        assert made.ensure(cgroup, SIZES).how == "relinked"
        assert_runs(made, cgroup)


# --- from one version to the next ---


def test_contents_are_carried_into_maps_of_other_sizes(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    written = fill(made)
    before, held = map_ids(made), links(made)
    larger = {name: 2 * rows for name, rows in SIZES.items()}
    outcome = made.ensure(cgroup, larger)
    assert outcome.how == "replaced"
    assert outcome.identity.sizes == larger
    assert_runs(made, cgroup)

    found = rows_of(made)
    spilled = abi.LAYOUTS["socket_record"].offset("spilled")
    for name, rows in written.items():
        if name == "sockets":
            records = {key: row[:spilled] for key, row in found[name].items() if any(row[:8])}
            assert records == {key: row[:spilled] for key, row in rows.items()}
        elif name == "handover":
            # But for what those were told in between who moved the flows.
            told = tables.row_key(abi.constant("HANDOVER_MOVING"))
            assert {**found[name], told: b""} == {**rows, told: b""}
        elif name != "socket_spill":
            assert found[name] == rows, name
    assert found["socket_spill"].items() >= written["socket_spill"].items()
    same = {name for name, number in map_ids(made).items() if before[name] == number}
    assert same == {
        "settings", "counters", "unassured", "ticks", "scratch", "handover", "no_flows", "no_frontends"
    }  # fmt: skip
    # The links are the same ones: there was no moment without a program.
    after = links(made)
    assert {name: info.id for name, info in after.items()} == {name: info.id for name, info in held.items()}
    assert all(after[name].prog_id != held[name].prog_id for name in NAMES)
    assert made.ensure(cgroup, larger).how == "adopted"


def test_tables_grow_beside_those_that_stay(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    written = fill(made)
    before, held = map_ids(made), links(made)
    with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
        old = kernel.rows("backends")
        first = next(old)
        larger = {"frontends": 2 * SIZES["frontends"], "backends": 4 * SIZES["backends"]}
        prepared = made.prepare(larger)
        # Nothing is any different yet.
        assert (map_ids(made), links(made)) == (before, held)
        assert_runs(made, cgroup)
        found = made.take_over(prepared, cgroup)
        assert made.sizes == found.sizes == {**SIZES, **larger}
        kernel.reopen()
        assert kernel.rows_of("backends") == larger["backends"]
        # Whoever was reading reads on.
        assert dict([first, *old]) == dict(kernel.rows("backends")) == written["backends"]
    assert_runs(made, cgroup)
    assert {name: rows for name, rows in rows_of(made).items() if name in written} == written
    other = {name for name, number in map_ids(made).items() if before[name] != number}
    grown = {
        spec.name for spec in abi.MAPS.values() if spec.rows in ("LB_ROWS_FRONTENDS", "LB_ROWS_BACKENDS")
    }
    assert other == {*grown, abi.TAILS} > {"frontends", "backends", "backend_stats", abi.TAILS}
    assert made.verify(cgroup) == []
    # A start with the sizes of the configuration takes what has grown as it is.
    assert datapath.Datapath(made.root).ensure(cgroup, SIZES).how == "adopted"
    assert made.sizes == found.sizes


def test_what_can_not_grow_serves_on(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    before, held = map_ids(made), links(made)
    with pytest.raises(errors.AgentError, match="cannot make larger tables"):
        made.prepare({"slots": 0xFFFFFFFF})
    assert (map_ids(made), links(made)) == (before, held)
    assert [path.name for path in (made.root / "generations").iterdir()] == [
        (made.root / "current").resolve().name
    ]
    assert made.verify(cgroup) == []


def test_one_that_was_prepared_and_never_used_is_removed(
    made: datapath.Datapath, cgroup: pathlib.Path
) -> None:
    for factor in (2, 4):
        made.prepare({"slots": factor * SIZES["slots"]})
    assert len(list((made.root / "generations").iterdir())) == 2
    assert datapath.Datapath(made.root).ensure(cgroup, SIZES).how == "adopted"
    assert len(list((made.root / "generations").iterdir())) == 1


def test_a_table_in_use_is_not_made_smaller(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    written = fill(made)
    outcome = made.ensure(cgroup, {name: rows // 2 for name, rows in SIZES.items()})
    kept = {"slots", "backends", "services", "localities", "frontends", "node_addresses"}
    kept |= {"flows", "devices", "source_ranges", "netns_addresses", "earlier_slots", "tunnel_ends"}
    kept.add("backend_health")
    assert set(outcome.larger) == {f"{name} {SIZES[name]}" for name in kept}
    assert outcome.notes == ()
    assert {name: outcome.identity.sizes[name] for name in kept} == {name: SIZES[name] for name in kept}
    assert outcome.identity.sizes["affinity"] == SIZES["affinity"] // 2
    assert rows_of(made)["frontends"] == written["frontends"]
    assert_runs(made, cgroup)


def older_layout(
    found: datapath.Datapath, map_name: str, struct: str, fields: typing.Sequence[tuple[str, int]]
) -> int:
    """Make it look as if an earlier version with this struct had made a map; returns the map's descriptor."""
    before = identity.read(found.root)
    assert before is not None
    at, older = 0, []
    for name, size in fields:
        older.append(identity.FieldOf(name, at, size))
        at += size
    spec = abi.MAPS[map_name]
    fd = libbpf.map_create(
        spec.type, map_name, spec.key_size, at, abi.map_rows(spec, before.sizes), spec.flags
    )
    (found.maps_dir / map_name).unlink()
    libbpf.obj_pin(fd, str(found.maps_dir / map_name))
    changed = msgspec.structs.replace(
        before, fingerprint="older", structs=before.structs | {struct: tuple(older)}
    )
    identity.write(found.root, changed)
    return fd


def test_rows_of_an_older_layout_are_translated(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    fill(made)
    fields = [("service", 4), ("backend_then", 8), ("slot_count", 4), ("block", 4), ("sets", 1), ("kind", 1)]
    fields.append(("pad", 2))
    fd = older_layout(made, "frontends", "frontend", fields)
    key = tables.FrontendKey(bytes(range(16)), b"\x00\x50", 6, 0).pack()
    words = [number.to_bytes(4, "little") for number in (9, 1, 1, 3, 4)]
    map_rows.update(fd, key, b"".join(words) + b"\x01\x02\x00\x00")
    os.close(fd)

    assert made.ensure(cgroup, SIZES).how == "replaced"
    [row] = rows_of(made)["frontends"].values()
    assert tables.frontend(row) == tables.Frontend(
        service=9, block=4, slot_count=3, affinity_s=0, flags=0, sets=1, kind=2
    )
    assert_runs(made, cgroup)
    assert made.ensure(cgroup, SIZES).how == "adopted"


def test_an_upgrade_adds_the_hook_and_the_map_that_an_earlier_version_lacked(
    made: datapath.Datapath, cgroup: pathlib.Path
) -> None:
    written = fill(made)
    before = identity.read(made.root)
    assert before is not None
    for pin in (
        made.links_dir / "sock_health",
        made.programs_dir / "sock_health",
        made.maps_dir / "backend_health",
    ):
        pin.unlink()
    structs = {name: fields for name, fields in before.structs.items() if name != "backend_health"}
    identity.write(
        made.root, msgspec.structs.replace(before, fingerprint="older", abi_version=3, structs=structs)
    )
    assert made.ensure(cgroup, SIZES).how == "replaced"
    assert_runs(made, cgroup)
    rows = rows_of(made)
    assert rows["backends"] == written["backends"]
    assert rows["backend_health"] == {}


def test_rows_of_another_meaning_are_copied_even_if_they_look_alike(
    made: datapath.Datapath, cgroup: pathlib.Path
) -> None:
    written = fill(made)
    before = identity.read(made.root)
    assert before is not None
    identity.write(made.root, msgspec.structs.replace(before, fingerprint="older", abi_version=0))
    ids = map_ids(made)
    assert made.ensure(cgroup, SIZES).how == "replaced"
    assert not ids.items() & map_ids(made).items()
    assert rows_of(made)["backends"] == written["backends"]
    assert_runs(made, cgroup)


def test_what_was_said_not_to_be_there_is_not_carried_into_another_numbering(
    made: datapath.Datapath, cgroup: pathlib.Path
) -> None:
    """As from ABI 4, which had fewer bits, and of other addresses: until all is said anew, nothing is."""
    written = fill(made)
    before = identity.read(made.root)
    assert before is not None
    name, spec = "no_frontends", abi.MAPS["no_frontends"]
    (made.maps_dir / name).unlink()
    fd = libbpf.map_create(spec.type, name, spec.key_size, spec.value_size, 3072, spec.flags)
    libbpf.obj_pin(fd, str(made.maps_dir / name))
    os.close(fd)
    with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
        for table in (name, "no_flows"):
            kernel.set_column(table, "none", b"\xff" * 8 * kernel.rows_of(table))
    identity.write(made.root, msgspec.structs.replace(before, fingerprint="older", abi_version=4))

    assert made.ensure(cgroup, SIZES).how == "replaced"
    assert_runs(made, cgroup)
    with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
        assert kernel.column(name, "none") == bytes(8 * abi.constant("NO_FRONTENDS_ROWS"))
        assert not any(kernel.column("no_flows", "none"))
    rows = rows_of(made)
    assert (rows["frontends"], rows["backends"]) == (written["frontends"], written["backends"])


def test_an_identity_that_can_not_be_read_starts_afresh(
    made: datapath.Datapath, cgroup: pathlib.Path
) -> None:
    fill(made)
    with opened(made.root / identity.PIN) as fd:
        size = libbpf.map_info(fd).value_size
        map_rows.update(fd, bytes(4), b'{"fingerprint": 7}'.ljust(size, b"\0"))
    assert identity.read(made.root) is None
    assert made.ensure(cgroup, SIZES).how == "created"
    assert not rows_of(made)["frontends"]
    assert_runs(made, cgroup)


def leave_behind(made: datapath.Datapath) -> None:
    """Pin what an upgrade that was interrupted, or another version, would have pinned."""
    fd = libbpf.map_create("array", "left", 4, 4, 1, 0)
    for path in (made.maps_dir / "new_slots", made.maps_dir / "of_an_older_version"):
        libbpf.obj_pin(fd, str(path))
    os.close(fd)
    with opened(made.links_dir / "connect4") as link:
        libbpf.obj_pin(link, str(made.links_dir / "of_an_older_version"))
        libbpf.obj_pin(link, str(made.links_dir / "new_connect4"))
    (made.programs_dir / "deadbeef").mkdir()


def test_what_an_interrupted_upgrade_left_is_removed(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    for sizes, how in ((SIZES, "adopted"), (serving.sizes(affinity=128), "replaced")):
        leave_behind(made)
        assert made.ensure(cgroup, sizes).how == how
        assert_runs(made, cgroup)


def test_a_program_that_was_unpinned_is_made_again(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    written = fill(made)
    (made.programs_dir / "connect6").unlink()
    assert made.ensure(cgroup, SIZES).how == "replaced"
    assert rows_of(made) == written
    assert_runs(made, cgroup)


def test_a_version_that_does_not_load_leaves_the_one_that_runs(
    made: datapath.Datapath, cgroup: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = fill(made)
    held = links(made)
    folder = tmp_path / "sources"
    shutil.copytree(abi.source_dir(), folder)
    (folder / "select.h").write_text("#error not today\n")
    with monkeypatch.context() as patched:
        patched.setattr(abi, "source_dir", lambda: folder)
        with pytest.raises(errors.AgentError, match=r"bpf/select\.h:1:.*not today"):
            made.ensure(cgroup, serving.sizes(slots=2 * SIZES["slots"]))
    assert links(made) == held
    assert made.ensure(cgroup, SIZES).how == "adopted"
    assert rows_of(made) == written
    assert_runs(made, cgroup)


def test_what_the_kernel_refuses_is_told_in_a_sentence(root: pathlib.Path, cgroup: pathlib.Path) -> None:
    found = datapath.Datapath(root)
    with pytest.raises(
        errors.AgentError, match=r"cannot set up the datapath in .*map slots with 4294967295 rows"
    ):
        found.ensure(cgroup, serving.sizes(slots=0xFFFFFFFF))


# --- under traffic ---

# Joins a cgroup and connects until it is told to stop; prints how often, and what went wrong.
CLIENT = """
import json, os, pathlib, select, socket, sys
group, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
pathlib.Path(group, "cgroup.procs").write_text(str(os.getpid()))
connected, failed, odd = 0, [], []
def still(clients):
    return [client for client in clients if client.getpeername() != (host, port)]
while not select.select([sys.stdin], [], [], 0)[0]:
    odd = still(odd)
    try:
        client = socket.create_connection((host, port), timeout=5)
    except OSError as error:
        failed.append(f"{error!r}, {len(odd)} odd after {connected} connections")
        continue
    # Closed with a reset, so that it does not use up the ports.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    odd += still([client])
    connected += 1
    if connected == 1:
        print("connected", flush=True)
print(json.dumps([connected, failed, [client.getpeername() for client in still(odd)]]))
"""
SERVICE = "192.0.2.9"


def test_an_upgrade_under_load_fails_no_connection(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    """While the maps are exchanged a socket may be told its backend's address; not for good."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        threading.Thread(target=accept_all, args=(server,), daemon=True).start()
        host, port = server.getsockname()
        serve(made, tables.FrontendKey(mapped(SERVICE), b"\x00\x50", 6, 0), mapped(host), port)
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(cgroup), SERVICE, "80"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with client:
            assert client.stdout is not None
            assert client.stdout.readline() == "connected\n"
            for factor in (2, 4):
                outcome = made.ensure(cgroup, {name: factor * rows for name, rows in SIZES.items()})
                assert outcome.how == "replaced"
            said, _ = client.communicate()
        server.shutdown(socket.SHUT_RDWR)
    connected, failed, odd = json.loads(said)
    assert connected > 100
    assert (failed, odd) == ([], [])
    assert_runs(made, cgroup)


def accept_all(server: socket.socket) -> None:
    """Accept, and wait for nobody: a client that stays must not fill the backlog with the others."""
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return
        client.close()


def mapped(text: str) -> bytes:
    return bytes(10) + b"\xff\xff" + socket.inet_aton(text)


def serve(found: datapath.Datapath, frontend: tables.FrontendKey, address: bytes, port: int) -> None:
    backend = tables.Backend(address, port.to_bytes(2, "big"), 6, tables.BackendState.ACTIVE, 1, 0, 1, 1)
    row = tables.Frontend(1, 1, 1, 0, 0, 1, tables.FrontendKind.CLUSTER_IP)
    slots = tables.row_key(1).ljust(tables.BLOCK_SIZE, b"\0")
    with contextlib.closing(maps.BpfMaps(str(found.maps_dir))) as kernel:
        kernel.apply(
            [
                tables.Put(tables.Table.BACKENDS, tables.row_key(1), backend.pack()),
                tables.Put(tables.Table.SLOTS, tables.row_key(1), slots),
                tables.Put(tables.Table.FRONTENDS, frontend.pack(), row.pack()),
            ]
        )
