"""An upgrade that is killed after any of its steps: the next start makes good, whatever it wants."""

import collections.abc
import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import traceback
import typing

import msgspec
import pytest

from lbproxy import abi
from lbproxy.core import tables
from lbproxy.kernel import (
    carry,
    datapath,
    generation,
    identity,
    inspection,
    libbpf,
    loader,
    map_rows,
    maps,
    programs,
    source,
)
from tests import polling, serving
from tests.kernel import conftest, small_programs, test_datapath

NAMES = sorted(program.name for program in programs.SOCKET)
PROGRAMS = sorted(program.name for program in programs.PROGRAMS)
OLD = serving.sizes(socket_spill=1024)
NEW = serving.sizes(socket_spill=1024, sockets=128, frontends=512, affinity=128)
THIRD = serving.sizes(socket_spill=2048, sockets=32, frontends=512)
EARLY = range(1, 91)  # the cookies of sockets that are there before the upgrade
KILLED = 9

# Whatever changes something that outlives the process.
STEPS: typing.Final[tuple[tuple[typing.Any, str], ...]] = (
    *((os, name) for name in ("mkdir", "rename", "symlink", "unlink", "rmdir")),
    *((libbpf, name) for name in ("obj_pin", "link_create", "link_update")),
    *((map_rows, name) for name in ("update", "update_batch", "insert_all")),
    (loader, "compile_and_pin"),
)


# What differs from its neighbours in nothing but a name.
ALIKE: typing.Final = tuple(
    f"{call} {folder}" for call in ("obj_pin", "unlink") for folder in ("maps", "programs")
)
SHARES = 3


def kind_of(name: str, args: typing.Sequence[typing.Any], dir_fd: int | None = None) -> str:
    """A call, and the name of the folder in which it makes or removes something."""
    paths = [arg for arg in args if isinstance(arg, (str, os.PathLike))]
    if not paths:
        return name
    folder = os.path.dirname(paths[-1]) if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return f"{name} {os.path.basename(folder)}"


def to_end_at(kinds: typing.Sequence[str], share: int = 0) -> list[int]:
    """The steps at which to end the process; all of them, but for those inside a row of ALIKE.

    Of these it is one in SHARES: others for each `share`, all of them in all shares.
    """
    chosen = []
    for number, kind in enumerate(kinds):
        inside = kind in ALIKE and kinds[number - 1 : number + 2] == [kind] * 3
        if not inside or number % SHARES == share:
            chosen.append(number)
    return chosen


class Steps:
    """Counts steps; sockets come and go before each, and before the last the process ends."""

    def __init__(
        self, traffic: small_programs.Traffic | None, last: int | None, first_cookie: int = 1000
    ) -> None:
        self.traffic = traffic
        self.last = last
        self.first_cookie = first_cookie
        self.seen = 0
        self.kinds: list[str] = []

    def step(self) -> None:
        if self.seen == self.last:
            os._exit(KILLED)
        self.happen(self.seen)
        self.seen += 1

    def happen(self, number: int) -> None:
        if self.traffic is None:
            return
        self.traffic.connect(self.first_cookie + number)
        for cookie in self.gone(number):
            self.traffic.release(cookie)

    def gone(self, number: int) -> list[int]:
        """Who is released at a step: one that is new, and in the first run one that was there before."""
        gone = [self.first_cookie + number - 3] if number % 2 and number >= 3 else []
        return [*gone, 1 + number] if self.first_cookie == 1000 and 1 + number in EARLY[::2] else gone

    def live(self, before: set[int], steps: int) -> set[int]:
        """Who is there after so many steps."""
        live = set(before)
        for number in range(steps):
            live.add(self.first_cookie + number)
            live -= set(self.gone(number))
        return live

    @contextlib.contextmanager
    def counted(self) -> collections.abc.Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in STEPS:
                patch.setattr(module, name, self._wrapped(getattr(module, name)))
            yield

    def _wrapped(self, call: collections.abc.Callable[..., typing.Any]) -> typing.Any:
        def wrapped(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            self.kinds.append(kind_of(call.__name__, args, kwargs.get("dir_fd")))
            self.step()
            return call(*args, **kwargs)

        return wrapped


def killed(action: collections.abc.Callable[[], object]) -> bool:
    """Do something in a child; whether it was killed at its step. AssertionError if it failed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs.stand_in(monkeypatch)


@pytest.fixture
def folder(root: pathlib.Path, cgroup: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    yield root
    shutil.rmtree(root / "links", ignore_errors=True)


def begin_anew(root: pathlib.Path) -> None:
    for path in root.iterdir():
        if not path.name.endswith(".debug"):
            generation.remove(path)


TABLES = [name for name in abi.MAPS if name not in ("sockets", "socket_spill")]


def fill(found: datapath.Datapath) -> dict[str, dict[bytes, bytes]]:
    written: dict[str, dict[bytes, bytes]] = {}
    for name in TABLES:
        spec = abi.MAPS[name]
        written[name] = {bytes(spec.key_size): bytes([7]) * spec.value_size}
        with generation.opened(found.maps_dir / name) as fd:
            for key, row in written[name].items():
                map_rows.update(fd, key, row)
    return written


def assert_serves(root: pathlib.Path, cgroup: pathlib.Path, sizes: typing.Mapping[str, int]) -> None:
    """One generation is pinned, of these sizes; every hook runs its programs, and these use its maps."""
    shown = generation.Generation(root)
    assert shown.is_whole()
    current = shown.identity()
    assert current is not None
    assert current.sizes == sizes
    assert current.cgroup == str(cgroup)
    assert [hook.problem for hook in inspection.hooks(root, current)] == [""] * len(NAMES)
    pinned = set(shown.map_ids().values())
    rows = pinned - {shown.map_ids()[abi.TAILS]}  # which no stand-in mentions
    assert all(info.map_ids == rows for info in shown.programs().values())
    [only] = (root / "generations").iterdir()
    assert os.readlink(root / "current") == f"generations/{only.name}"
    assert {path.name for path in only.iterdir()} == {"maps", "programs", "identity"}
    assert sorted(path.name for path in (root / "links").iterdir()) == NAMES
    assert sorted(path.name for path in (root / "maps").iterdir()) == sorted([*abi.MAPS, abi.TAILS])
    assert sorted(path.name for path in (root / "programs").iterdir()) == PROGRAMS
    names = {path.name for path in root.iterdir() if not path.name.endswith(".debug")}
    assert names == set(datapath.NAMES)


def in_use(
    root: pathlib.Path, cgroup: pathlib.Path
) -> tuple[dict[str, dict[bytes, bytes]], small_programs.Traffic]:
    """Make a datapath with rows in every table, which are returned, and sockets that come and go."""
    begin_anew(root)
    made = datapath.Datapath(root)
    made.ensure(cgroup, OLD)
    written = fill(made)
    traffic = small_programs.Traffic(root / "links")
    for cookie in EARLY:
        traffic.connect(cookie)
    return written, traffic


def interrupted(root: pathlib.Path, cgroup: pathlib.Path, last: int, then: dict[str, int]) -> None:
    """Kill an upgrade at a step and start again."""
    written, traffic = in_use(root, cgroup)
    first = Steps(traffic, last)
    with first.counted():
        assert killed(lambda: datapath.Datapath(root).ensure(cgroup, NEW))
    live = first.live(set(EARLY), last)

    # Some time goes by, in which each hook runs what it was left with.
    for cookie in (500, 501, 502):
        traffic.connect(cookie)
    traffic.release(501)
    traffic.release(EARLY[-2])
    live = live - {EARLY[-2]} | {500, 502}

    second = Steps(traffic, None, first_cookie=2000)
    next_ = datapath.Datapath(root)
    with second.counted():
        outcome = next_.ensure(cgroup, then)
    live = second.live(live, second.seen)

    # A table in use is not made smaller.
    assert_serves(root, cgroup, then | {"frontends": outcome.identity.sizes["frontends"]})
    assert next_.verify(cgroup) == []
    assert {cookie for cookie in live if not traffic.shows(cookie)} == set()
    assert traffic.owners() <= live
    with contextlib.closing(maps.BpfMaps(str(next_.maps_dir))) as kernel:
        assert {name: dict(kernel.rows(name)) for name in TABLES} == written
    assert datapath.Datapath(root).ensure(cgroup, then).how == "adopted"


@pytest.mark.parametrize(("share", "then"), list(enumerate([NEW, OLD, THIRD])), ids=["same", "old", "third"])
def test_an_upgrade_that_was_killed_at_any_step_is_made_good(
    folder: pathlib.Path, cgroup: pathlib.Path, share: int, then: dict[str, int]
) -> None:
    _, traffic = in_use(folder, cgroup)
    whole = Steps(traffic, None)
    with whole.counted():
        datapath.Datapath(folder).ensure(cgroup, NEW)
    assert whole.seen > 60
    for last in to_end_at(whole.kinds, share):
        interrupted(folder, cgroup, last, then)


def test_every_kind_of_step_is_one_to_end_at() -> None:
    kinds = ["mkdir 2", *["obj_pin maps"] * 9, "obj_pin links", "rename links", *["link_update"] * 4]
    shares = [to_end_at(kinds, share) for share in range(SHARES)]
    assert shares[0] == [0, 1, 3, 6, *range(9, 16)]
    assert set().union(*shares) == set(range(len(kinds)))
    # No step of these but is tried: the links and the pointer are what serves.
    for one in shares:
        assert {0, 1, 9, *range(10, 16)} <= set(one)


def each_step(
    prepare: collections.abc.Callable[[], None], action: collections.abc.Callable[[], object], least: int
) -> collections.abc.Iterator[int]:
    """Kill an action at one step after another, with everything prepared anew; yields 0, 1, 2...

    It must have more than `least` steps.
    """
    prepare()
    whole = Steps(None, None)
    with whole.counted():
        action()
    assert whole.seen > least
    for number, last in enumerate(to_end_at(whole.kinds)):
        prepare()
        with Steps(None, last).counted():
            assert killed(action)
        yield number


def test_a_first_start_that_was_killed_at_any_step_is_made_good(
    folder: pathlib.Path, cgroup: pathlib.Path
) -> None:
    for number in each_step(
        lambda: begin_anew(folder), lambda: datapath.Datapath(folder).ensure(cgroup, OLD), least=40
    ):
        wanted = (OLD, NEW)[number % 2]
        datapath.Datapath(folder).ensure(cgroup, wanted)
        assert_serves(folder, cgroup, wanted)


def test_flows_that_were_being_moved_arrive_whenever_that_was_killed(
    folder: pathlib.Path, cgroup: pathlib.Path
) -> None:
    spec, larger = abi.MAPS["flows"], {**OLD, "flows": 2 * OLD["flows"]}
    rows = {number.to_bytes(spec.key_size, "big"): bytes([number]) * spec.value_size for number in range(50)}

    def prepare() -> None:
        begin_anew(folder)
        made = datapath.Datapath(folder)
        made.ensure(cgroup, OLD)
        with generation.opened(made.maps_dir / "flows") as fd:
            for key, row in rows.items():
                map_rows.update(fd, key, row)

    def move() -> None:
        assert datapath.Datapath(folder).ensure(cgroup, larger).how == "replaced"

    sizes = set()
    for number in each_step(prepare, move, least=100):
        wanted = (larger, OLD, {**OLD, "flows": 4 * OLD["flows"]})[number % 3]
        made = datapath.Datapath(folder)
        found = made.ensure(cgroup, wanted).identity.sizes
        assert_serves(folder, cgroup, wanted | {"flows": found["flows"]})
        with generation.opened(made.maps_dir / "flows") as fd:
            assert dict(map_rows.dump(fd, libbpf.map_info(fd))) == rows
        sizes.add(found["flows"])
    # Before a program of the new ones ran, it was as if nothing had been begun.
    assert sizes == {OLD["flows"], larger["flows"], 4 * OLD["flows"]}


def test_a_move_to_another_cgroup_that_was_killed_at_any_step_is_made_good(
    folder: pathlib.Path, cgroup: pathlib.Path
) -> None:
    def prepare() -> None:
        begin_anew(folder)
        datapath.Datapath(folder).ensure(cgroup, OLD)

    with conftest.child_cgroup() as other:
        for sizes in (OLD, NEW):

            def move(sizes: dict[str, int] = sizes) -> None:
                datapath.Datapath(folder).ensure(other, sizes)

            for number in each_step(prepare, move, least=20):
                chosen, wanted = ((cgroup, OLD), (other, NEW), (other, OLD))[number % 3]
                found = datapath.Datapath(folder).ensure(chosen, wanted).identity
                assert_serves(folder, chosen, wanted | {"frontends": found.sizes["frontends"]})
        shutil.rmtree(folder / "links")


def test_rows_of_an_older_layout_are_translated_once_whenever_the_upgrade_was_killed(
    folder: pathlib.Path, cgroup: pathlib.Path
) -> None:
    """Fields and their order have changed, but not the size: what is translated twice looks in order."""
    spec, layout = abi.MAPS["frontends"], abi.LAYOUTS["frontend"]
    turned = [field for field in reversed(layout.fields) if field.size == 4]
    others = [field for field in layout.fields if field.size != 4]
    older, at = [], 0
    for field in (*others, *turned):
        older.append(identity.FieldOf(field.name, at, field.size))
        at += field.size
    values = {field.name: bytes([number + 1]) * field.size for number, field in enumerate(layout.fields)}
    key, row = bytes(range(spec.key_size)), b"".join(values[field.name] for field in older)
    expected = b"".join(values[field.name] for field in layout.fields)
    assert row != expected

    of_this_version = identity.of_this_version

    def older_identity(_: str, group: str, sizes: typing.Mapping[str, int]) -> identity.Identity:
        now = of_this_version("older", group, sizes)
        return msgspec.structs.replace(now, structs=now.structs | {"frontend": tuple(older)})

    @contextlib.contextmanager
    def older_version() -> collections.abc.Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(identity, "of_this_version", older_identity)
            patch.setattr(source, "fingerprint", lambda *_: "older")
            yield

    def prepare() -> None:
        begin_anew(folder)
        with older_version():
            datapath.Datapath(folder).ensure(cgroup, OLD)
        with generation.opened(folder / "maps" / "frontends") as fd:
            map_rows.update(fd, key, row)

    for number in each_step(prepare, lambda: datapath.Datapath(folder).ensure(cgroup, OLD), least=50):
        back = number % 2 == 1
        with older_version() if back else contextlib.nullcontext():
            datapath.Datapath(folder).ensure(cgroup, OLD)
            assert_serves(folder, cgroup, OLD)
        with generation.opened(folder / "maps" / "frontends") as fd:
            assert map_rows.lookup(fd, key, spec.value_size) == (row if back else expected)


def test_bits_of_another_numbering_are_never_read_whenever_the_upgrade_was_killed(
    folder: pathlib.Path, cgroup: pathlib.Path
) -> None:
    """ABI 4 had fewer bits, of other addresses: as it is, its table would deny services."""
    spec, of_this_version = abi.MAPS["no_frontends"], identity.of_this_version
    frontend = {bytes(range(abi.MAPS["frontends"].key_size)): bytes([7]) * abi.MAPS["frontends"].value_size}

    def identity_of_abi_4(_: str, group: str, sizes: typing.Mapping[str, int]) -> identity.Identity:
        return msgspec.structs.replace(of_this_version("abi 4", group, sizes), abi_version=4)

    @contextlib.contextmanager
    def abi_4() -> collections.abc.Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(abi.MAPS, spec.name, spec._replace(rows="3072"))
            patch.setattr(identity, "of_this_version", identity_of_abi_4)
            patch.setattr(source, "fingerprint", lambda *_: "abi 4")
            yield

    def said(made: datapath.Datapath) -> dict[str, bytes]:
        with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
            assert dict(kernel.rows("frontends")) == frontend
            return {name: kernel.column(name, "none") for name in ("no_frontends", "no_flows")}

    def prepare() -> None:
        begin_anew(folder)
        with abi_4():
            datapath.Datapath(folder).ensure(cgroup, OLD)
        with contextlib.closing(maps.BpfMaps(str(folder / "maps"))) as kernel:
            kernel.apply([tables.Put(tables.Table.FRONTENDS, *row) for row in frontend.items()])
            for name in ("no_frontends", "no_flows"):
                kernel.set_column(name, "none", b"\xff" * 8 * kernel.rows_of(name))

    nothing = {
        rows: {"no_frontends": bytes(8 * rows), "no_flows": bytes(8 * abi.constant("NO_FLOWS_ROWS"))}
        for rows in (3072, abi.map_rows(spec, OLD))
    }
    found = []
    for number in each_step(prepare, lambda: datapath.Datapath(folder).ensure(cgroup, OLD), least=50):
        back = number % 2 == 1
        made = datapath.Datapath(folder)
        with abi_4() if back else contextlib.nullcontext():
            made.ensure(cgroup, OLD)
            assert_serves(folder, cgroup, OLD)
        found.append(said(made))
        if not back:
            assert found[-1] == nothing[abi.map_rows(spec, OLD)]
    # Where no program of the new version ran yet, the earlier one goes on with what it has said itself.
    of_abi_4 = [one for one in found[1::2] if one != nothing[3072]]
    assert 0 < len(of_abi_4) < len(found[1::2])
    assert all(set(bits) == {0xFF} for one in of_abi_4 for bits in one.values())
    assert {len(one["no_frontends"]) for one in of_abi_4} == {8 * 3072}


# --- the real programs ---

# Joins a cgroup, connects as often as it is told, and tells how many sockets are shown the service.
CLIENT = """
import os, pathlib, socket, sys
group, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
pathlib.Path(group, "cgroup.procs").write_text(str(os.getpid()))
clients = []
for line in sys.stdin:
    clients += [socket.create_connection((host, port), timeout=5) for _ in range(int(line))]
    print(sum(client.getpeername() == (host, port) for client in clients), flush=True)
"""


@contextlib.contextmanager
def client(cgroup: pathlib.Path) -> collections.abc.Iterator[collections.abc.Callable[[int], int]]:
    """A function that opens so many more sockets and returns how many of all are shown the service."""
    running = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CLIENT, str(cgroup), test_datapath.SERVICE, "80"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdin is not None
    assert running.stdout is not None

    def opened(more: int) -> int:
        assert running.stdin is not None
        assert running.stdout is not None
        print(more, file=running.stdin, flush=True)
        return int(running.stdout.readline())

    with running:
        yield opened


@pytest.mark.parametrize("then", [NEW, OLD, THIRD], ids=["same", "old", "third"])
def test_real_sockets_come_and_go_while_an_upgrade_lies_interrupted(
    folder: pathlib.Path,
    cgroup: pathlib.Path,
    then: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    made = datapath.Datapath(folder)
    made.ensure(cgroup, OLD)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        threading.Thread(target=test_datapath.accept_all, args=(server,), daemon=True).start()
        host, port = server.getsockname()
        address = test_datapath.mapped(host)
        frontend = tables.FrontendKey(test_datapath.mapped(test_datapath.SERVICE), b"\x00\x50", 6, 0)
        test_datapath.serve(made, frontend, address, port)
        with client(cgroup) as late:
            with client(cgroup) as early:
                assert (early(50), late(50)) == (50, 50)
                with pytest.MonkeyPatch.context() as patch:
                    # The hooks are switched, and nothing more is done.
                    patch.setattr(carry.Transfer, "end", lambda _: os._exit(KILLED))
                    assert killed(lambda: datapath.Datapath(folder).ensure(cgroup, NEW))
                assert (early(20), late(100)) == (70, 150)
            assert datapath.Datapath(folder).ensure(cgroup, then).how == "replaced"
            assert late(10) == 160
        server.shutdown(socket.SHUT_RDWR)
    traffic = small_programs.Traffic(folder / "links")
    polling.eventually(lambda: not traffic.owners(), what="rows given back")
