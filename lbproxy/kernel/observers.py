"""The observers of `lbproxy trace`: loaded, attached beside lbproxy's programs, and gone with the process.

Nothing is pinned: the kernel detaches a link whose last descriptor is closed, also where
the process that held it was killed.
"""

import contextlib
import errno
import os
import pathlib
import types
import typing

from lbproxy import abi, errors, trace_abi
from lbproxy.core import tables
from lbproxy.kernel import (
    device_links,
    generation,
    identity,
    libbpf,
    loader,
    map_rows,
    programs,
    ring_buffer,
    source,
    trials,
)

SOURCE: typing.Final = "trace.c"
_ADDR: typing.Final = libbpf.PROG_TYPE_CGROUP_SOCK_ADDR
_TC: typing.Final = libbpf.PROG_TYPE_SCHED_CLS
# The first to be attached is the last to hear of a connection, so that none is seen by halves.
SOCKET: typing.Final = (
    programs.Program("trace_release", libbpf.PROG_TYPE_CGROUP_SOCK, 34),
    programs.Program("trace_tcp", libbpf.PROG_TYPE_SOCK_OPS, 3),
    programs.Program("trace_sendmsg4", _ADDR, 14),
    programs.Program("trace_sendmsg6", _ADDR, 15),
    programs.Program("trace_connect4", _ADDR, 10),
    programs.Program("trace_connect6", _ADDR, 11),
)
_SIDES: typing.Final = {libbpf.BEFORE: "before", libbpf.AFTER: "after"}
_WAYS: typing.Final = {libbpf.TCX_INGRESS: "ingress", libbpf.TCX_EGRESS: "egress"}
PACKET: typing.Final = {
    (attach_type, side): programs.Program(f"trace_{when}_{way}", _TC, attach_type)
    for attach_type, way in _WAYS.items()
    for side, when in _SIDES.items()
}
_CURRENT_PID: typing.Final = 14  # the helper bpf_get_current_pid_tgid
_ATTACH_TYPES: typing.Final = {one.name: one.attach_type for one in programs.PACKET}


def compose(sizes: typing.Mapping[str, int]) -> str:
    """The text to compile, for a datapath of these sizes.

    Only that of `sockets` is known to programs; the others are of maps that go when it is compiled.
    """
    rows = {name: sizes[name] if name == "sockets" else _FEW_ROWS for name in abi.row_names()}
    head = [f"#define LB_ROWS_{name.upper()} {count}" for name, count in rows.items()]
    text = "\n".join(head) + "\n" + source.flatten(SOURCE)
    return f'{text}\n#line 1 "abi.py"\n{abi.assertions()}{trace_abi.assertions()}'


_FEW_ROWS: typing.Final = 64


def all_programs() -> tuple[programs.Program, ...]:
    """Every observer."""
    return (*SOCKET, *PACKET.values())


def check_kernel() -> None:
    """Raise UnsupportedKernel where observers can not tell who connects."""
    if trials.helper(_ADDR, _CURRENT_PID) is False:
        raise errors.UnsupportedKernel(
            "programs of a cgroup that may ask which process they run for", "6.1", "trace needs them"
        )


def _generation(root: pathlib.Path) -> str:
    try:
        return os.readlink(root / "current")
    except OSError:
        return ""


class Observers:
    """Observers of the datapath in a folder of pins, from `with` to its end.

    `filter_row` is a packed `trace_filter`; `services` are the numbers of services to follow,
    `netns` the cookies of network namespaces whose sockets are followed, where it asks for these.
    `watched` names the devices whose packets are seen, by number; `problems` says what could
    not be watched.
    """

    def __init__(
        self,
        root: pathlib.Path,
        known: identity.Identity,
        filter_row: bytes,
        services: typing.Iterable[int] = (),
        netns: typing.Iterable[int] = (),
    ) -> None:
        self._root = root
        self._known = known
        self._filter = filter_row
        self._rows = {
            "trace_services": [tables.row_key(number) for number in services],
            "trace_netns": [cookie.to_bytes(8, tables.BYTE_ORDER) for cookie in netns],
        }
        self._stack = contextlib.ExitStack()
        self._own: dict[str, int] = {}
        self._generation = _generation(root)
        self.watched: set[int] = set()
        self.problems: list[str] = []

    def __enter__(self) -> "Observers":
        try:
            check_kernel()
            with contextlib.ExitStack() as while_loading:
                self._start(while_loading)
        except OSError as error:
            self._stack.close()
            raise errors.AgentError(f"cannot watch: {error.strerror or error}") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._stack.close()

    def ring(self) -> ring_buffer.Ring:
        """The reading end of what they tell; closed with this."""
        ring = ring_buffer.Ring(self._own["trace_events"])
        self._stack.callback(ring.close)
        return ring

    def outlived(self) -> bool:
        """Whether another generation of the datapath has come, by an upgrade or for larger maps."""
        return self._generation != _generation(self._root)

    def lost(self) -> int:
        """How many events nobody was told of: too many in a second, or the ring was full."""
        row = map_rows.lookup(
            self._own["trace_cpus"], tables.row_key(0), trace_abi.CPU.size * abi.possible_cpus()
        )
        size, at = trace_abi.CPU.size, trace_abi.CPU.names.index("lost")
        rows = (row[start : start + size] for start in range(0, len(row), size)) if row else ()
        return sum(int(trace_abi.CPU.unpack(one)[at]) for one in rows)

    # --- starting ---

    def _start(self, while_loading: contextlib.ExitStack) -> None:
        for name, spec in trace_abi.MAPS.items():
            fd = libbpf.map_create(spec.type, name, spec.key_size, spec.value_size, spec.rows, 0)
            self._own[name] = self._keep(fd)
        map_rows.update(self._own["trace_filter"], tables.row_key(0), self._filter)
        for name, keys in self._rows.items():
            for key in keys[: trace_abi.MAPS[name].rows]:
                map_rows.update(self._own[name], key, tables.row_key(1))
        links = self._device_links()
        wanted = (*SOCKET, *(PACKET.values() if links else ()))
        loaded = self._load(wanted, while_loading)
        self._watch_sockets(loaded)
        for held in links:
            self._watch_device(held, loaded)

    def _keep(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _device_links(self) -> list[device_links.Held]:
        held = device_links.DeviceLinks(self._root / "links").held()
        return [one for one in held if one.alive and _ATTACH_TYPES[one.attachment.program] in _WAYS]

    def _load(
        self, wanted: typing.Sequence[programs.Program], while_loading: contextlib.ExitStack
    ) -> dict[str, int]:
        pins = {name: str(self._root / "maps" / name) for name in abi.MAPS}
        text = compose(self._known.sizes)
        maps = dict(self._own)
        for name, path in pins.items():
            maps[name] = libbpf.obj_get(path)
            while_loading.callback(os.close, maps[name])
        refused: errors.AgentError | None = None
        for code in loader.candidates(text, all_programs(), tuple(trace_abi.MAPS)):
            try:
                loaded = {}
                for program in wanted:
                    loaded[program.name] = loader.load_one(program, loader.linked(code, program, maps))
                    while_loading.callback(os.close, loaded[program.name])
            except errors.AgentError as error:
                # Of a copy that this kernel does not take, or that is damaged, there is the source.
                refused = error
            else:
                return loaded
        raise refused or errors.AgentError("cannot load the observers")

    def _watch_sockets(self, loaded: typing.Mapping[str, int]) -> None:
        try:
            cgroup = os.open(self._known.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self.problems.append(f"sockets: {self._known.cgroup} can not be seen here: {error.strerror}")
            return
        try:
            if os.fstat(cgroup).st_ino != self._cgroup_id():
                self.problems.append(f"sockets: {self._known.cgroup} is another cgroup here than lbproxy's")
                return
            for program in SOCKET:
                self._keep(libbpf.link_create(loaded[program.name], cgroup, program.attach_type))
        finally:
            os.close(cgroup)

    def _cgroup_id(self) -> int:
        with generation.opened(self._root / "links" / programs.SOCKET[-1].name) as fd:
            return libbpf.link_info(fd).cgroup_id

    def _watch_device(self, held: device_links.Held, loaded: typing.Mapping[str, int]) -> None:
        ifindex, attach_type = held.attachment.ifindex, _ATTACH_TYPES[held.attachment.program]
        try:
            with generation.opened(self._root / "links" / held.attachment.pin) as link:
                for side in _SIDES:
                    fd = loaded[PACKET[attach_type, side].name]
                    self._keep(libbpf.link_beside(fd, ifindex, attach_type, side, link))
        except OSError as error:
            # The device may have gone this moment.
            if error.errno not in (errno.ENODEV, errno.ENOENT, errno.ENOLINK):
                self.problems.append(f"device {ifindex}: {error.strerror}")
            return
        self.watched.add(ifindex)
