"""Network namespaces, found and entered."""

import collections.abc
import contextlib
import os
import pathlib
import subprocess
import uuid

from lbproxy.kernel import namespaces, netlink, netns_addresses, node
from lbproxy.lab import netns


def identity(path: str) -> namespaces.Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def named() -> collections.abc.Iterator[str]:
    name = f"lbp-{uuid.uuid4().hex[:8]}"
    netns.create(name, {})
    try:
        yield str(netns.path(name))
    finally:
        netns.remove(name)


@contextlib.contextmanager
def process() -> collections.abc.Iterator[str]:
    """A process in a namespace that has no name."""
    argv = ["unshare", "--net", "sh", "-c", "echo; read line"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        yield f"/proc/{running.pid}/ns/net"
        running.communicate(b"\n")


def test_a_named_namespace_and_the_own_one_are_found_by_name() -> None:
    with named() as path:
        found = namespaces.named()
        assert path in found[identity(path)]
        assert "/proc/self/ns/net" in found[identity("/proc/self/ns/net")]
    assert all(path not in paths for paths in namespaces.named().values())


def test_one_without_a_name_is_found_by_its_process() -> None:
    with process() as path:
        assert identity(path) not in namespaces.named()
        assert namespaces.every()[identity(path)] == [path]


def test_a_name_without_a_namespace_is_passed_over() -> None:
    with named() as path:
        bare = pathlib.Path(f"{path}-bare")
        bare.touch()
        try:
            assert all(str(bare) not in paths for paths in namespaces.named().values())
        finally:
            bare.unlink()


def test_each_is_entered_and_the_caller_stays_where_it_is() -> None:
    before = node.netns_cookie()
    with named() as one, named() as other:
        spaces = {identity(path): [path] for path in (one, other)}
        found, failures = namespaces.visit(spaces, node.netns_cookie)
        assert failures == {}
        expected = {identity(p): netns.inside(pathlib.Path(p), node.netns_cookie) for p in (one, other)}
        assert found == expected
        assert len({before, *found.values()}) == 3
    assert node.netns_cookie() == before


def test_one_that_is_gone_is_passed_over_and_one_that_fails_is_told() -> None:
    with named() as path:
        spaces = {(0, 0): ["/run/netns/lbp-no-such"], identity(path): ["/run/netns/lbp-no-such", path]}

        def fail() -> None:
            raise OSError(5, "no luck")

        found, failures = namespaces.visit(spaces, fail)
        assert found == {}
        assert {space: failure.errno for space, failure in failures.items()} == {identity(path): 5}
        assert namespaces.visit(spaces, lambda: 1) == ({identity(path): 1}, {})


def test_a_path_that_leads_to_another_namespace_now_is_not_entered() -> None:
    with named() as path:
        assert namespaces.visit({(1, 1): [path]}, node.netns_cookie) == ({}, {})


def test_addresses_are_told_with_device_scope_and_flags() -> None:
    with named() as path:
        name = pathlib.Path(path).name
        for line in ("link set lo up", "link add d0 type veth", "addr add 10.9.9.9/24 dev d0"):
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        found = netns.inside(pathlib.Path(path), netns_addresses.here)
    assert found.cookie
    told = {
        one.address[12:]: one for one in found.addresses if one.address.startswith(bytes(10) + b"\xff\xff")
    }
    assert told[bytes([10, 9, 9, 9])].scope == 0
    assert told[bytes([10, 9, 9, 9])].device > 1
    assert told[bytes([127, 0, 0, 1])].scope == 254


def test_attributes_are_read_to_the_end_of_what_there_is() -> None:
    packed = b"\x05\x00\x01\x00\x07\0\0\0" + b"\x08\x00\x02\x00abcd"
    assert netlink.attributes(packed) == {1: b"\x07", 2: b"abcd"}
    assert netlink.attributes(packed[:-1]) == {1: b"\x07", 2: b"abc"}
    assert netlink.attributes(bytes(8)) == {0: b""}
