"""The table that keeps connections translated, made and removed in a namespace of its own."""

import collections.abc
import os
import shutil
import subprocess

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


def test_others_tables_stay(space: str) -> None:
    def script() -> None:
        subprocess.run(["nft", "add", "table", "inet", "theirs"], check=True)
        keeper = anchor.Keeper()
        for needed in (False, True, True, False):
            keeper.keep(needed=needed)
            assert anchor.exists() == needed
        assert "table inet theirs" in listed()

    namespaces.inside(netns.path(space), script)
