"""What preflight reads of this machine, against what the test itself has put there."""

import os
import pathlib
import socket

import pytest

from lbproxy import abi, cgroup2
from lbproxy.kernel import libbpf, probes, surroundings, trials


@pytest.mark.parametrize(
    ("bound", "asked", "taken"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("::1", "::1", True),
        ("::1", "127.0.0.1", False),
        ("::1", "::", True),
    ],
)
def test_who_has_a_port(bound: str, asked: str, taken: bool) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.create_server((bound, 0), family=family) as server:
        port = server.getsockname()[1]
        found = surroundings.listener("healthz", "--flag", asked, port)
        own = pathlib.Path("/proc/self/comm").read_text().strip()
        assert (found.taken, found.pid, found.command) == (
            (True, os.getpid(), own) if taken else (False, None, "")
        )
    free = surroundings.listener("healthz", "--flag", asked, port)
    assert not free.taken
    assert free.address == (f"[{asked}]:{port}" if ":" in asked else f"{asked}:{port}")


def test_this_process() -> None:
    found = surroundings.process()
    assert found.capabilities & {"CAP_BPF", "CAP_SYS_ADMIN"}
    assert not found.own_users


def test_pins_that_are_not_there_yet(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert surroundings.pins(root / "new").mounted
    beside = surroundings.pins(tmp_path / "other" / "new")
    assert (beside.mounted, beside.problem, beside.version) == (False, "", "")
    file = tmp_path / "file"
    file.touch()
    assert surroundings.pins(file).problem == "no folder"
    assert not (tmp_path / "other").exists()


def test_a_cgroup_that_is_none(tmp_path: pathlib.Path, cgroup: pathlib.Path) -> None:
    assert "not in a cgroup v2" in surroundings.cgroup(tmp_path).problem
    assert "no such folder" in surroundings.cgroup(tmp_path / "none").problem
    assert (surroundings.cgroup(cgroup).problem, surroundings.cgroup(cgroup).is_root) == ("", False)


def test_memory_is_estimated_about_right() -> None:
    sizes = dict.fromkeys(abi.row_names(), 1 << 12)
    total = 0
    for spec in abi.MAPS.values():
        rows = abi.map_rows(spec, sizes)
        fd = libbpf.map_create(spec.type, spec.name, spec.key_size, spec.value_size, rows, spec.flags)
        lines = pathlib.Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("memlock:"))
        os.close(fd)
    assert 0.8 < probes.map_bytes(sizes) / total < 1.3


def test_the_tightest_limit_counts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = pathlib.Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(cgroup2, "mount_point", lambda: tmp_path)
    assert surroundings.memory(1, 2, 3).limit is None
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("10\n")
    assert surroundings.memory(1, 2, 3).limit is None
    (folder / "memory.max").write_text("50\n")
    assert surroundings.memory(1, 2, 3).limit == 40


def test_memory_of_this_machine() -> None:
    found = surroundings.memory(1, 2, 3)
    assert (found.maps, found.agent, found.compiler) == (1, 2, 3)
    assert found.available is not None
    assert found.available > 1 << 20


def test_what_this_kernel_has() -> None:
    found = probes.kernel(allowed=True)
    assert {one.found for one in found.features} == {True}
    assert len({one.what for one in found.features}) == len(found.features)
    unasked = probes.kernel(allowed=False)
    assert {one.found for one in unasked.features} == {None}
    assert (unasked.tcx, unasked.release) == (None, os.uname().release)


def test_probes_of_what_no_kernel_has_say_no() -> None:
    assert trials.map_kind("hash", 0, 8, 0) is False
    assert trials.map_kind("hash", 4, 8, 0) is True
