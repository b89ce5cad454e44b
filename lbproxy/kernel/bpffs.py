"""The bpffs and the cgroup: mounting, locking, and taking down what we mounted."""

import ctypes
import errno
import fcntl
import os
import pathlib

from lbproxy import cgroup2, errors

_LIBC = ctypes.CDLL(None, use_errno=True)
_BPF_FS_MAGIC = 0xCAFE4A11
_CGROUP2_MAGIC = 0x63677270
_MNT_DETACH = 2
_STANDARD = pathlib.Path("/sys/fs/bpf")


def _magic(path: pathlib.Path) -> int:
    """The file system type of a path, by statfs(2)."""
    buffer = ctypes.create_string_buffer(256)
    if _LIBC.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int.from_bytes(buffer.raw[:4], "little")


def is_bpffs(path: pathlib.Path) -> bool:
    """Whether an existing path lies on a bpffs."""
    return path.exists() and _magic(path) == _BPF_FS_MAGIC


def ensure(path: pathlib.Path) -> None:
    """Make `path` a folder on a bpffs, mounting one if there is none.

    Under /sys/fs/bpf the bpffs is mounted there, where everybody expects it;
    elsewhere at `path` itself. Raises AgentError.
    """
    try:
        if path.is_relative_to(_STANDARD) and not is_bpffs(_STANDARD):
            _mount(_STANDARD)
        if not is_bpffs(path.parent) and not is_bpffs(path):
            path.mkdir(parents=True, exist_ok=True)
            _mount(path)
        path.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise errors.AgentError(f"cannot use {path} as a bpffs: {error.strerror}") from error


def _mount(path: pathlib.Path) -> None:
    if _LIBC.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        number = ctypes.get_errno()
        hint = " (mounting needs CAP_SYS_ADMIN)" if number in (errno.EPERM, errno.EACCES) else ""
        raise OSError(number, f"mount: {os.strerror(number)}{hint}")


def lock(path: pathlib.Path) -> int:
    """Keep every other agent off this folder for as long as the returned descriptor is open.

    Raises AgentError where another process has it, or one may not open it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.AgentError(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise errors.AgentError(
            f"another lbproxy agent already runs on {path}: stop it; for another cgroup and other devices "
            "this one may have its own --bpffs"
        ) from None
    return fd


def remove(path: pathlib.Path) -> bool:
    """Remove a folder of pins and everything in it; unmount it if it is a bpffs of its own.

    Returns whether there was anything.
    """
    if path == _STANDARD or not is_bpffs(path):
        return False
    own_mount = os.path.ismount(path)
    for folder, folders, files in os.walk(path, topdown=False):
        for name in files:
            # A bpffs shows its own iterators, such as maps.debug, in its root; they can not be removed.
            if not (own_mount and name.endswith(".debug")):
                os.unlink(os.path.join(folder, name))
        for name in folders:
            inside = os.path.join(folder, name)
            # A symbolic link to a folder is listed as one.
            (os.unlink if os.path.islink(inside) else os.rmdir)(inside)
    # Lazily: a reader may have the folder open, and has nothing left to find in it.
    if own_mount and _LIBC.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise errors.AgentError(f"cannot unmount {path}: {os.strerror(number)}")
    path.rmdir()
    return True


def cgroup(path: pathlib.Path | None) -> pathlib.Path:
    """The cgroup v2 folder to attach to: the given one, or the root of the hierarchy.

    Raises AgentError where it is missing or no cgroup v2.
    """
    if path is None:
        path = cgroup2.mount_point()
        if path is None:
            raise errors.AgentError(
                "cgroup v2 is not mounted: mount it (mount -t cgroup2 none /sys/fs/cgroup/unified) "
                "or name a folder of it with --cgroup"
            )
    if not path.is_dir():
        raise errors.AgentError(f"--cgroup {path}: no such folder")
    if _magic(path) != _CGROUP2_MAGIC:
        raise errors.AgentError(f"--cgroup {path}: not in a cgroup v2 hierarchy")
    return path
