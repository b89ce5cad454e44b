"""cgroup2 is mounted elsewhere, or not at all, under a datapath: in a mount namespace of a thread's own."""

import collections.abc
import os
import pathlib
import threading

import pytest

from lbproxy import cgroup2
from lbproxy.kernel import datapath, hooks, inspection, namespaces, programs
from tests import polling, serving
from tests.kernel import conftest

_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_MS_BIND, _MS_PRIVATE, _MS_REC, _MNT_DETACH = 1 << 12, 1 << 18, 1 << 14, 2


def mount(kind: str, at: pathlib.Path) -> None:
    at.mkdir(exist_ok=True)
    namespaces.call("mount", b"none", os.fsencode(at), kind.encode(), 0, None)


def bind(shown: pathlib.Path, at: pathlib.Path) -> None:
    namespaces.call("mount", os.fsencode(shown), os.fsencode(at), None, _MS_BIND, None)


def unmount(at: pathlib.Path) -> None:
    namespaces.call("umount2", os.fsencode(at), _MNT_DETACH)


def nowhere() -> None:
    while (point := cgroup2.mount_point()) is not None:
        unmount(point)


def never() -> bool:
    """Of a cgroup that is not removed."""
    return False


def apart(work: collections.abc.Callable[[], None]) -> None:
    """Do it in a thread with a mount namespace of its own, from which no mount gets out."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            namespaces.call("unshare", _CLONE_FS | _CLONE_NEWNS)
            namespaces.call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
            work()
        except BaseException as error:
            failed.append(error)

    before = cgroup2.shown()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert cgroup2.shown() == before
    if failed:
        raise failed[0]


@pytest.fixture
def name() -> collections.abc.Iterator[str]:
    """An empty cgroup below the root one."""
    with conftest.child_cgroup() as path:
        yield path.name


def test_a_cgroup_is_found_where_it_is_mounted_next(tmp_path: pathlib.Path, name: str) -> None:
    def work() -> None:
        nowhere()
        first, second = tmp_path / "first", tmp_path / "second"
        mount("cgroup2", first)
        place = cgroup2.Cgroup(first / name, never)
        assert (place.look(), place.visible) == ("", True)
        unmount(first)
        assert "is not to be seen" in place.look()
        assert (place.look(), place.visible) == ("", False)
        mount("cgroup2", first)
        assert place.look() == f"the cgroup is at {first / name} again"
        unmount(first)
        mount("cgroup2", second)
        assert f"is now at {second / name}" in place.look()
        assert (place.look(), place.path) == ("", second / name)
        # What is in the way of the folder is not taken for it.
        unmount(second)
        mount("tmpfs", second)
        (second / name).mkdir()
        assert "is not to be seen" in place.look()

    apart(work)


def test_a_mount_may_show_a_part_of_the_hierarchy(tmp_path: pathlib.Path, name: str) -> None:
    def work() -> None:
        mounted = cgroup2.mount_point()
        assert mounted is not None
        part = tmp_path / "part"
        part.mkdir()
        bind(mounted / name, part)
        place = cgroup2.Cgroup(mounted / name, never)
        unmount(mounted)
        assert f"is now at {part}" in place.look()

    apart(work)


def test_another_cgroup_in_the_place_of_one_that_was_removed_is_meant(
    root: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    def work() -> None:
        nowhere()
        mount("cgroup2", tmp_path / "first")
        child = tmp_path / "first" / name / "child"
        child.mkdir()
        made = datapath.Datapath(root)
        made.ensure(child, serving.SIZES)
        place = cgroup2.Cgroup(child, made.lost_cgroup)
        number = place.id
        assert not made.lost_cgroup()
        child.rmdir()
        assert "is not to be seen" in place.look()
        polling.eventually(made.lost_cgroup, what="the kernel to take the links off")
        child.mkdir()
        try:
            assert place.look() == f"another cgroup is at {child}"
            assert place.id == child.stat().st_ino != number
            assert set(made.verify(place.path, place.id)) == {program.name for program in programs.SOCKET}
            assert not made.lost_cgroup()
        finally:
            child.rmdir()

    apart(work)


def test_a_view_of_its_own_is_not_taken_for_the_cgroup(
    root: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    """As where a container is shown its own part of the hierarchy under the old name."""

    def work() -> None:
        nowhere()
        first, second = tmp_path / "first", tmp_path / "second"
        mount("cgroup2", first)
        made = datapath.Datapath(root)
        made.ensure(first / name, serving.SIZES)
        place = cgroup2.Cgroup(first / name, made.lost_cgroup)
        mount("cgroup2", second)
        part = second / name / "part"
        (part / name).mkdir(parents=True)
        try:
            unmount(first)
            bind(part, first)
            unmount(second)
            assert (first / name).stat().st_ino != place.id
            assert "is not to be seen" in place.look()
            assert made.verify(place.path, place.id) == []
            (made.links_dir / "connect4").unlink()
            with pytest.raises(OSError, match="another cgroup is there"):
                made.verify(place.path, place.id)
            assert "can not be put back: connect4" in made.problem
            unmount(first)
            mount("cgroup2", first)
            assert place.look() == f"the cgroup is at {first / name} again"
            assert made.verify(place.path, place.id) == ["connect4"]
        finally:
            mount("cgroup2", second)
            (part / name).rmdir()
            part.rmdir()

    apart(work)


def test_hooks_survive_a_mount_elsewhere(root: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    """Both while an agent looks after them and between two starts: nothing is attached anew."""

    def work() -> None:
        nowhere()
        first, second = tmp_path / "first", tmp_path / "second"
        mount("cgroup2", first)
        made = datapath.Datapath(root)
        assert made.ensure(first / name, serving.SIZES).how == "created"
        place = cgroup2.Cgroup(first / name, made.lost_cgroup)
        running = hooks.Hooks(made.links_dir).running()
        unmount(first)
        place.look()
        # Not to be seen, and at work: nobody has to put anything back.
        assert made.verify(place.path, place.id) == []
        mount("cgroup2", second)
        place.look()
        assert made.verify(place.path, place.id) == []
        made.moved(place.path)
        known = inspection.pinned(root)
        assert known.cgroup == str(second / name)
        assert not [one for one in inspection.hooks(root, known) if one.problem]
        unmount(second)
        mount("cgroup2", first)
        outcome = datapath.Datapath(root).ensure(first / name, serving.SIZES)
        assert outcome.how == "adopted"
        assert outcome.notes == (f"the cgroup that was at {second / name} is at {first / name} now",)
        assert hooks.Hooks(made.links_dir).running() == running

    apart(work)
