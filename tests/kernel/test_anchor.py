"""The table that keeps connections translated, made and removed in a namespace of its own."""

import collections.abc
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from lbproxy.kernel import anchor, namespaces
from lbproxy.lab import netns

pytestmark = pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")


@pytest.fixture
def space(needs_bpf: None) -> collections.abc.Iterator[str]:
    name = f"lbp-anchor-{os.getpid()}"
    netns.create(name, {})
    try:
        yield name
    finally:
        netns.remove(name)


def listed() -> str:
    return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout


def test_it_comes_and_goes(space: str) -> None:
    def script() -> None:
        assert not anchor.exists()
        assert not anchor.remove()
        anchor.make()
        anchor.make()
        assert anchor.exists()
        found = listed()
        assert found.count("type nat hook prerouting priority dstnat") == 1
        assert "type nat hook postrouting priority srcnat" in found
        assert 'comment "keeps connections that kube-proxy began alive' in found
        assert anchor.remove()
        assert "lbproxy" not in listed()

    namespaces.inside(netns.path(space), script)


def test_who_may_not_look_does_not_say_that_it_is_gone(space: str, tmp_path: pathlib.Path) -> None:
    """A pod that cleans up without the right would call its node clean."""
    cleanup = [sys.executable, "-m", "lbproxy", "cleanup", "--bpffs", str(tmp_path / "none")]
    inside = ["nsenter", f"--net={netns.path(space)}"]
    unable = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]

    def cleaned(*before: str) -> subprocess.CompletedProcess[str]:
        argv = [*inside, *before, *cleanup]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    namespaces.inside(netns.path(space), anchor.make)
    refused = cleaned(*unable)
    assert refused.returncode == 1
    assert f"cannot tell whether table inet {anchor.NAME} is there" in refused.stderr
    assert namespaces.inside(netns.path(space), anchor.exists)
    assert cleaned().returncode == 0
    assert not namespaces.inside(netns.path(space), anchor.exists)


def test_it_is_made_again_where_somebody_removes_it(
    space: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script() -> None:
        keeper = anchor.Keeper()
        assert keeper.keep(needed=True) == ""
        assert not caplog.messages
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        assert keeper.keep(needed=True) == ""
        assert anchor.exists()
        assert "which somebody has removed" in caplog.messages[0]
        # One that another process has left.
        assert anchor.Keeper().keep(needed=False) == ""
        assert not anchor.exists()

    namespaces.inside(netns.path(space), script)

    def refused() -> bool:
        raise OSError(95, "Operation not supported")

    caplog.clear()
    monkeypatch.setattr(anchor, "make", refused)
    keeper = anchor.Keeper()
    assert keeper.keep(needed=True) == keeper.keep(needed=True) != ""
    assert len(caplog.messages) == 1


def test_others_tables_stay(space: str) -> None:
    def script() -> None:
        subprocess.run(["nft", "add", "table", "inet", "theirs"], check=True)
        keeper = anchor.Keeper()
        for needed in (False, True, True, False):
            keeper.keep(needed=needed)
            assert anchor.exists() == needed
        assert "table inet theirs" in listed()

    namespaces.inside(netns.path(space), script)
