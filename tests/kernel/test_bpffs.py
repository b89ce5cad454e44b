import os
import pathlib
import subprocess
import sys

import pytest

from lbproxy import cgroup2, errors
from lbproxy.kernel import bpffs, libbpf


def test_a_missing_bpffs_is_mounted_and_unmounted_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "bpf"
    assert not bpffs.is_bpffs(path)
    bpffs.ensure(path)
    try:
        assert bpffs.is_bpffs(path)
        assert os.path.ismount(path)
        bpffs.ensure(path)
        mounts = pathlib.Path("/proc/self/mountinfo").read_text().count(f" {path} ")
        assert mounts == 1
    finally:
        assert bpffs.remove(path)
    assert not path.exists()
    assert f" {path} " not in pathlib.Path("/proc/self/mountinfo").read_text()
    assert not bpffs.remove(path)


def test_a_folder_of_a_bpffs_is_used_as_it_is_and_removed_alone(root: pathlib.Path) -> None:
    path = root / "lbproxy"
    bpffs.ensure(path)
    assert not os.path.ismount(path)
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "maps").mkdir()
    fd = libbpf.map_create("array", "one", 4, 4, 1, 0)
    libbpf.obj_pin(fd, str(path / "maps" / "one"))
    libbpf.obj_pin(fd, str(root / "neighbour"))
    os.close(fd)
    assert bpffs.remove(path)
    assert not path.exists()
    assert (root / "neighbour").exists()


def test_a_folder_that_is_no_bpffs_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "precious").write_text("mine")
    assert not bpffs.remove(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_path_that_can_not_be_mounted_is_told_in_a_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.AgentError, match=r"cannot use .*/file/bpf as a bpffs: Not a directory"):
        bpffs.ensure(tmp_path / "file" / "bpf")


def test_one_agent_keeps_every_other_off_until_it_ends(root: pathlib.Path) -> None:
    first = bpffs.lock(root)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.AgentError, match=r"another lbproxy agent already runs on .*--bpffs"):
        bpffs.lock(root)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(first)
    os.close(bpffs.lock(root))


def test_a_folder_that_may_not_be_opened_is_told_in_a_sentence(root: pathlib.Path) -> None:
    """Somebody else's, in a container, whose root is not above permissions."""
    os.chown(root, 1000, 1000)
    unable = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    script = "import pathlib, sys; from lbproxy.kernel import bpffs; bpffs.lock(pathlib.Path(sys.argv[1]))"
    argv = [*unable, sys.executable, "-c", script, str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.splitlines()[-1].endswith(f"AgentError: cannot open {root}: Permission denied")


def test_the_cgroup_is_the_given_one_or_the_root(
    cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bpffs.cgroup(cgroup) == cgroup
    assert bpffs.cgroup(None) == cgroup.parent
    monkeypatch.setattr(cgroup2, "mount_point", lambda: None)
    with pytest.raises(errors.AgentError, match="cgroup v2 is not mounted: mount it"):
        bpffs.cgroup(None)


def test_a_cgroup_that_is_none_is_told_in_a_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.AgentError, match=r"--cgroup .*/absent: no such folder"):
        bpffs.cgroup(tmp_path / "absent")
    with pytest.raises(errors.AgentError, match="not in a cgroup v2 hierarchy"):
        bpffs.cgroup(tmp_path)
