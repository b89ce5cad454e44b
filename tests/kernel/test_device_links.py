"""Links to devices of a namespace of one's own, from one version of the programs to the next."""

import collections.abc
import contextlib
import ctypes
import errno
import itertools
import os
import pathlib
import shutil
import socket
import subprocess
import typing

import pytest

from lbproxy.commands import status
from lbproxy.kernel import datapath, generation, libbpf, maps, programs
from lbproxy.kernel.device_links import Attachment
from lbproxy.lab import netns
from tests import polling, serving
from tests.kernel import small_programs, test_crash

_numbers = itertools.count(1)
T = typing.TypeVar("T")


class Namespace:
    """A network namespace with a few veth devices; calls are made inside."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, function: collections.abc.Callable[[], T]) -> T:
        return netns.inside(netns.path(self.name), function)

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True)

    def ifindex(self, name: str) -> int:
        return self(lambda: socket.if_nametoindex(name))


@contextlib.contextmanager
def namespace() -> collections.abc.Iterator[Namespace]:
    """A namespace with two veth pairs: their peers are in it too."""
    made = Namespace(f"lbp-devices-{os.getpid()}-{next(_numbers)}")
    netns.create(made.name, {})
    try:
        made.ip("link", "add", "up0", "type", "veth", "peer", "name", "far0")
        made.ip("link", "add", "pod0", "type", "veth", "peer", "name", "far1")
        yield made
    finally:
        netns.remove(made.name)


@pytest.fixture
def ns() -> collections.abc.Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_programs.stand_in(monkeypatch)


@pytest.fixture
def made(root: pathlib.Path, cgroup: pathlib.Path) -> collections.abc.Iterator[datapath.Datapath]:
    found = datapath.Datapath(root)
    found.ensure(cgroup, serving.SIZES)
    yield found
    shutil.rmtree(found.links_dir, ignore_errors=True)


def runs(found: datapath.Datapath) -> dict[str, int]:
    """The pins of devices' links, and which devices they are at; each must run the pinned program."""
    at = {}
    for held in found.device_links.held():
        with generation.opened(found.programs_dir / held.attachment.program) as fd:
            assert held.info.prog_id == libbpf.prog_id(fd) or not held.alive, held
        at[held.attachment.pin] = held.info.ifindex
    return at


def attached(ns: Namespace, ifindex: int, attach_type: int) -> int:
    """How many programs the kernel says are at a hook of a device."""

    def query() -> int:
        count = ctypes.c_uint32(0)
        assert libbpf.LIB.bpf_prog_query(ifindex, attach_type, 0, None, None, ctypes.byref(count)) == 0
        return int(count.value)

    return ns(query)


def both(ifindex: int, program: str = "tc_from_outside") -> list[Attachment]:
    return [Attachment(ifindex, "tc_to_any"), Attachment(ifindex, program)]


def test_programs_are_attached_and_taken_away_as_wanted(made: datapath.Datapath, ns: Namespace) -> None:
    up, pod = ns.ifindex("up0"), ns.ifindex("pod0")
    wanted = [*both(up), *both(pod, "tc_from_inside")]
    assert ns(lambda: made.attach(wanted)) == (wanted, [], {})
    assert runs(made) == {one.pin: one.ifindex for one in wanted}
    assert [attached(ns, up, hook) for hook in (libbpf.TCX_INGRESS, libbpf.TCX_EGRESS)] == [1, 1]

    assert ns(lambda: made.attach(wanted)) == ([], [], {})
    applied = ns(lambda: made.attach(both(up)))
    assert (applied.added, set(applied.removed)) == ([], set(both(pod, "tc_from_inside")))
    assert attached(ns, pod, libbpf.TCX_INGRESS) == 0
    assert set(ns(lambda: made.attach(())).removed) == set(both(up))
    assert (runs(made), attached(ns, up, libbpf.TCX_EGRESS)) == ({}, 0)


def test_what_somebody_took_away_is_put_back(made: datapath.Datapath, ns: Namespace) -> None:
    up = ns.ifindex("up0")
    ns(lambda: made.attach(both(up)))
    with generation.opened(made.links_dir / both(up)[0].pin) as fd:
        libbpf.link_detach(fd)
    (made.links_dir / both(up)[1].pin).unlink()
    # The kernel lets go of an unpinned link in a while, and until then has no place for the same program.
    polling.eventually(lambda: not attached(ns, up, libbpf.TCX_INGRESS), what="the end of the link")
    assert ns(lambda: made.attach(both(up))).added == both(up)
    assert set(runs(made).values()) == {up}


def test_a_device_that_becomes_another_kind_keeps_its_link(made: datapath.Datapath, ns: Namespace) -> None:
    up = ns.ifindex("up0")
    ns(lambda: made.attach(both(up, "tc_from_inside")))
    assert ns(lambda: made.attach(both(up))) == ([], [], {})
    assert runs(made) == {one.pin: up for one in both(up)}
    assert attached(ns, up, libbpf.TCX_INGRESS) == 1


def test_links_of_a_device_that_is_gone_go_and_its_successor_gets_its_own(
    made: datapath.Datapath, cgroup: pathlib.Path, ns: Namespace
) -> None:
    up = ns.ifindex("up0")
    ns(lambda: made.attach(both(up)))
    ns.ip("link", "del", "up0")
    # As long as nobody has noticed, an upgrade leaves them alone.
    assert made.ensure(cgroup, serving.sizes(affinity=128)).how == "replaced"
    assert [held.alive for held in made.device_links.held()] == [False, False]
    refused = ns(lambda: made.attach(both(up))).refused
    assert {one: error.errno for one, error in refused.items()} == dict.fromkeys(both(up), errno.ENODEV)
    assert runs(made) == {}
    ns.ip("link", "add", "up0", "index", str(up), "type", "veth", "peer", "name", "far0")
    assert ns(lambda: made.attach(both(up))).added == both(up)
    assert set(runs(made).values()) == {up}


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_xdp_is_beside_tc_and_changes_its_mode(made: datapath.Datapath, ns: Namespace, mode: str) -> None:
    up = ns.ifindex("up0")
    other = {"native": "generic", "generic": "native"}[mode]
    wanted, then = ([*both(up), Attachment(up, "xdp_from_outside", one)] for one in (mode, other))
    assert ns(lambda: made.attach(wanted)) == (wanted, [], {})
    assert runs(made) == {one.pin: up for one in wanted}
    assert ns(lambda: made.attach(then)) == ([then[-1]], [wanted[-1]], {})
    assert runs(made) == {one.pin: up for one in then}
    shown = subprocess.run(
        ["ip", "-n", ns.name, "link", "show", "up0"], check=True, capture_output=True, text=True
    ).stdout
    assert ("xdpgeneric" in shown) == (other == "generic")
    assert "xdp" in shown


def test_a_device_that_refuses_keeps_nobody_else_from_theirs(made: datapath.Datapath, ns: Namespace) -> None:
    up, pod = ns.ifindex("up0"), ns.ifindex("pod0")
    strange = ns(lambda: made.attach([Attachment(up, "xdp_from_outside", "generic")]))
    assert not strange.refused
    # As if it were another's: its pin is gone, but the link is held.
    pin = made.links_dir / Attachment(up, "xdp_from_outside", "generic").pin
    with generation.opened(pin):
        pin.unlink()
        mine = Attachment(up, "xdp_from_outside", "native")
        applied = ns(lambda: made.attach([mine, *both(pod)]))
    assert list(applied.refused) == [mine]
    assert applied.added == both(pod)


# --- from one version to the next ---


def test_an_upgrade_that_was_killed_at_any_step_is_made_good_at_devices_too(
    root: pathlib.Path, cgroup: pathlib.Path, ns: Namespace
) -> None:
    up, pod = ns.ifindex("up0"), ns.ifindex("pod0")
    wanted = [*both(up), Attachment(up, "xdp_from_outside", "native"), *both(pod, "tc_from_inside")]
    held: dict[str, int] = {}

    def prepare() -> None:
        test_crash.begin_anew(root)
        made = datapath.Datapath(root)
        made.ensure(cgroup, test_crash.OLD)
        assert not ns(lambda: made.attach(wanted)).refused
        held.update(link_ids(made))

    def upgrade() -> None:
        datapath.Datapath(root).ensure(cgroup, test_crash.NEW)

    for number in test_crash.each_step(prepare, upgrade, least=60):
        sizes = (test_crash.NEW, test_crash.OLD, test_crash.THIRD)[number % 3]
        next_ = datapath.Datapath(root)
        next_.ensure(cgroup, sizes)
        assert runs(next_) == {one.pin: one.ifindex for one in wanted}
        # The links are the same ones: there was no moment without a program.
        assert link_ids(next_) == held
        assert ns(lambda: next_.attach(wanted)) == ([], [], {})  # noqa: B023
    shutil.rmtree(root / "links")


def test_a_change_of_devices_that_was_killed_at_any_step_is_made_good(
    root: pathlib.Path, cgroup: pathlib.Path, ns: Namespace
) -> None:
    up, pod = ns.ifindex("up0"), ns.ifindex("pod0")
    before = [*both(up, "tc_from_inside"), *both(pod)]
    after = [*both(up), Attachment(up, "xdp_from_outside", "generic")]

    def prepare() -> None:
        test_crash.begin_anew(root)
        made = datapath.Datapath(root)
        made.ensure(cgroup, test_crash.OLD)
        ns(lambda: made.attach(before))

    def change() -> None:
        ns(lambda: datapath.Datapath(root).attach(after))

    for number in test_crash.each_step(prepare, change, least=4):
        next_ = datapath.Datapath(root)
        next_.ensure(cgroup, (test_crash.OLD, test_crash.NEW)[number % 2])
        runs(next_)
        assert not ns(lambda: next_.attach(after)).refused  # noqa: B023
        assert runs(next_) == {one.pin: up for one in after}
        assert attached(ns, pod, libbpf.TCX_INGRESS) == 0
    shutil.rmtree(root / "links")


def link_ids(found: datapath.Datapath) -> dict[str, int]:
    ids = {}
    for held in found.device_links.held():
        with generation.opened(found.links_dir / held.attachment.pin) as fd:
            ids[held.attachment.pin] = libbpf.link_info(fd).id
    return ids


# --- what is shown ---


def test_status_shows_devices_and_what_is_wrong_with_them(made: datapath.Datapath, ns: Namespace) -> None:
    up, pod, far = ns.ifindex("up0"), ns.ifindex("pod0"), ns.ifindex("far0")
    native = Attachment(up, "xdp_from_outside", "native")
    wanted = [*both(far, "tc_from_inside"), *both(pod, "tc_from_inside"), *both(up), native]
    ns(lambda: made.attach(wanted))

    def devices() -> tuple[status.DeviceStatus, ...]:
        with contextlib.closing(maps.BpfMaps(str(made.maps_dir))) as kernel:
            return ns(lambda: status.read(made.root, kernel)).devices

    rest = sorted([(pod, "pod0"), (far, "far0")])
    shown = [
        status.DeviceStatus(up, "up0", "uplink", True, "native", ""),
        *(status.DeviceStatus(index, name, "inside", True, "", "") for index, name in rest),
    ]
    assert devices() == tuple(shown)
    assert list(status._devices(shown)) == [
        "up0 uplink, tc and native XDP",
        f"{rest[0][1]}, {rest[1][1]}: inside, tc",
    ]

    (made.links_dir / both(pod)[0].pin).unlink()
    ns.ip("link", "del", "up0")  # and its peer, far0
    ns.ip("link", "add", "up1", "type", "veth", "peer", "name", "far2")
    assert [(one.name, one.tc, one.problem) for one in devices()] == [
        ("pod0", False, "only one of its directions is attached")
    ]
    assert list(status._devices(devices())) == ["pod0: not as it should be"]
    up1 = ns.ifindex("up1")
    ns(lambda: made.attach(both(up1)))
    pinned, link = made.programs_dir / "tc_from_inside", made.links_dir / both(up1)[1].pin
    with generation.opened(pinned) as prog_fd, generation.opened(link) as link_fd:
        libbpf.link_update(link_fd, prog_fd)
    [device] = devices()
    assert device.problem == "another program is in the place of tc_from_outside"


def test_a_kernel_without_tcx_loads_no_program_for_devices(
    root: pathlib.Path, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {program.name for program in programs.SOCKET}
    monkeypatch.setattr(programs, "of_this_kernel", lambda: programs.SOCKET)
    found = datapath.Datapath(root)
    assert found.ensure(cgroup, serving.SIZES).how == "created"
    assert {path.name for path in found.programs_dir.iterdir()} == names
    assert (found.verify(cgroup), found.ensure(cgroup, serving.SIZES).how) == ([], "adopted")
    # With a newer kernel, as far as that can be without one.
    monkeypatch.undo()
    small_programs.stand_in(monkeypatch)
    assert found.ensure(cgroup, serving.SIZES).how == "replaced"
    shutil.rmtree(found.links_dir)
