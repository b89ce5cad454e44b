"""A kernel that refuses the programs of the packet path: sockets are served all the same."""

import asyncio
import collections.abc
import contextlib
import errno
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from lbproxy import errors, packet_path
from lbproxy.commands import status
from lbproxy.core import tables
from lbproxy.kernel import bytecode, datapath, generation, identity, libbpf, loader, maps, programs
from lbproxy.kernel.device_links import Attachment
from tests import polling, serving
from tests.kernel import small_programs, test_crash
from tests.kernel.test_datapath import accept_all, mapped, never, serve
from tests.kernel.test_device_links import Namespace, attached, namespace
from tests.kernel.test_packet_path import settings

LARGER = {name: 2 * rows for name, rows in serving.SIZES.items()}
WHY = "tc_open: R1 invalid mem access 'scalar' !"
SOCKET = {program.name for program in programs.SOCKET}
CLIENT = """
import os, pathlib, socket, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
with socket.create_connection((sys.argv[2], 80), timeout=5) as client:
    print(*client.getpeername())
"""


@pytest.fixture
def made(root: pathlib.Path) -> collections.abc.Iterator[datapath.Datapath]:
    found = datapath.Datapath(root)
    yield found
    shutil.rmtree(found.links_dir, ignore_errors=True)


@pytest.fixture
def ns() -> collections.abc.Iterator[Namespace]:
    with namespace() as found:
        yield found


def refuse(patch: pytest.MonkeyPatch) -> None:
    """Have the stand-ins refused, as the loader would tell."""

    def compile_and_pin(text: str, pins: dict[str, str], may_lack: object) -> str:
        assert set(programs.PROGRAMS) - set(programs.SOCKET) == set(may_lack)  # type: ignore[call-overload]
        small_programs.compile_and_pin(text, pins, ())
        for name in pins.keys() - SOCKET:
            pathlib.Path(pins[name]).unlink()
        return WHY

    small_programs.stand_in(patch)
    patch.setattr(loader, "compile_and_pin", compile_and_pin)


def pinned(found: datapath.Datapath) -> set[str]:
    return {path.name for path in found.programs_dir.iterdir()}


def test_the_real_programs_serve_sockets(
    made: datapath.Datapath, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = libbpf.prog_load

    def prog_load(kind: int, name: str, code: bytes, attach_type: int) -> int:
        if name == "tc_open":
            raise libbpf.RefusedError(errno.EACCES, name, "R1 invalid mem access 'scalar' !")
        return real(kind, name, code, attach_type)

    monkeypatch.setattr(libbpf, "prog_load", prog_load)
    outcome = made.ensure(cgroup, serving.SIZES)
    assert (outcome.how, outcome.identity.refused, pinned(made)) == ("created", WHY, SOCKET)
    assert identity.read(made.root) == outcome.identity
    assert made.verify(cgroup) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept_all, args=(server,), daemon=True).start()
        host, port = server.getsockname()
        serve(made, tables.FrontendKey(mapped("192.0.2.9"), b"\x00\x50", 6, 0), mapped(host), port)
        argv = [sys.executable, "-c", CLIENT, str(cgroup), "192.0.2.9"]
        assert subprocess.check_output(argv, text=True, timeout=30) == "192.0.2.9 80\n"
        server.shutdown(socket.SHUT_RDWR)
    with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
        found = status.read(made.root, kernel)
    assert found.serving
    assert found.warnings[0] == f"the packet path is off: this kernel refuses its programs: {WHY}"


def test_it_is_adopted_and_not_tried_again(
    made: datapath.Datapath, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    made.ensure(cgroup, serving.SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "compile_and_pin", never)
        outcome = datapath.Datapath(made.root).ensure(cgroup, serving.SIZES)
        assert (outcome.how, outcome.identity.refused, outcome.notes) == ("adopted", WHY, ())
        (made.links_dir / "connect4").unlink()
        assert made.ensure(cgroup, serving.SIZES).how == "relinked"
    # Without one of its programs it is as broken as any other.
    (made.programs_dir / "connect4").unlink()
    assert made.ensure(cgroup, serving.SIZES).how == "replaced"


def test_it_stays_known_on_another_cgroup(
    made: datapath.Datapath,
    cgroup: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch)
    made.ensure(cgroup, serving.SIZES)
    other = tmp_path / "cgroup"
    other.symlink_to(cgroup)
    outcome = made.ensure(other, serving.SIZES)
    assert (outcome.how, outcome.identity.cgroup, outcome.identity.refused) == ("adopted", str(other), WHY)
    assert identity.read(made.root) == outcome.identity


def test_devices_are_detached_where_there_is_no_successor(
    made: datapath.Datapath, cgroup: pathlib.Path, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_programs.stand_in(monkeypatch)
    made.ensure(cgroup, serving.SIZES)
    up, pod = ns.ifindex("up0"), ns.ifindex("pod0")
    wanted = [
        Attachment(up, "tc_to_any"),
        Attachment(up, "tc_from_outside"),
        Attachment(pod, "tc_to_any"),
        Attachment(pod, "tc_from_inside"),
    ]
    ns(lambda: made.attach(wanted))
    refuse(monkeypatch)
    outcome = made.ensure(cgroup, LARGER)
    assert (outcome.how, outcome.identity.refused, pinned(made)) == ("replaced", WHY, SOCKET)
    assert outcome.notes == ("what served 2 devices is detached: there is no successor",)
    assert made.device_links.held() == []
    assert [attached(ns, up, hook) for hook in (libbpf.TCX_INGRESS, libbpf.TCX_EGRESS)] == [0, 0]
    assert {path.name for path in made.links_dir.iterdir()} == SOCKET
    # And once a kernel, or a version, does better, all is as it was.
    small_programs.stand_in(monkeypatch)
    outcome = made.ensure(cgroup, {name: 2 * rows for name, rows in LARGER.items()})
    assert (outcome.how, outcome.identity.refused) == ("replaced", "")
    assert generation.Generation(made.root).is_whole()
    assert ns(lambda: made.attach(wanted)).added == wanted


def test_such_an_upgrade_that_was_killed_at_any_step_is_made_good(
    root: pathlib.Path, cgroup: pathlib.Path, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = ns.ifindex("up0")
    wanted = [Attachment(up, "tc_to_any"), Attachment(up, "tc_from_outside")]

    def prepare() -> None:
        test_crash.begin_anew(root)
        small_programs.stand_in(monkeypatch)
        made = datapath.Datapath(root)
        made.ensure(cgroup, test_crash.OLD)
        assert not ns(lambda: made.attach(wanted)).refused
        refuse(monkeypatch)

    def upgrade() -> None:
        datapath.Datapath(root).ensure(cgroup, test_crash.NEW)

    for number in test_crash.each_step(prepare, upgrade, least=60):
        sizes = (test_crash.NEW, test_crash.OLD)[number % 2]
        next_ = datapath.Datapath(root)
        found = next_.ensure(cgroup, sizes).identity
        # It has what it can serve: never programs at devices whose tables are another generation's.
        current = generation.Generation(root)
        assert (current.is_whole(), pinned(next_) == SOCKET) == (True, bool(found.refused))
        running = {info.id for info in current.programs().values()}
        assert {held.info.prog_id for held in next_.device_links.held()} <= running
        assert next_.verify(cgroup) == []
        assert len(list((root / "generations").iterdir())) == 1
    shutil.rmtree(root / "links")


def test_the_packet_path_says_why_it_is_off(
    made: datapath.Datapath,
    cgroup: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse(monkeypatch)
    outcome = made.ensure(cgroup, serving.SIZES)
    reported: list[list[str]] = []

    async def main() -> None:
        with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
            path = packet_path.PacketPath(
                settings(),
                made,
                kernel,
                lambda reasons, _: reported.append(list(reasons)),
                outcome.identity.refused,
            )
            await path.run()
            path.node_known(())
            await polling.eventually_async(path.settled.is_set)

    asyncio.run(main())
    [[reason]] = reported
    assert reason.startswith(f"the packet path is off: this kernel refuses its programs ({WHY}); sockets")
    assert caplog.messages == [reason]
    assert made.device_links.held() == []


def test_of_several_refused_the_first_is_told_and_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"tc_answer", "connect6", "tc_to_any"}
    opened: list[int] = []

    def prog_load(_kind: int, name: str, _code: bytes, _attach_type: int) -> int:
        if name in lacking:
            raise libbpf.RefusedError(errno.EACCES, name, f"invalid: {name}")
        opened.append(os.open("/dev/null", os.O_RDONLY))
        return opened[-1]

    monkeypatch.setattr(libbpf, "prog_load", prog_load)
    code = bytecode.Program(b"", {})
    with pytest.raises(errors.AgentError, match="invalid: connect6"):
        loader._load_all("", programs.PROGRAMS, {one.function: code for one in programs.PROGRAMS}, {})
    assert len(opened) == len(programs.PROGRAMS) - len(lacking)
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
