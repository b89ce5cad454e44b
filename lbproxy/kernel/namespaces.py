"""The network namespaces of this machine: found, and entered without leaving the caller's own.

A thread that changes its namespace never changes back: it does its work and ends.
A namespace is told by device and inode of the file that stands for it, of which
there may be many: a name that the container runtime made, and one for each process.
"""

import collections.abc
import contextlib
import ctypes
import os
import pathlib
import threading
import typing

FOLDERS: typing.Final = ("/run/netns", "/var/run/netns", "/run/docker/netns")
_CLONE_NEWNET = 0x40000000
_OWN = "/proc/self/ns/net"
_PATHS = 3  # of one namespace: a process may end while its path is being used

T = typing.TypeVar("T")
Identity = tuple[int, int]
Found = dict[Identity, list[str]]


def named() -> Found:
    """The namespaces that a container runtime, or anyone, has named; and the caller's own."""
    found: Found = {}
    own = os.stat(_OWN)
    _add(found, own, _OWN)
    for folder in FOLDERS:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    # A name without a namespace mounted on it is a file of another device.
                    status = os.stat(entry.path)
                    if status.st_dev == own.st_dev:
                        _add(found, status, entry.path)
    return found


def every() -> Found:
    """These, and all others that a process is in which can be seen from here."""
    found = named()
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        path = f"/proc/{pid}/ns/net"
        with contextlib.suppress(OSError):
            _add(found, os.stat(path), path)
    return found


def _add(found: Found, status: os.stat_result, path: str) -> None:
    paths = found.setdefault((status.st_dev, status.st_ino), [])
    if len(paths) < _PATHS:
        paths.append(path)


def inside(namespace: pathlib.Path, function: collections.abc.Callable[[], T]) -> T:
    """Run a function in a thread that has entered the namespace, and return or raise what it does."""

    def enter() -> T:
        _enter(str(namespace))
        return function()

    return in_thread(enter)


def visit(
    spaces: collections.abc.Mapping[Identity, collections.abc.Iterable[str]],
    function: collections.abc.Callable[[], T],
) -> tuple[dict[Identity, T], dict[Identity, OSError]]:
    """Run a function in each of these namespaces, one after another in one thread.

    Returns what it returned, and why it failed or could not be run elsewhere. A
    namespace that is gone is in neither.
    """
    results: dict[Identity, T] = {}
    failures: dict[Identity, OSError] = {}

    def visit_all() -> None:
        for identity, paths in spaces.items():
            for path in paths:
                try:
                    _enter(path, identity)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                except OSError as error:
                    failures[identity] = error
                    continue
                failures.pop(identity, None)
                try:
                    results[identity] = function()
                except OSError as error:
                    failures[identity] = error
                break

    in_thread(visit_all)
    return results, failures


def _enter(path: str, identity: Identity | None = None) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if identity not in (None, (status.st_dev, status.st_ino)):
            raise ProcessLookupError(f"{path} stands for another namespace now")
        call("setns", fd, _CLONE_NEWNET)
    finally:
        os.close(fd)


def in_thread(function: collections.abc.Callable[[], T]) -> T:
    """Run a function in a thread of its own, and return or raise what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library that returns 0 or sets errno."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
