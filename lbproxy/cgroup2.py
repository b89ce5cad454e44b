"""Where cgroup v2 is mounted, and where one cgroup is to be seen."""

import collections.abc
import os
import pathlib

from lbproxy import mounts


def shown(mountinfo: str | None = None) -> list[mounts.Mount]:
    """Every cgroup2 mount: as a text of mountinfo says, or for this thread."""
    return [one for one in mounts.read(mountinfo) if one.kind == "cgroup2"]


def mount_point(mountinfo: str | None = None) -> pathlib.Path | None:
    """Find where a cgroup2 file system is mounted: as a text of mountinfo says, or for this process."""
    return next((one.point for one in shown(mountinfo)), None)


class Cgroup:
    """One cgroup, by the kernel's id, and the folder that shows it, which may be another one later.

    Programs that are attached to it do not notice where it is mounted, or whether it is.
    """

    def __init__(self, path: pathlib.Path, removed: collections.abc.Callable[[], bool]) -> None:
        """Take what is at `path`; `removed` tells whether the kernel knows it to be gone. Raises OSError."""
        self.path = path
        self._removed = removed
        self.id = _id(path)
        self.visible = True
        # Where in the hierarchy it is, for each way to look at it; the top of a mount may be any folder.
        self._inside = self._places()

    def look(self) -> str:
        """Find its folder again, and say what is new about that; empty where it is where it was.

        Where it was removed, and another one is in its folder's place, that one is meant from now
        on. While it lives, a folder by its name is another view: a container's own, for one.
        """
        was_visible, self.visible = self.visible, True
        if _id_or_none(self.path) == self.id:
            self._inside = self._places() or self._inside
            return "" if was_visible else f"the cgroup is at {self.path} again"
        for mount in shown():
            for inside in self._inside:
                if not inside.is_relative_to(mount.top):
                    continue
                place = mount.point / inside.relative_to(mount.top)
                if _id_or_none(place) == self.id:
                    before, self.path = self.path, place
                    return f"the cgroup at {before} is now at {place}: cgroup2 was mounted anew"
        if (other := _id_or_none(self.path)) is not None and self._removed():
            self.id = other
            self._inside = self._places()
            return f"another cgroup is at {self.path}"
        self.visible = False
        if not was_visible:
            return ""
        return (
            f"the cgroup {self.path} is not to be seen, for no cgroup2 mount shows it: what is attached "
            "to it goes on, and could not be put back"
        )

    def _places(self) -> list[pathlib.PurePosixPath]:
        return [
            one.top / self.path.relative_to(one.point)
            for one in shown()
            if self.path.is_relative_to(one.point)
        ]


def _id(path: pathlib.Path) -> int:
    """The kernel's id of a cgroup: the number of its folder's inode, by whatever mount. Raises OSError."""
    return os.stat(path).st_ino


def _id_or_none(path: pathlib.Path) -> int | None:
    """The id of the cgroup at a path; None where there is none."""
    try:
        # Each cgroup but those of v1 has it, and no other folder.
        return _id(path) if (path / "cgroup.controllers").exists() else None
    except OSError:
        return None
