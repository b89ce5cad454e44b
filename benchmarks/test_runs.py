"""BPF_PROG_TEST_RUN on pinned programs, each behind the wrapper of its kind (`wrappers.c`).

The kernel runs a program on one packet many times over and says how long one run
took; without the wrapper every run but the first would see a packet that is
translated already.
"""

import collections.abc
import ctypes
import errno
import os
import pathlib
import struct
import typing

from benchmarks import frames
from lbproxy.kernel import libbpf, loader, map_rows
from lbproxy.lab import prog_test_run

_LIB = ctypes.CDLL("libbpf.so.1", use_errno=True)
_SOURCE = pathlib.Path(__file__).with_name("wrappers.c")
_RECIPE = struct.Struct("=80sIIIIIIIIIxxxx")
HEAD = 80
PORTS = 1 << 14  # LB_BENCH_PORTS_BITS
EVERY_FLOW = 0xFFFFFFFF

NEXT, DROP, REDIRECT = 0xFFFFFFFF, 2, 7  # what tc programs return
XDP_PASS, XDP_TX = 2, 3
KINDS: typing.Final = ("tc", "xdp")
_ROOM = 256


class Outcome(typing.NamedTuple):
    """What a program made of a packet."""

    verdict: int
    frame: bytes


Flows = collections.abc.Callable[[int], frames.Ends]  # the packet of the flow with this number, from 0


class Runner:
    """The pinned programs, and a wrapper for each kind. To be used in the devices' namespace."""

    def __init__(self, folder: pathlib.Path, datapath: dict[str, pathlib.Path]) -> None:
        """Compile the wrappers into `folder`; `datapath` are pins of programs by name. Raises AgentError."""
        tables = {"recipes": ("array", _RECIPE.size)} | {f"to_{kind}": ("prog", 4) for kind in KINDS}
        self._tables: dict[str, int] = {}
        for name, (kind, size) in tables.items():
            self._tables[name] = libbpf.map_create(kind, name, 4, size, 1, 0)
            libbpf.obj_pin(self._tables[name], str(folder / name))
        head = "".join(f'#define LB_BENCH_{name} "{folder / name}"\n' for name in tables)
        types = {"tc": (libbpf.PROG_TYPE_SCHED_CLS, 0), "xdp": (libbpf.PROG_TYPE_XDP, libbpf.XDP)}
        wanted = {kind: (f"bench_{kind}", *of) for kind, of in types.items()}
        wanted |= {nothing(kind): (f"bench_nothing_{kind}", *of) for kind, of in types.items()}
        pins = {name: folder / f"bench_{name}" for name in wanted}
        loader.load(
            head + _SOURCE.read_text(),
            [loader.Wanted(*what, str(pins[name])) for name, what in wanted.items()],
        )
        self._programs = {name: libbpf.obj_get(str(path)) for name, path in (pins | datapath).items()}

    def close(self) -> None:
        """Let go of everything; the pins stay."""
        for fd in (*self._programs.values(), *self._tables.values()):
            os.close(fd)

    def once(self, program: str, frame: bytes, ifindex: int) -> Outcome:
        """Run a program on a frame, without a wrapper."""
        out = ctypes.create_string_buffer(len(frame) + _ROOM)
        options = self._options(program, frame, ifindex, 1)
        options.data_out = ctypes.addressof(out)
        options.data_size_out = len(out)
        self._run(self._programs[program], options)
        return Outcome(options.retval, out.raw[: options.data_size_out])

    def prepare(self, program: str, frame: bytes, of: Flows, flows: int) -> None:
        """Have a program's wrapper send it packets of so many flows in turn (0: each of a new one).

        `frame` is that of flow 0, and `of` is taken to go on as it begins: PORTS ports of
        each address.
        """
        first, address, port = of(0), of(PORTS), of(1)
        ipv4 = frames.is_ipv4(first)
        moving = [
            (frames.word_at(ipv4, source), int.from_bytes(end[-4:], "big"))
            for source, end, other in (
                (True, first.src, address.src), (False, first.dst, address.dst)
            )
            if end != other
        ] or [(frames.word_at(ipv4, True), int.from_bytes(first.src[-4:], "big"))]  # fmt: skip
        source = first.sport != port.sport
        recipe = _RECIPE.pack(
            frame[:HEAD],
            len(frame),
            flows - 1 if flows else EVERY_FLOW,
            *moving[0],
            *moving[-1],
            frames.port_at(ipv4, source),
            first.sport if source else first.dport,
            0,
        )
        map_rows.update(self._tables["recipes"], bytes(4), recipe)
        target = self._programs[program]
        map_rows.update(self._tables[f"to_{kind_of(program)}"], bytes(4), target.to_bytes(4, "little"))

    def repeat(self, program: str, frame: bytes, ifindex: int, times: int) -> tuple[int, int]:
        """Run what was prepared so many times; returns the last verdict and ns a run."""
        options = self._options(kind_of(program), frame, ifindex, times)
        self._run(self._programs[kind_of(program)], options)
        return options.retval, options.duration

    def singly(
        self, program: str, packets: collections.abc.Iterable[bytes], ifindex: int
    ) -> tuple[set[int], list[int]]:
        """Run a program once on each of these, without a wrapper; returns the verdicts and ns of each."""
        verdicts, ns = set(), []
        for frame in packets:
            options = self._options(program, frame, ifindex, 1)
            self._run(self._programs[program], options)
            verdicts.add(options.retval)
            ns.append(options.duration)
        return verdicts, ns

    def _options(self, program: str, frame: bytes, ifindex: int, times: int) -> prog_test_run.Options:
        context: ctypes.Structure = prog_test_run.Skb(ifindex=ifindex)
        if kind_of(program) == "xdp":
            context = prog_test_run.XdpMd(data_end=len(frame), ingress_ifindex=ifindex)
        self._context = context  # the kernel reads it later
        return prog_test_run.Options(
            sz=ctypes.sizeof(prog_test_run.Options),
            data_in=frame,
            data_size_in=len(frame),
            ctx_in=ctypes.addressof(context),
            ctx_size_in=ctypes.sizeof(context),
            repeat=times,
        )

    def _run(self, fd: int, options: prog_test_run.Options) -> None:
        while _LIB.bpf_prog_test_run_opts(fd, ctypes.byref(options)) < 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, f"test run: {os.strerror(number)}")


def nothing(kind: str) -> str:
    """Return the name of the program of this kind that returns at once."""
    return f"nothing_{kind}"


def kind_of(program: str) -> str:
    """Return which wrapper a program goes behind."""
    for kind in KINDS:
        if program in (kind, nothing(kind)):
            return kind
    return "xdp" if program.startswith("xdp") else "tc"


def empty(fd: int) -> None:
    """Remove all rows of a hash map."""
    info = libbpf.map_info(fd)
    for keys in [keys for keys, _ in map_rows.batches(fd, info)]:
        count = ctypes.c_uint32(len(keys) // info.key_size)
        if count.value and _LIB.bpf_map_delete_batch(fd, keys, ctypes.byref(count), None) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"empty {info.name}: {os.strerror(number)}")
