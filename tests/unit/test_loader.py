"""Which programs the loader pins where the kernel does not take them all."""

import errno
import os
import pathlib

import pytest

from lbproxy import errors
from lbproxy.kernel import bytecode, libbpf, loader, programs

PACKETS = (*programs.TAILS, *programs.PACKET)
# The array of tail calls is filled only where its programs have been loaded.
WITHOUT_TAILS = (*programs.SOCKET, *programs.PACKET)
LOG = "0: (bf) r6 = r1\nR1 invalid mem access 'scalar' !\nprocessed 12 insns"


class Kernel:
    """One that refuses a program; `pinned` are those that it has taken."""

    def __init__(self, refuses: str = "", number: int = errno.EACCES) -> None:
        self.refuses = refuses
        self.number = number
        self.names: dict[int, str] = {}
        self.pinned: set[str] = set()

    def load(self, _kind: int, name: str, _code: bytes, _attach_type: int) -> int:
        if name == self.refuses:
            raise libbpf.RefusedError(self.number, name, LOG)
        fd = os.open(os.devnull, os.O_RDONLY)
        self.names[fd] = name
        return fd

    def pin(self, fd: int, path: str) -> None:
        assert pathlib.Path(path).name == self.names[fd]
        self.pinned.add(self.names[fd])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Kernel:
    made = Kernel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(libbpf, "prog_load", made.load)
    monkeypatch.setattr(libbpf, "obj_pin", made.pin)
    monkeypatch.setattr(
        loader, "compiled", lambda _, wanted: {one.function: bytecode.Program(b"", {}) for one in wanted}
    )
    return made


def load(folder: pathlib.Path, wanted: tuple[programs.Program, ...] = programs.PROGRAMS) -> str:
    return loader.compile_and_pin("", {one.name: str(folder / one.name) for one in wanted}, PACKETS)


def names(some: tuple[programs.Program, ...]) -> set[str]:
    return {one.name for one in some}


def test_all_are_pinned_where_none_is_refused(kernel: Kernel, tmp_path: pathlib.Path) -> None:
    assert load(tmp_path, WITHOUT_TAILS) == ""
    assert kernel.pinned == names(WITHOUT_TAILS)


@pytest.mark.parametrize("refused", sorted(names(PACKETS)))
@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.E2BIG, 524])
def test_sockets_are_served_whatever_packet_program_is_refused(
    kernel: Kernel, tmp_path: pathlib.Path, refused: str, number: int
) -> None:
    kernel.refuses, kernel.number = refused, number
    # From a copy that was kept, too, as where the kernel is another since.
    for _ in range(2):
        kernel.pinned.clear()
        assert load(tmp_path) == f"{refused}: R1 invalid mem access 'scalar' !"
        assert kernel.pinned == names(programs.SOCKET)


@pytest.mark.parametrize(
    ("refused", "number"),
    [
        ("connect4", errno.EACCES),
        ("tc_open", errno.ENOMEM),
        ("tc_open", errno.EPERM),
        ("tc_from_outside", errno.EAGAIN),
    ],
)
def test_what_may_go_well_next_time_or_can_not_be_done_without_ends_the_start(
    kernel: Kernel, tmp_path: pathlib.Path, refused: str, number: int
) -> None:
    kernel.refuses, kernel.number = refused, number
    with pytest.raises(errors.AgentError, match="cannot load the BPF programs: R1 invalid mem access"):
        load(tmp_path)
    assert kernel.pinned == set()


def test_whoever_asks_for_packet_programs_alone_is_told(kernel: Kernel, tmp_path: pathlib.Path) -> None:
    kernel.refuses = "tc_open"
    pins = {one.name: str(tmp_path / one.name) for one in PACKETS}
    with pytest.raises(errors.AgentError):
        loader.compile_and_pin("", pins)
