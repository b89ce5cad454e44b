"""Child cgroups (v2) for the lab's processes: made, filled and removed with whatever still runs in them."""

import contextlib
import errno
import os
import pathlib
import time
import typing

_GONE: typing.Final = (errno.ENOENT, errno.ENODEV)


def processes(cgroup: pathlib.Path) -> set[int]:
    """Return the ids of the processes in a cgroup and below it."""
    found: set[int] = set()
    for folder, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):  # a child cgroup may go while we look
            found.update(int(line) for line in pathlib.Path(folder, "cgroup.procs").read_text().split())
    return found


def remove(cgroup: pathlib.Path, timeout_s: float = 10.0) -> None:
    """End every process in a cgroup, then remove it and its children; TimeoutError if it does not empty."""
    deadline = time.monotonic() + timeout_s
    while cgroup.exists():
        try:
            (cgroup / "cgroup.kill").write_text("1")
        except OSError as error:
            if error.errno not in _GONE:
                raise
        if _removed(cgroup):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"cgroup {cgroup} still holds {sorted(processes(cgroup))}")
        time.sleep(0.002)


def _removed(cgroup: pathlib.Path) -> bool:
    # Somebody else may be removing it, too: whoever starts a lab removes what dead ones have left.
    for folder, _, _ in os.walk(cgroup, topdown=False):
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno not in (*_GONE, errno.EBUSY):
                raise
    return not cgroup.exists()
