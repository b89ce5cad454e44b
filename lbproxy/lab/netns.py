"""Network namespaces by name under /run/netns, made and entered without leaving the caller's own.

A thread that changes its namespace never changes back: it does its work and ends.
"""

import collections.abc
import errno
import os
import pathlib

from lbproxy.kernel import namespaces

inside = namespaces.inside

DIRECTORY = pathlib.Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 2


def path(name: str) -> pathlib.Path:
    """Return the file that stands for the namespace, as nsenter and setns want it."""
    return DIRECTORY / name


def names() -> list[str]:
    """List the named namespaces of this machine."""
    try:
        return sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:  # whoever removes the last one removes the directory
        return []


def create(name: str, sysctls: collections.abc.Mapping[str, str]) -> None:
    """Make a namespace with these settings (`net.ipv4.ip_forward` → `1`); OSError when not allowed.

    A setting that this kernel does not have is passed over.
    """
    target = path(name)
    _make_mount_point(target)

    def make() -> None:
        namespaces.call("unshare", _CLONE_NEWNET)
        namespaces.call("mount", b"/proc/thread-self/ns/net", bytes(target), None, _MS_BIND, None)
        for key, value in sysctls.items():
            set_sysctl(key, value)

    namespaces.in_thread(make)


def remove(name: str) -> None:
    """Forget a namespace; it ends with its last process. Removing an unknown one does nothing."""
    target = path(name)
    try:
        # Mounted more than once where `ip netns add` has bound the whole directory to itself meanwhile.
        while True:
            namespaces.call("umount2", bytes(target), _MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
    target.unlink(missing_ok=True)
    try:
        DIRECTORY.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY, errno.ENOENT):
            raise


def set_sysctl(key: str, value: str) -> None:
    """Write a setting of the calling thread's namespace, unless this kernel has no such setting."""
    file = pathlib.Path("/proc/sys", *key.split("."))
    if file.exists():
        file.write_text(value)


def _make_mount_point(target: pathlib.Path) -> None:
    while True:
        DIRECTORY.mkdir(mode=0o755, exist_ok=True)
        try:
            target.touch(exist_ok=False)
        except FileNotFoundError:  # another lab has just removed the directory, as empty
            continue
        return
