"""The datapath on this node: adopted as it stands, made anew, or replaced atomically.

Everything is pinned under one folder of a bpffs and outlives the agent:

    generations/NUMBER/...              maps, programs on them, and what they are
    links/NAME                          what holds each program at its hook
    links/device_IFINDEX_NAME           likewise, at a device
    current -> generations/NUMBER       replaced by rename: one step
    maps, programs, identity            the current generation's, for readers

Equal fingerprints: nothing is compiled, the agent takes over what runs. Otherwise
the next generation is made beside the current one: maps that still fit are pinned
in both, the contents of the others are copied. Then each link is switched to its
new program in one step, what happened meanwhile is made up for, and `current` is
pointed at the new generation.

Where the kernel refuses a program of the packet path, the generation is made with
those of the socket path alone, and its identity says why. Until something else is
wanted it is adopted like any other.

Whoever starts after a crash asks the kernel which programs the links hold. As
long as all are the current generation's, another one was only being made and goes.
Once any is another's, sockets are being recorded there: that upgrade is carried to
its end first, whatever is wanted now, and is then the current one.
"""

import errno
import os
import pathlib
import typing

import msgspec

from lbproxy import abi, errors
from lbproxy.core import fill
from lbproxy.kernel import (
    carry,
    device_links,
    generation,
    hooks,
    identity,
    libbpf,
    loader,
    programs,
    source,
)

# A smaller table could not hold what is in use.
_NEVER_SHRINK: typing.Final = (*fill.MUST_NOT_FILL, "earlier_slots")
_SHOWN: typing.Final = ("maps", "programs", identity.PIN)
NAMES: typing.Final = (*_SHOWN, "links", "generations", "current")


class Outcome(typing.NamedTuple):
    """What `ensure` did: `how` is 'created', 'adopted', 'relinked' or 'replaced'."""

    how: str
    identity: identity.Identity
    notes: tuple[str, ...]
    larger: tuple[str, ...] = ()  # tables that have more rows than was asked for, and how many


Steps = typing.Sequence[generation.Generation]  # each takes over from the one before


class Datapath:
    """The pins under one folder."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.maps_dir = root / "maps"
        self.programs_dir = root / "programs"
        self.links_dir = root / "links"
        self._hooks = hooks.Hooks(self.links_dir)
        self.device_links = device_links.DeviceLinks(self.links_dir)
        self._generations_dir = root / "generations"
        self._pointer = root / "current"
        self.problem = ""  # what `verify` found and could not put right
        self._fed: dict[str, int] = {}  # the maps that `ensure` handed out: names and the kernel's ids

    def ensure(self, cgroup: pathlib.Path, wanted: typing.Mapping[str, int]) -> Outcome:
        """Make these sizes and this version's programs run on `cgroup`. Raises AgentError."""
        try:
            return self._ensure(cgroup, wanted)
        except OSError as error:
            raise errors.AgentError(f"cannot set up the datapath in {self.root}: {error}") from error

    def _ensure(self, cgroup: pathlib.Path, wanted: typing.Mapping[str, int]) -> Outcome:
        self._lay_out()
        misplaced = [
            name
            for folder in self._generations_dir.iterdir()
            for name in generation.Generation(folder).remove_misplaced()
        ]
        finished = self._finish_interrupted(cgroup)
        before = self._current()
        self._remove_others(before)
        known = before.identity() if before is not None else None
        sizes, larger = _sizes(wanted, known)
        notes: tuple[str, ...] = ()
        if misplaced:
            names = ", ".join(misplaced)
            notes += (f"somebody had pinned something else in the place of {names}: it was removed",)
        if finished:
            notes += ("an upgrade that had been interrupted was finished",)
        fingerprint = source.fingerprint(programs.SOURCE, sizes)
        target = identity.of_this_version(fingerprint, str(cgroup), sizes)

        if before and known and known.fingerprint == fingerprint and before.is_whole():
            how = finished or "adopted"
            if self._hooks.missing(cgroup.stat().st_ino, before):
                how = "relinked"
                self._hooks.switch(cgroup, before)
            if known.cgroup != target.cgroup:
                if how == "adopted":
                    notes += (f"the cgroup that was at {known.cgroup} is at {cgroup} now",)
                known = msgspec.structs.replace(target, refused=known.refused)
                identity.write(before.folder, known)
            serving = before
        else:
            how = "created" if before is None else "replaced"
            steps, known = self._make_steps(target, before)
            if known.refused and (lost := self.device_links.held()):
                count = len({held.attachment.ifindex for held in lost})
                notes += (f"what served {count} devices is detached: there is no successor",)
            serving = self._go_through(before, steps, cgroup)
        self._remove_strangers(serving)
        self._fed = _ids_of_this_version(serving)
        return Outcome(how, known, notes, larger)

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows the current tables have. Raises AgentError where they are gone."""
        return dict(self._known_current()[1].sizes)

    def prepare(self, larger: typing.Mapping[str, int]) -> Steps:
        """Make a generation in which these tables have so many rows; nothing runs it yet.

        Before it there may be others to go through. Raises AgentError where it can not be made: what
        there is goes on, and it is removed.
        """
        current, known = self._known_current()
        self._remove_others(current)
        sizes = {**known.sizes, **larger}
        target = identity.of_this_version(source.fingerprint(programs.SOURCE, sizes), known.cgroup, sizes)
        try:
            made, found = self._make_steps(target, current)
            if found.refused and not known.refused:
                raise errors.AgentError(found.refused)
        except (OSError, errors.AgentError) as error:
            self._remove_others(current)
            raise errors.AgentError(f"cannot make larger tables: {error}") from error
        return made

    def take_over(self, made: Steps, cgroup: pathlib.Path) -> identity.Identity:
        """Have what was prepared serve, with the contents of the tables; nobody may write to them meanwhile.

        Raises AgentError where that fails half way: the next start ends it.
        """
        current, _ = self._known_current()
        try:
            serving = self._go_through(current, made, cgroup)
            self._fed = _ids_of_this_version(serving)
        except OSError as error:
            raise errors.AgentError(f"cannot put larger tables into use: {error}") from error
        found = serving.identity()
        assert found is not None
        return found

    def _known_current(self) -> tuple[generation.Generation, identity.Identity]:
        current = self._current()
        known = current.identity() if current is not None else None
        if current is None or known is None:
            raise errors.AgentError(f"what was pinned in {self.root} is gone")
        return current, known

    def verify(self, cgroup: pathlib.Path, cgroup_id: int | None = None) -> list[str]:
        """Put back any hook that someone took away; returns the names of those.

        `cgroup_id` is the kernel's, where the folder may not be seen just now or another one may be at
        its path: nothing is attached there.

        Raises AgentError where the maps and programs themselves are gone: only the
        next start can make them anew. Raises OSError where a hook can not be put back.
        """
        current = self._current()
        if current is None or not current.is_whole() or _ids_of_this_version(current) != self._fed:
            raise errors.AgentError(
                f"what this agent pinned in {self.root} is gone or was exchanged: ending, to set it up again"
            )
        lost = self._lay_out()
        if cgroup_id is None:
            cgroup_id = cgroup.stat().st_ino if cgroup.exists() else 0
        unhooked = self._hooks.missing(cgroup_id, current)
        try:
            if unhooked:
                self._hooks.switch(cgroup, current, cgroup_id)
        except OSError as error:
            self.problem = f"hooks are missing and can not be put back: {', '.join(unhooked)}: {error}"
            raise
        self.problem = ""
        return lost + unhooked

    def lost_cgroup(self) -> bool:
        """Whether the cgroup that the hooks were at was removed."""
        return self._hooks.lost_cgroup()

    def moved(self, cgroup: pathlib.Path) -> None:
        """Note down where the cgroup is seen now, for the read-side commands. Raises OSError, AgentError."""
        current, known = self._known_current()
        if known.cgroup == str(cgroup):
            return
        identity.write(current.folder, msgspec.structs.replace(known, cgroup=str(cgroup)))

    def attach(self, wanted: typing.Iterable[device_links.Attachment]) -> device_links.Applied:
        """Have the current programs at these devices, and at no others. Raises OSError."""
        current = self._current()
        if current is None:
            raise FileNotFoundError(errno.ENOENT, "the programs are gone")
        return self.device_links.apply(wanted, current)

    # --- generations ---

    def _lay_out(self) -> list[str]:
        """Create the folders, and what readers open; returns the names of what was missing."""
        missing = []
        for folder in (self._generations_dir, self.links_dir):
            if not folder.is_dir():
                folder.mkdir()
                missing.append(folder.name)
        for name in _SHOWN:
            path, shown = self.root / name, f"{self._pointer.name}/{name}"
            if path.is_symlink() and os.readlink(path) == shown:
                continue
            generation.remove(path)
            path.symlink_to(shown)
            missing.append(name)
        return missing

    def _current(self) -> generation.Generation | None:
        """The generation that readers are shown; None where there is none or it can not be understood."""
        if not self._pointer.is_symlink():
            return None
        current = generation.Generation(self.root / os.readlink(self._pointer))
        return current if current.identity() is not None else None

    def _make_steps(
        self, target: identity.Identity, before: generation.Generation | None
    ) -> tuple[Steps, identity.Identity]:
        """Make a generation that nothing runs yet; and one to go before it where flows are to be moved."""
        steps = []
        if before is not None and _must_move(before, target):
            between = msgspec.structs.replace(target, fingerprint=f"{target.fingerprint}-moving")
            made, found = self._make(between, before, moves=True)
            if found.refused:
                # Flows are copied then, as between layouts.
                generation.remove(made.folder)
            else:
                steps.append(made)
                before = made
        made, found = self._make(target, before)
        return [*steps, made], found

    def _go_through(
        self, before: generation.Generation | None, steps: Steps, cgroup: pathlib.Path
    ) -> generation.Generation:
        for step in steps:
            self._hand_over(before, step, cgroup)
            before = step
        self._remove_others(steps[-1])
        return steps[-1]

    def _make(
        self, target: identity.Identity, before: generation.Generation | None, *, moves: bool = False
    ) -> tuple[generation.Generation, identity.Identity]:
        """Make a generation that nothing runs yet; of the one before it keeps the maps that fit.

        Returns what it has become, too: it may lack the packet path.
        """
        numbers = [int(path.name) for path in self._generations_dir.iterdir() if path.name.isdecimal()]
        made = generation.Generation(self._generations_dir / str(max(numbers, default=0) + 1))
        made.make(target)
        for spec in abi.MAPS.values():
            if before is None or not _pin_again(spec, before, made, target):
                generation.create(made.maps_dir, spec, abi.map_rows(spec, target.sizes))
        generation.create(made.maps_dir, generation.TAILS, len(programs.TAILS))
        pins = {name: str(made.maps_dir / name) for name in abi.MAPS}
        if before is not None and moves:
            pins[abi.FLOWS_BEFORE] = str(made.maps_dir / abi.FLOWS_BEFORE)
            with generation.opened(before.maps_dir / "flows") as fd:
                libbpf.obj_pin(fd, pins[abi.FLOWS_BEFORE])
        refused = loader.compile_and_pin(
            source.compose(programs.SOURCE, target.sizes, pins),
            {program.name: str(made.programs_dir / program.name) for program in programs.of_this_kernel()},
            (*programs.TAILS, *programs.PACKET),
        )
        if refused:
            target = msgspec.structs.replace(target, refused=refused)
            identity.write(made.folder, target)
        return made, target

    def _hand_over(
        self,
        old: generation.Generation | None,
        new: generation.Generation,
        cgroup: pathlib.Path,
        *,
        begun: bool = False,
    ) -> None:
        """Switch every hook to the new generation, contents first; `begun` by a process that was killed."""
        if old is None:
            self._switch(cgroup, new)
        else:
            with carry.Transfer(old, new) as transfer:
                if not begun:
                    transfer.begin()
                self._switch(cgroup, new)
                transfer.end()
        fresh = self.root / (hooks.NEW + self._pointer.name)
        generation.remove(fresh)
        fresh.symlink_to(new.folder.relative_to(self.root))
        fresh.rename(self._pointer)

    def _switch(self, cgroup: pathlib.Path, wanted: generation.Generation) -> None:
        # Flows that begin or end between the copy and the switch have to be made up for: these come first.
        self.device_links.switch(wanted)
        self._hooks.switch(cgroup, wanted)

    def _finish_interrupted(self, cgroup: pathlib.Path) -> str:
        """End what was interrupted after its first hook was switched; returns how, as `Outcome` has it."""
        current = self._current()
        running = self._hooks.running()
        for folder in self._generations_dir.iterdir():
            found = generation.Generation(folder)
            if (
                (current is None or folder != current.folder)
                and running & {info.id for info in found.programs().values()}
                and found.identity() is not None
                and not found.strangers()
            ):
                self._hand_over(current, found, cgroup, begun=True)
                return "created" if current is None else "replaced"
        return ""

    # --- leftovers ---

    def _remove_others(self, current: generation.Generation | None) -> None:
        """Remove every generation but one: none of their programs runs."""
        for folder in self._generations_dir.iterdir():
            if current is None or folder != current.folder:
                generation.remove(folder)

    def _remove_strangers(self, serving: generation.Generation) -> None:
        """Remove what an interrupted or an earlier version left beside what is used now."""
        names = {program.name for program in programs.of_this_kernel()}
        devices = {held.attachment.pin for held in self.device_links.held()}
        hooked = {program.name for program in programs.SOCKET}
        for folder, known in (
            (self.links_dir, hooked | devices),
            (serving.programs_dir, names),
            (serving.maps_dir, abi.MAPS.keys() | {abi.TAILS}),
            (serving.folder, set(_SHOWN)),
        ):
            for path in folder.iterdir():
                if path.name not in known:
                    generation.remove(path)
        generation.remove(self.root / (hooks.NEW + self._pointer.name))


def _sizes(
    wanted: typing.Mapping[str, int], before: identity.Identity | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """What is wanted, but that a table in use is not made smaller; and those that are larger for that."""
    sizes = {name: wanted[name] for name in abi.row_names()}
    larger = []
    for name in _NEVER_SHRINK:
        old = before.sizes.get(name, 0) if before is not None else 0
        if old > sizes[name]:
            larger.append(f"{name} {old}")
            sizes[name] = old
    return sizes, tuple(larger)


def _pin_again(
    spec: abi.MapSpec, old: generation.Generation, new: generation.Generation, target: identity.Identity
) -> bool:
    """Pin a map of the old generation in the new one too, if there is one that fits."""
    before, path = old.identity(), old.maps_dir / spec.name
    if before is None or not path.exists() or not _same_layout(spec, before, target):
        return False
    with generation.opened(path) as fd:
        if not _fits(spec, abi.map_rows(spec, target.sizes), libbpf.map_info(fd)):
            return False
        libbpf.obj_pin(fd, str(new.maps_dir / spec.name))
        return True


def _must_move(before: generation.Generation, target: identity.Identity) -> bool:
    """Whether the table of flows gets another size and no other layout, under programs that use it."""
    known, spec = before.identity(), abi.MAPS["flows"]
    return (
        known is not None
        and not known.refused
        and (before.maps_dir / spec.name).exists()
        and known.sizes.get(spec.name) != target.sizes[spec.name]
        and _same_layout(spec, known, target)
    )


def _fits(spec: abi.MapSpec, rows: int, info: libbpf.MapInfo) -> bool:
    return (info.type, info.key_size, info.value_size, info.max_entries, info.flags) == (
        libbpf.MAP_TYPES[spec.type],
        spec.key_size,
        spec.value_size,
        rows,
        spec.flags,
    )


def _same_layout(spec: abi.MapSpec, before: identity.Identity, target: identity.Identity) -> bool:
    return (
        before.abi_version == target.abi_version
        and all(before.structs.get(name) == target.structs.get(name) for name in (spec.key, spec.value))
        and before.maps.get(spec.name) == target.maps.get(spec.name)
    )


def _ids_of_this_version(serving: generation.Generation) -> dict[str, int]:
    return {name: number for name, number in serving.map_ids().items() if name in abi.MAPS}
