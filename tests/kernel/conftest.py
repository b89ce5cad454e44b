"""A bpffs and a cgroup of one's own: nothing here is attached where anybody else could notice."""

import collections.abc
import contextlib
import itertools
import os
import pathlib

import pytest

from lbproxy import abi, cgroup2
from lbproxy.kernel import bpffs, generation, programs

_numbers = itertools.count(1)


@contextlib.contextmanager
def mounted(path: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """A bpffs at a path, unmounted in the end whatever happens."""
    bpffs.ensure(path)
    try:
        yield path
    finally:
        bpffs.remove(path)


@contextlib.contextmanager
def child_cgroup() -> collections.abc.Iterator[pathlib.Path]:
    """An empty cgroup below the root one; links to it go with it."""
    mount = cgroup2.mount_point()
    assert mount is not None
    path = mount / f"lbp-test-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def create_maps(folder: pathlib.Path, sizes: dict[str, int]) -> None:
    """Pin every map in a folder."""
    folder.mkdir(exist_ok=True)
    for spec in abi.MAPS.values():
        generation.create(folder, spec, abi.map_rows(spec, sizes))
    generation.create(folder, generation.TAILS, len(programs.TAILS))


@pytest.fixture(autouse=True, scope="session")
def _needed(needs_bpf: None) -> None:
    """Everything in this folder loads programs or makes maps."""


@pytest.fixture
def root(tmp_path: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    with mounted(tmp_path / "bpf") as path:
        yield path


@pytest.fixture
def cgroup() -> collections.abc.Iterator[pathlib.Path]:
    with child_cgroup() as path:
        yield path
