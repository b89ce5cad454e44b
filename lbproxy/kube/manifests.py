"""Read the cluster from files instead of an API server, and follow their changes.

A file counts as a whole: while it can not be parsed, its last good state stays
in force. Files are compared by what `stat` says of them, several times a second:
that sees writes, renames over a file and the symbolic link swaps of a mounted
ConfigMap alike. A file is read once it has stopped changing between two looks,
so that one which is being written is not taken for one with objects removed.
Nor is one that has become empty: objects go with their file, or with their text.
"""

import asyncio
import dataclasses
import logging
import os
import pathlib
import time
import typing
from collections.abc import Awaitable, Callable, Iterator

from lbproxy.core import events
from lbproxy.kube import documents

SCAN_INTERVAL_S = 0.25
SCAN_SHARE = 0.05  # of the time: folders of many thousand files are looked at less often
LONGEST_INTERVAL_S = 0.4  # a change takes two looks and is to be in force within a second
LONGEST_SETTLING_SCANS = 3
FRESH_NS = 1_000_000_000
SUFFIXES = (".json", ".yaml", ".yml")

Emit = Callable[[list[events.Event]], None]
Key = tuple[events.Kind, events.ObjectName]
Decoded = events.Upsert | events.Rejected

_log = logging.getLogger(__name__)


class Signature(typing.NamedTuple):
    """What changes when a file does."""

    device: int
    inode: int
    changed_ns: int
    size_bytes: int


# Of what can not be looked at, such as a link that leads to itself: reading it says why.
_OUT_OF_REACH = Signature(0, 0, 0, 0)


@dataclasses.dataclass(slots=True)
class File:
    """A file as it was last read; `read_as` is None where it is to be read again in any case."""

    seen_as: Signature
    read_as: Signature | None = None
    unsettled_scans: int = 0
    parsed: tuple[documents.Document, ...] = ()
    cache: documents.Cache = dataclasses.field(default_factory=dict)
    problem: str = ""


@dataclasses.dataclass(slots=True)
class State:
    """How the source fares, for metrics; times are Unix seconds, 0 where never."""

    synced: bool = False
    files: int = 0
    reads: int = 0
    rejected: int = 0
    last_change_s: float = 0.0
    last_error: str = ""


class Manifests:
    """Emits what happens to the objects in a file, or in the files of a folder.

    Where several files hold the same object, the first by name is in force.
    """

    problem: typing.Final = ""  # what can not be read counts as rejected

    def __init__(
        self, path: pathlib.Path, emit: Emit, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.state = State()
        self._path = path
        self._emit = emit
        self._sleep = sleep
        self._files: dict[str, File] = {}
        self._in_force: dict[Key, events.Upsert | None] = {}
        self._rejected: set[events.Rejected] = set()
        self._passed_over: set[str] = set()

    async def run(self) -> typing.NoReturn:
        """Look for changes until cancelled."""
        while True:
            started_s = time.monotonic()
            batch = await asyncio.to_thread(self.look)
            if batch:
                self._emit(batch)
            took_s = time.monotonic() - started_s
            await self._sleep(min(max(SCAN_INTERVAL_S, took_s / SCAN_SHARE), LONGEST_INTERVAL_S))

    def look(self) -> list[events.Event]:
        """Return what has changed since the last look."""
        try:
            found = _scan(self._path)
        except OSError as error:
            reason = f"{error.strerror}; the last state stays in force"
            if self.state.last_error == reason:
                return []
            self.state.last_error = reason
            return [events.Rejected(*self._whole, reason)]
        back = self._back()
        self.state.last_error = ""
        first = not self.state.synced
        changed = [name for name, signature in found.items() if self._is_due(name, signature, now=first)]
        vanished = self._files.keys() - found.keys()
        for name in vanished:
            del self._files[name]
        for name in changed:
            self._read(name)
        self.state.files = len(self._files)
        if not (first or changed or vanished):
            return back
        self.state.last_change_s = time.time()
        batch = back + self._differences()
        if first:
            batch += [events.Synced(kind) for kind in documents.GROUPS]
            self.state.synced = True
        return batch

    @property
    def _whole(self) -> Key:
        return events.Kind.MANIFEST, events.ObjectName("", str(self._path))

    def _back(self) -> list[events.Event]:
        """What is to be told where the path was gone, and can be read again."""
        if not self.state.last_error:
            return []
        # A path that is a file may be at fault in another way, too, and that goes on.
        return [
            events.Accepted(*self._whole),
            *(known for known in self._rejected if _key(known) == self._whole),
        ]

    def _is_due(self, name: str, signature: Signature, *, now: bool) -> bool:
        """Whether a file is to be read: it differs from what was read and has settled, or never does."""
        file = self._files.get(name)
        if file is None:
            self._files[name] = File(signature)
            return now
        if signature == file.read_as:
            return False
        settled = signature == file.seen_as
        file.seen_as = signature
        file.unsettled_scans = 0 if settled else file.unsettled_scans + 1
        return settled or file.unsettled_scans >= LONGEST_SETTLING_SCANS

    def _read(self, name: str) -> None:
        file = self._files[name]
        # Writes within one tick of the file system's clock look alike: what is fresh is looked at again.
        fresh = not self.state.synced and time.time_ns() - file.seen_as.changed_ns < FRESH_NS
        file.read_as = None if fresh else file.seen_as
        file.unsettled_scans = 0
        self.state.reads += 1
        try:
            data = self._location(name).read_bytes()
            if not data and any(document.items for document in file.parsed):
                # Cut to nothing, and not yet written anew.
                file.problem = "empty: what was in it stays, until the file is removed or holds a comment"
                return
            file.parsed, file.cache = documents.load(data, json=name.endswith(".json"), cache=file.cache)
            file.problem = ""
        except documents.Malformed as error:
            file.problem = str(error)
        except OSError as error:
            file.problem = error.strerror or str(error)

    def _location(self, name: str) -> pathlib.Path:
        return self._path / name if self._path.is_dir() else self._path

    def _differences(self) -> list[events.Event]:
        """Return the events that lead from what is in force to what the files say now."""
        wanted: dict[Key, events.Upsert | None] = {}
        rejected: dict[events.Rejected, None] = {}
        owners: dict[Key, str] = {}
        for place, decoded in self._decoded():
            key = _key(decoded)
            if isinstance(decoded, events.Rejected):
                rejected[decoded] = None
                if decoded.kind in documents.GROUPS and key not in owners:
                    owners[key] = place
                    wanted[key] = self._in_force.get(key)
            elif key in owners:
                wanted[key] = _warned(wanted[key], f"ignored in {place}: it is already in {owners[key]}")
            else:
                owners[key] = place
                wanted[key] = decoded
        batch: list[events.Event] = [
            upsert
            for key, upsert in wanted.items()
            if upsert is not None and self._in_force.get(key) != upsert
        ]
        batch += [events.Delete(*key) for key in self._in_force.keys() - wanted.keys()]
        # A file that is repaired, or an object that is as it last was in force, shows in no other way.
        mended = {_key(rejection) for rejection in self._rejected} - {_key(one) for one in rejected}
        batch += [events.Accepted(*key) for key in sorted(mended)]
        batch += [rejection for rejection in rejected if rejection not in self._rejected]
        self.state.rejected += len(rejected.keys() - self._rejected)
        self._in_force, self._rejected = wanted, set(rejected)
        return batch

    def _decoded(self) -> Iterator[tuple[str, Decoded]]:
        """Yield every object of every file in name order with its place, and what is wrong with files."""
        for name, file in sorted(self._files.items()):
            whole = events.ObjectName("", str(self._location(name)))
            if file.problem:
                yield name, events.Rejected(events.Kind.MANIFEST, whole, file.problem)
            for document in file.parsed:
                place = f"{name} line {document.line}"
                for item in document.items:
                    match item.event:
                        case events.Upsert():
                            yield place, item.event
                        case events.Rejected(kind=events.Kind.MANIFEST, reason=reason):
                            yield (
                                place,
                                events.Rejected(
                                    events.Kind.MANIFEST, whole, f"line {document.line}: {reason}"
                                ),
                            )
                        case events.Rejected(reason=reason):
                            yield place, item.event._replace(reason=f"{reason} ({place})")
                        case None if item.kind not in self._passed_over:
                            self._passed_over.add(item.kind)
                            _log.info("%s: %s is not read", place, item.kind or "what has no kind")


def _key(decoded: Decoded) -> Key:
    return decoded.kind, decoded.name


def _warned(upsert: events.Upsert | None, warning: str) -> events.Upsert | None:
    if upsert is None or warning in upsert.warnings:
        return upsert
    return upsert._replace(warnings=(*upsert.warnings, warning))


def _scan(path: pathlib.Path) -> dict[str, Signature]:
    """Return the files to read by name."""
    if not path.is_dir():
        return {path.name: _signature(path.stat())}
    found: dict[str, Signature] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            # Hidden ones are the versions that a ConfigMap's links lead to, and editors' drafts.
            if entry.name.startswith(".") or not entry.name.endswith(SUFFIXES):
                continue
            # A file may go between the two, and a link may lead nowhere.
            try:
                if entry.is_file():
                    found[entry.name] = _signature(entry.stat())
            except FileNotFoundError:
                continue
            except OSError:
                found[entry.name] = _OUT_OF_REACH
    return found


def _signature(status: os.stat_result) -> Signature:
    return Signature(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
