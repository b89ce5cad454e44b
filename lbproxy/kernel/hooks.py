"""The links that hold the programs of the socket path at their hooks: links/NAME.

A hook is never without a program: a link is given another one in one step, and a
link to another cgroup holds before the old one goes.
"""

import contextlib
import errno
import os
import pathlib
import typing

from lbproxy.kernel import generation, libbpf, programs

NEW: typing.Final = "new_"  # of a pin that is about to be renamed


class Hooks:
    """The links in one folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def running(self) -> set[int]:
        """The kernel's ids of the programs that the links hold, those to devices included."""
        running = set()
        for path in self._folder.iterdir():
            with generation.opened(path) as link_fd:
                running.add(libbpf.link_info(link_fd).prog_id)
        return running

    def missing(self, cgroup_id: int, wanted: generation.Generation) -> list[str]:
        """The programs of this generation that are not at their hooks of this cgroup."""
        return [
            program.name
            for program in programs.SOCKET
            if not self._holds(program.name, cgroup_id, wanted.programs_dir / program.name)
        ]

    def _holds(self, name: str, cgroup_id: int, program: pathlib.Path) -> bool:
        try:
            with generation.opened(self._folder / name) as link_fd, generation.opened(program) as prog_fd:
                info = libbpf.link_info(link_fd)
                return (info.cgroup_id, info.prog_id) == (cgroup_id, libbpf.prog_id(prog_fd))
        except FileNotFoundError:
            return False

    def lost_cgroup(self) -> bool:
        """Whether the kernel has taken all links off their cgroup, as it does when that is removed."""
        at = []
        for program in programs.SOCKET:
            with (
                contextlib.suppress(FileNotFoundError),
                generation.opened(self._folder / program.name) as link_fd,
            ):
                at.append(libbpf.link_info(link_fd).cgroup_id)
        return bool(at) and not any(at)

    def switch(self, cgroup: pathlib.Path, wanted: generation.Generation, only_id: int | None = None) -> None:
        """Put every program of a generation at its hook, in the place of an earlier one's.

        Raises OSError, also where another cgroup than `only_id` is there.
        """
        cgroup_fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            cgroup_id = os.fstat(cgroup_fd).st_ino
            if only_id not in (None, cgroup_id):
                raise OSError(errno.ESTALE, "another cgroup is there", str(cgroup))
            for program in programs.SOCKET:
                path = wanted.programs_dir / program.name
                # A generation of another version, about to be replaced, may lack one.
                if path.exists():
                    with generation.opened(path) as prog_fd:
                        self._switch_one(program, cgroup_fd, cgroup_id, prog_fd)
        finally:
            os.close(cgroup_fd)

    def _switch_one(self, program: programs.Program, cgroup_fd: int, cgroup_id: int, prog_fd: int) -> None:
        path, fresh = self._folder / program.name, self._folder / (NEW + program.name)
        if path.exists():
            with generation.opened(path) as link_fd:
                if libbpf.link_info(link_fd).cgroup_id == cgroup_id:
                    libbpf.link_update(link_fd, prog_fd)
                    return
        generation.remove(fresh)
        link_fd = libbpf.link_create(prog_fd, cgroup_fd, program.attach_type)
        try:
            libbpf.obj_pin(link_fd, str(fresh))
        finally:
            os.close(link_fd)
        fresh.rename(path)
