"""What is mounted where, as this thread sees it."""

import pathlib
import re
import typing

# Of this thread: a mount namespace may be a thread's own.
_MOUNTINFO: typing.Final = pathlib.Path("/proc/thread-self/mountinfo")


class Mount(typing.NamedTuple):
    """A mount; `top` is the folder of its file system that it shows."""

    point: pathlib.Path
    top: pathlib.PurePosixPath
    kind: str  # of file system


def read(mountinfo: str | None = None) -> list[Mount]:
    """Every mount, the latest last: as a text of mountinfo says, or for this thread."""
    if mountinfo is None:
        mountinfo = _MOUNTINFO.read_text(errors="surrogateescape")
    found = []
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        point, top = pathlib.Path(_unescaped(fields[4])), pathlib.PurePosixPath(_unescaped(fields[3]))
        found.append(Mount(point, top, source.partition(" ")[0]))
    return found


def _unescaped(text: str) -> str:
    # The kernel writes space, tab, newline and backslash as octal.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
