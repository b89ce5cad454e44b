"""The observers of `lbproxy trace` beside a datapath: what they need, and when they have outlived it."""

import pathlib

import pytest

from lbproxy import errors
from lbproxy.core import trace_events
from lbproxy.kernel import datapath, inspection, observers, trials
from tests import serving

FILTER = trace_events.Filter().pack()


@pytest.fixture
def made(root: pathlib.Path, cgroup: pathlib.Path) -> datapath.Datapath:
    found = datapath.Datapath(root)
    found.ensure(cgroup, serving.SIZES)
    return found


def test_observers_know_when_another_datapath_has_come(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    known = inspection.pinned(made.root)
    with observers.Observers(made.root, known, FILTER) as watching:
        assert watching.problems == []
        assert not watching.outlived()
        assert made.ensure(cgroup, serving.SIZES).how == "adopted"
        assert not watching.outlived()
        larger = {**serving.SIZES, "frontends": 2 * serving.SIZES["frontends"]}
        assert made.ensure(cgroup, larger).how == "replaced"
        assert watching.outlived()


def test_a_cgroup_that_is_not_the_datapaths_is_not_watched(
    made: datapath.Datapath, tmp_path: pathlib.Path
) -> None:
    known = inspection.pinned(made.root)
    for place in (tmp_path / "gone", tmp_path):
        moved = type(known)(known.fingerprint, known.version, known.abi_version, str(place), known.sizes)
        with observers.Observers(made.root, moved, FILTER) as watching:
            (problem,) = watching.problems
            assert problem.startswith(f"sockets: {place} ")


def test_a_kernel_that_does_not_tell_who_connects_lacks_something(
    made: datapath.Datapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "helper", lambda _kind, _helper: False)
    with (
        pytest.raises(errors.UnsupportedKernel, match=r"since Linux 6\.1"),
        observers.Observers(made.root, inspection.pinned(made.root), FILTER),
    ):
        pass
