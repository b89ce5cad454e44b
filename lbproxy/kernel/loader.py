"""Compiles the programs in processes of their own, has the kernel verify them, and pins them.

The only module that imports bcc: whoever does keeps its compiler in memory for
ever. It runs itself as a child, hands it a job as JSON on standard input and reads
bytecode back, which is kept: a start with the same sources and sizes needs no
compiler at all.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import json
import logging
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import typing

from lbproxy import abi, errors
from lbproxy.kernel import btf, bytecode, libbpf, map_rows, programs

_log = logging.getLogger(__name__)
_WITH_BTF: typing.Final = "#define LB_BTF 1\n"
_WITHOUT_BTF: typing.Final = "#define LB_BTF 0\n"
_TIMEOUT_S = 120
# Not about the program: it may load the next time.
_NOT_NOW: typing.Final = (errno.EPERM, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
_VERIFIED_AT_ONCE: typing.Final = 2
_COMPLAINT_CHARS: typing.Final = 500
_MOVING: typing.Final = abi.constant("MOVING")
_MOST_UNASSURED: typing.Final = abi.constant("MOST_UNASSURED")
_PR_SET_PDEATHSIG = 1
_INTERESTING = re.compile(
    r"error:|warning:|unknown func|invalid|R\d+ .*!|too large|permission", re.IGNORECASE
)


class Wanted(typing.NamedTuple):
    """A program to load, and the absolute path to pin it at."""

    function: str
    type: int
    hook: int
    pin: str


class Job(typing.TypedDict):
    """What the child is to do: `programs` are `Wanted`, as lists; `part` is LB_PART.

    It loads and pins them, or with `emit` answers with their bytecode: by function,
    the code in base 64 and which of its instructions refer to which maps.
    """

    source: str
    part: int
    programs: typing.Sequence[Wanted]
    emit: bool
    own_maps: typing.Sequence[str]  # that the source makes itself, beside the datapath's


class _RefusedError(errors.AgentError):
    """The kernel does not take `program`, and why; `for_good` if it will not at another time either."""

    def __init__(self, program: programs.Program, error: libbpf.RefusedError) -> None:
        self.program = program
        self.why = _summary(error.log)[:_COMPLAINT_CHARS]
        self.for_good = error.errno not in _NOT_NOW
        super().__init__(f"cannot load the BPF programs: {self.why}")


def compile_and_pin(
    source: str, pins: dict[str, str], may_lack: typing.Iterable[programs.Program] = ()
) -> str:
    """Compile the datapath, load the programs that `pins` names and pin each at its path.

    Where the kernel refuses one of `may_lack`, all the others are pinned; returns why,
    and nothing where it takes all. Raises AgentError with the compiler's or the
    verifier's first complaints.
    """
    known = {program.name: program for program in programs.PROGRAMS}
    wanted = [known[name] for name in pins]
    source = _as_described(source)
    key = _key(source, wanted)
    for kept in (bytecode.shipped(shipped_key(source)), bytecode.read(key)):
        if kept is not None:
            # Whatever is wrong with that copy, the sources are here.
            with contextlib.suppress(errors.AgentError, KeyError, ValueError):
                _load_all(source, wanted, kept, pins)
                return ""
    made = compiled(source, wanted)
    why = ""
    try:
        _load_all(source, wanted, made, pins)
    except _RefusedError as error:
        lacking = tuple(may_lack)
        if error.program not in lacking or not error.for_good:
            raise
        why = f"{error.program.name}: {error.why}"
        _load_all(source, [program for program in wanted if program not in lacking], made, pins)
    bytecode.write(key, made)
    return why


def candidates(
    source: str, wanted: typing.Sequence[programs.Program], own_maps: typing.Sequence[str]
) -> typing.Iterator[bytecode.Programs]:
    """Compiled copies of a source, the cheapest first; who takes none of those that are kept has it compiled.

    Raises AgentError.
    """
    key = _key(source, wanted)
    for kept in (bytecode.shipped(shipped_key(source)), bytecode.read(key)):
        if kept is not None:
            yield kept
    made = compiled(source, wanted, own_maps)
    bytecode.write(key, made)
    yield made


def kept(source: str) -> bytecode.Programs | None:
    """What is there of a source for this kernel, compiled; None where a start would compile."""
    return bytecode.shipped(shipped_key(source)) or bytecode.read(_key(source, programs.of_this_kernel()))


def linked(code: bytecode.Programs, program: programs.Program, maps: typing.Mapping[str, int]) -> bytes:
    """A program's bytecode on these maps. Raises AgentError for a copy that does not have it."""
    try:
        return _linked(code[program.function], maps)
    except (KeyError, ValueError) as error:
        raise errors.AgentError(f"a compiled copy lacks {error}") from error


def shipped_key(source: str) -> str:
    """What names the compiled programs of a source in an installed package."""
    return bytecode.shipped_key(source, _cflags(0))


def trial(code: bytecode.Programs, maps: typing.Mapping[str, int]) -> dict[programs.Program, str]:
    """Have the kernel verify programs on these maps, by name; returns which it refuses, and why.

    They are neither attached nor pinned, and gone when this returns.
    """
    refused = {}
    for program in programs.of_this_kernel():
        try:
            os.close(load_one(program, _linked(code[program.function], maps)))
        except _RefusedError as error:
            refused[program] = error.why
    return refused


def _linked(program: bytecode.Program, maps: typing.Mapping[str, int]) -> bytes:
    if "flows" in maps:
        maps = {abi.FLOWS_BEFORE: maps["flows"], **maps}
        program = program._replace(code=bytecode.with_numbers(program.code, _numbers(maps)))
    code = bytecode.linked(program, maps)
    # Asked for only by the program that needs it: the answer takes a while.
    if bytecode.with_sk_err(code, 0) == code:
        return code
    return bytecode.with_sk_err(code, btf.offset("sock", "sk_err"))


def _numbers(maps: typing.Mapping[str, int]) -> dict[int, int]:
    """What the programs know of the tables that they are loaded on, by what stands for it in the code."""
    flows = libbpf.map_info(maps["flows"])
    return {
        _MOVING: int(libbpf.map_info(maps[abi.FLOWS_BEFORE]).id != flows.id),
        _MOST_UNASSURED: flows.max_entries // 2,
    }


def _as_described(source: str) -> str:
    """The source as for a kernel without BTF, where this one's does not say what the programs would read.

    Else they would read nothing: no failed connection would ever be seen.
    """
    if _WITH_BTF not in source or btf.offset("sock", "sk_err") is not None:
        return source
    _log.warning(
        "this kernel's description of itself (BTF) does not say where a socket's error is: how connections "
        "end is told by their states, as without it"
    )
    return source.replace(_WITH_BTF, _WITHOUT_BTF)


def _key(source: str, wanted: typing.Iterable[programs.Program]) -> str:
    return bytecode.key(source, [program.function for program in wanted], _cflags(0))


def _load_all(
    source: str,
    wanted: typing.Sequence[programs.Program],
    code: bytecode.Programs,
    pins: typing.Mapping[str, str],
) -> None:
    """Have the kernel verify programs, put those that are called where they are called, and pin all."""
    with contextlib.ExitStack() as stack:
        maps: dict[str, int] = {}
        for name, path in bytecode.pinned_maps(source).items():
            maps[name] = libbpf.obj_get(path)
            stack.callback(os.close, maps[name])
        linked = {program: _linked(code[program.function], maps) for program in wanted}
        loaded = _verified(linked, stack)
        for number, program in enumerate(programs.TAILS):
            if program in loaded:
                map_rows.update(maps[abi.TAILS], _u32(number), _u32(loaded[program]))
        for program, fd in loaded.items():
            pathlib.Path(pins[program.name]).parent.mkdir(parents=True, exist_ok=True)
            libbpf.obj_pin(fd, pins[program.name])


def _verified(
    linked: typing.Mapping[programs.Program, bytes], stack: contextlib.ExitStack
) -> dict[programs.Program, int]:
    """The descriptors of programs, which `stack` closes; two are verified at a time, the longest first.

    Raises what went wrong with the first that could not be loaded.
    """
    loaded: dict[programs.Program, int] = {}
    refused: dict[programs.Program, errors.AgentError] = {}

    def verify(program: programs.Program) -> None:
        try:
            loaded[program] = load_one(program, linked[program])
        except errors.AgentError as error:
            refused[program] = error

    with concurrent.futures.ThreadPoolExecutor(_VERIFIED_AT_ONCE) as side_by_side:
        list(side_by_side.map(verify, sorted(linked, key=lambda one: len(linked[one]), reverse=True)))
    for fd in loaded.values():
        stack.callback(os.close, fd)
    for program in linked:
        if program in refused:
            raise refused[program]
    return {program: loaded[program] for program in linked}


def load(source: str, wanted: typing.Sequence[Wanted]) -> None:
    """Compile any `source`, load these of its functions and pin each. Raises AgentError."""
    _run(Job(source=source, part=1, programs=wanted, emit=False, own_maps=()))


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _hook(program: programs.Program) -> int:
    return program.attach_type if program.type != libbpf.PROG_TYPE_SCHED_CLS else 0


def compiled(
    source: str, wanted: typing.Sequence[programs.Program], own_maps: typing.Sequence[str] = ()
) -> bytecode.Programs:
    """Compile both parts side by side: most of a first start is this."""
    parts = (
        [program for program in wanted if program not in programs.TAILS],
        [program for program in wanted if program in programs.TAILS],
    )
    jobs = [
        Job(
            source=source,
            part=number,
            programs=[Wanted(one.function, one.type, _hook(one), "") for one in part],
            emit=True,
            own_maps=own_maps,
        )
        for number, part in enumerate(parts, 1)
        if part
    ]
    made: bytecode.Programs = {}
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as side_by_side:
        for answer in side_by_side.map(_run, jobs):
            made |= bytecode.decode(answer)
    return made


def load_one(program: programs.Program, code: bytes) -> int:
    """Have the kernel verify a program; returns its file descriptor. Raises AgentError."""
    try:
        return libbpf.prog_load(program.type, program.name, code, _hook(program))
    except libbpf.RefusedError as error:
        raise _RefusedError(program, error) from error


def _run(job: Job) -> str:
    """Run a child; returns what it answers."""
    done = subprocess.run(
        [sys.executable, "-m", "lbproxy.kernel.loader", str(os.getpid())],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env={**os.environ, "BCC_KERNEL_SOURCE": str(abi.source_dir() / "headers")},
    )
    if done.returncode != 0:
        raise errors.AgentError(f"cannot load the BPF programs: {_summary(done.stderr)}")
    return done.stdout


def _summary(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if _INTERESTING.search(line)][:3]
    return "; ".join(telling or lines[-1:] or ["the loader ended without a word"])


def _cflags(part: int) -> list[str]:
    triplet = f"{platform.machine()}-linux-gnu"
    return [
        f"-DLB_PART={part}",
        "-I/usr/include",
        f"-I/usr/include/{triplet}",
        # Describing types and lines to a debugger would take a quarter of the time.
        "-g0",
        "-Wall",
        "-Wextra",
        "-Werror",
        # What BCC's own helpers.h and its generated code trip over.
        "-Wno-unused-parameter",
        "-Wno-unused-function",
        "-Wno-sign-compare",
        "-Wno-macro-redefined",
        "-Wno-ignored-attributes",
        "-Wno-duplicate-decl-specifier",
        "-Wno-address-of-packed-member",
        "-Wno-compare-distinct-pointer-types",
        "-Wno-gnu-variable-sized-type-not-at-end",
        "-Wno-missing-field-initializers",
    ]


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends: the next agent's pins must not meet ours."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the agent has ended")


def _child() -> None:
    _end_with(int(sys.argv[1]))
    import bcc  # noqa: PLC0415 - see the module's docstring
    import bcc.libbcc  # noqa: PLC0415

    job: Job = json.load(sys.stdin)
    module = bcc.BPF(text=job["source"].encode(), cflags=_cflags(job["part"]))
    if job["emit"]:
        names = (*abi.MAPS, abi.TAILS, abi.FLOWS_BEFORE, *job["own_maps"])
        maps = {module[name.encode()].map_fd: name for name in names}
        compiled = {
            function: bytecode.unlinked(module.dump_func(function.encode()), maps)
            for function, *_ in job["programs"]
        }
        print(bytecode.encode(compiled))
        return
    for function, kind, hook, path in job["programs"]:
        loaded = module.load_func(function.encode(), kind, attach_type=hook)
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        if bcc.libbcc.lib.bpf_obj_pin(loaded.fd, path.encode()) != 0:
            sys.exit(f"pin {path}: failed")


if __name__ == "__main__":
    _child()
