"""Programs that come compiled: they load where there is no compiler, and only for their own sources."""

import collections.abc
import pathlib

import pytest

from lbproxy import abi, errors
from lbproxy.core import trace_events
from lbproxy.kernel import bytecode, datapath, inspection, loader, observers, programs, shipping, source
from tests import serving
from tests.kernel import conftest


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, needs_bpf: None) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("shipped")
    assert source.features() in shipping.kernels()
    # And what `lbproxy trace` loads.
    assert len(shipping.make(folder, serving.SIZES, [source.features()])) == 1 + 1
    return folder


@pytest.fixture
def without_compiler(
    shipped: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[None]:
    def missing(*_: object) -> bytecode.Programs:
        raise errors.AgentError("no compiler here")

    monkeypatch.setattr(bytecode, "shipped_dir", lambda: shipped)
    monkeypatch.setattr(loader, "compiled", missing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    assert not any(tmp_path.glob("lbproxy/*"))


def load(folder: pathlib.Path, **more: int) -> None:
    """Make maps of these sizes, and load every program on them."""
    sizes = {**serving.SIZES, **more}
    with conftest.mounted(folder / "bpf") as root:
        conftest.create_maps(root / "maps", sizes)
        text = source.compose(programs.SOURCE, sizes, {name: str(root / "maps" / name) for name in abi.MAPS})
        wanted = programs.of_this_kernel()
        loader.compile_and_pin(text, {one.name: str(root / "programs" / one.name) for one in wanted})
        assert {path.name for path in (root / "programs").iterdir()} == {one.name for one in wanted}


@pytest.mark.usefixtures("without_compiler")
def test_a_start_needs_no_compiler_whatever_size_most_maps_have(tmp_path: pathlib.Path) -> None:
    load(tmp_path)
    load(tmp_path, frontends=512, slots=1024, services=128, affinity=128, flows=512)


@pytest.mark.usefixtures("without_compiler")
def test_tracing_needs_no_compiler_either(tmp_path: pathlib.Path) -> None:
    with conftest.mounted(tmp_path / "bpf") as root, conftest.child_cgroup() as cgroup:
        datapath.Datapath(root).ensure(cgroup, serving.SIZES)
        known = inspection.pinned(root)
        with observers.Observers(root, known, trace_events.Filter().pack(), ()) as watching:
            assert watching.problems == []
            assert watching.lost() == 0


@pytest.mark.usefixtures("without_compiler")
def test_flows_are_moved_to_a_larger_table_without_one(tmp_path: pathlib.Path) -> None:
    with conftest.mounted(tmp_path / "bpf") as root, conftest.child_cgroup() as cgroup:
        made = datapath.Datapath(root)
        made.ensure(cgroup, serving.SIZES)
        larger = {"flows": 2 * serving.SIZES["flows"]}
        assert made.take_over(made.prepare(larger), cgroup).sizes["flows"] == larger["flows"]
        assert made.verify(cgroup) == []


@pytest.mark.usefixtures("without_compiler")
def test_a_size_that_programs_know_makes_them_others(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.AgentError, match="no compiler here"):
        load(tmp_path, sockets=2 * serving.SIZES["sockets"])
