"""Child cgroups (v2) for the lab's processes: made, filled and removed with whatever still runs in them."""

import contextlib
import errno
import pathlib
import time


def processes(cgroup: pathlib.Path) -> set[int]:
    """Return the ids of the processes in a cgroup and below it."""
    found: set[int] = set()
    for file in cgroup.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):  # a child cgroup may go while we look
            found.update(int(line) for line in file.read_text().split())
    return found


def remove(cgroup: pathlib.Path, timeout_s: float = 10.0) -> None:
    """End every process in a cgroup, then remove it and its children; TimeoutError if it does not empty."""
    deadline = time.monotonic() + timeout_s
    while cgroup.exists():
        with contextlib.suppress(FileNotFoundError):
            (cgroup / "cgroup.kill").write_text("1")
        if _removed(cgroup):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"cgroup {cgroup} still holds {sorted(processes(cgroup))}")
        time.sleep(0.002)


def _removed(cgroup: pathlib.Path) -> bool:
    children = sorted((child for child in cgroup.rglob("*") if child.is_dir()), reverse=True)
    try:
        for directory in (*children, cgroup):
            directory.rmdir()
    except FileNotFoundError:
        return not cgroup.exists()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
