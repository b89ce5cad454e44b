"""Somebody takes pins away, or puts others in their place, while an agent runs."""

import collections.abc
import logging
import os
import pathlib
import shutil
import types
import typing

import pytest

from lbproxy import abi, agent, cgroup2, errors, gate
from lbproxy.commands import status
from lbproxy.kernel import datapath, generation, identity, inspection, libbpf, loader, maps, programs
from tests import serving
from tests.kernel import conftest, small_programs

NAMES = sorted(program.name for program in programs.SOCKET)


@pytest.fixture
def made(
    root: pathlib.Path, cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> collections.abc.Iterator[datapath.Datapath]:
    monkeypatch.setattr(loader, "compile_and_pin", small_programs.compile_and_pin)
    found = datapath.Datapath(root)
    found.ensure(cgroup, serving.SIZES)
    yield found
    shutil.rmtree(found.links_dir, ignore_errors=True)


def exchange(made: datapath.Datapath, name: str) -> None:
    """Pin an empty map in the place of one that programs use."""
    spec = abi.MAPS[name]
    rows = abi.map_rows(spec, serving.SIZES)
    fd = libbpf.map_create(spec.type, name, spec.key_size, spec.value_size, rows, spec.flags)
    (made.maps_dir / name).unlink()
    libbpf.obj_pin(fd, str(made.maps_dir / name))
    os.close(fd)


def remove_all(made: datapath.Datapath) -> None:
    for name in datapath.NAMES:
        generation.remove(made.root / name)


LOSSES: dict[str, collections.abc.Callable[[datapath.Datapath], object]] = {
    "identity": lambda made: (made.root / "current" / identity.PIN).unlink(),
    "pointer": lambda made: (made.root / "current").unlink(),
    "map": lambda made: (made.maps_dir / "settings").unlink(),
    "program": lambda made: (made.programs_dir / "connect4").unlink(),
    "another map": lambda made: exchange(made, "frontends"),
    "everything": remove_all,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_agent_ends_where_what_it_feeds_is_gone_and_its_next_start_sets_it_up(
    made: datapath.Datapath, cgroup: pathlib.Path, loss: str
) -> None:
    assert made.verify(cgroup) == []
    LOSSES[loss](made)
    with pytest.raises(errors.AgentError, match="is gone or was exchanged"):
        made.verify(cgroup)
    successor = datapath.Datapath(made.root)
    assert successor.ensure(cgroup, serving.SIZES).how != "adopted"
    assert successor.verify(cgroup) == []


@pytest.mark.parametrize(
    ("place", "name"), [("maps", "flows"), ("maps", "settings"), ("programs", "connect4")]
)
def test_a_pin_of_another_kind_is_no_map_and_no_program(
    made: datapath.Datapath, cgroup: pathlib.Path, place: str, name: str
) -> None:
    """The kernel tells of a program what, read as a map, has keys of any size."""
    path = made.root / place / name
    with generation.opened(
        made.root / ("maps/counters" if place == "programs" else "programs/connect4")
    ) as fd:
        path.unlink()
        libbpf.obj_pin(fd, str(path))
    successor = datapath.Datapath(made.root)
    outcome = successor.ensure(cgroup, serving.SIZES)
    assert outcome.how == "replaced"
    assert f"in the place of {name}: it was removed" in outcome.notes[0]
    assert successor.verify(cgroup) == []
    assert datapath.Datapath(made.root).ensure(cgroup, serving.SIZES).how == "adopted"


def test_maps_that_programs_use_and_the_agent_does_not_are_not_fed(
    made: datapath.Datapath, cgroup: pathlib.Path
) -> None:
    """Whole, but another: as if somebody had removed the folder, and another agent had set it up anew."""
    remove_all(made)
    datapath.Datapath(made.root).ensure(cgroup, serving.SIZES)
    with pytest.raises(errors.AgentError, match="is gone or was exchanged"):
        made.verify(cgroup)


def test_what_readers_open_is_put_back(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    for name in ("maps", identity.PIN):
        (made.root / name).unlink()
    shutil.rmtree(made.links_dir)
    back = ["links", "maps", identity.PIN]
    assert made.verify(cgroup) == [*back, *(program.name for program in programs.SOCKET)]
    maps.BpfMaps(str(made.root / "maps")).close()
    assert made.verify(cgroup) == []


def test_a_hook_that_can_not_be_put_back_is_told(made: datapath.Datapath, cgroup: pathlib.Path) -> None:
    (made.links_dir / "connect4").unlink()
    with pytest.raises(FileNotFoundError):
        made.verify(cgroup / "gone")
    assert "can not be put back: sock_release" in made.problem
    assert made.verify(cgroup) == ["connect4"]
    assert made.problem == ""


def test_status_tells_where_programs_use_other_maps(made: datapath.Datapath) -> None:
    exchange(made, "frontends")
    found = identity.read(made.root)
    assert found is not None
    hooks = inspection.hooks(made.root, found)
    assert [(hook.name, hook.attached) for hook in hooks] == [(name, True) for name in NAMES]
    opened = maps.BpfMaps(str(made.maps_dir))
    shown = status.read(made.root, opened)
    opened.close()
    assert not shown.serving
    said = "connect4 does not serve: it uses other maps than the pinned ones, which nobody keeps up to date"
    assert said in shown.warnings


# --- the agent's check ---


class Verified:
    """A datapath that answers `verify` from a list, and then ends the agent."""

    def __init__(self, *answers: list[str] | OSError) -> None:
        self.answers = list(answers)
        self.problem = ""

    def moved(self, _: pathlib.Path) -> None:
        pass

    def verify(self, _: pathlib.Path, cgroup_id: int) -> list[str]:
        assert cgroup_id
        if not self.answers:
            raise errors.AgentError("gone")
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            self.problem = f"can not be put back: {answer}"
            raise answer
        return answer


async def test_the_agent_logs_what_it_puts_back_and_ends_where_it_can_not_go_on(
    cgroup: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent, "_HOOK_CHECK_S", 0.0)
    found = Verified([], ["connect4"], PermissionError(1, "not now"), [])
    told: list[str] = []
    counted: list[int] = []

    class Control:
        def __setattr__(self, name: str, value: str) -> None:
            told.append(f"{name}: {value}")

    parts = types.SimpleNamespace(
        _datapath=found,
        _cgroup=cgroup2.Cgroup(cgroup, lambda: False),
        _controller=Control(),
        _writing=gate.Gate(),
        _telemetry=types.SimpleNamespace(put_back=counted.append),
    )
    running = typing.cast(agent._Agent, parts)
    with caplog.at_level(logging.ERROR), pytest.raises(errors.AgentError, match="gone"):
        await agent._Agent._watch_hooks(running)
    assert [record.message for record in caplog.records] == [
        "put back hooks that were taken away: connect4",
        "can not be put back: [Errno 1] not now",
    ]
    assert "datapath_problem: can not be put back: [Errno 1] not now" in told
    assert counted == [1]


@pytest.mark.usefixtures("spare_cache")
def test_cleanup_of_a_folder_with_generations_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lbproxy import cli as command  # noqa: PLC0415

    monkeypatch.setattr(loader, "compile_and_pin", small_programs.compile_and_pin)
    with conftest.child_cgroup() as group, conftest.mounted(tmp_path / "bpf") as root:
        datapath.Datapath(root).ensure(group, serving.SIZES)
        (root / "new_current").symlink_to("generations/2")
        assert command.main(["cleanup", "--bpffs", str(root)]) == 0
        assert (
            f"{len(NAMES)} links, {len(programs.PROGRAMS)} programs, {len(abi.MAPS) + 1} maps"
            in capsys.readouterr().out
        )
        assert not root.exists()
