"""Where cgroup v2 is mounted."""

import pathlib
import re

_MOUNTINFO = pathlib.Path("/proc/self/mountinfo")


def mount_point(mountinfo: str | None = None) -> pathlib.Path | None:
    """Find where a cgroup2 file system is mounted: as a text of mountinfo says, or for this process."""
    if mountinfo is None:
        mountinfo = _MOUNTINFO.read_text(errors="surrogateescape")
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        if source.startswith("cgroup2 "):
            # The kernel writes space, tab, newline and backslash as octal.
            escaped = mount.split(" ")[4]
            return pathlib.Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped))
    return None
