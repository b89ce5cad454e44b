"""The lab's traffic program (`lbproxy/lab/load/*.c`): building it, its command lines and its results.

`serve` answers every request with its name; the other modes are clients that
count who answered, what failed and how long it took. `bulk` asks only once: after
all that it sends in its time, how much of it the server read.
"""

import collections.abc
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import tempfile
import typing

from lbproxy import errors

SOURCES = pathlib.Path(__file__).with_name("load")
CFLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror")

Mode = typing.Literal["short", "storm", "established", "hold", "udp-new", "udp-established", "bulk"]


class BuildError(errors.LbproxyError):
    """The traffic program could not be compiled; the text is the compiler's."""


def build(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Compile the traffic program and return its path, at once where these sources were built before.

    Without a directory it goes to the user's cache (`$XDG_CACHE_HOME/lbproxy`).
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256("\0".join(CFLAGS).encode())
    for source in sources:
        digest.update(source.read_bytes())
    if directory is None:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        directory = pathlib.Path(cache) / "lbproxy"
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / f"load-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    # Compiled beside its place and renamed: someone else may be building, or running, the same one.
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = pathlib.Path(scratch) / "load"
        units = [str(source) for source in sources if source.suffix == ".c"]
        try:
            done = subprocess.run(
                ["gcc", *CFLAGS, "-o", str(built), *units], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise BuildError("gcc is not installed") from error
        if done.returncode:
            raise BuildError(done.stderr)
        built.replace(program)
    return program


def serve_arguments(
    name: str, ports: collections.abc.Iterable[int], *, bind: str = "::", cpu: int | None = None
) -> list[str]:
    """Return the arguments of a server on TCP and UDP `ports` of both families."""
    arguments = ["serve", "--name", name, "--bind", bind]
    for port in ports:
        arguments += ["--port", str(port)]
    return arguments if cpu is None else [*arguments, "--cpu", str(cpu)]


def client_arguments(
    mode: Mode,
    address: str,
    port: int,
    *,
    seconds: float | None = None,
    count: int | None = None,
    connections: int | None = None,
    cpu: int | None = None,
    timeout_s: float | None = None,
    pause_s: float | None = None,
    progress: bool = False,
    interval_s: float | None = None,
) -> list[str]:
    """Return the arguments of a client; without `seconds` and `count` it runs until stopped.

    `bulk` has but one connection and one answer: it takes neither `count` nor `progress`.
    `connections` is bounded by the hard limit of open files, in the client and in the server,
    unless the lab's owner may raise it (CAP_SYS_RESOURCE).
    """
    arguments = [mode, "--to", address, "--port", str(port)]
    optional: list[tuple[str, str | None]] = [
        ("--seconds", None if seconds is None else str(seconds)),
        ("--count", None if count is None else str(count)),
        ("--connections", None if connections is None else str(connections)),
        ("--cpu", None if cpu is None else str(cpu)),
        ("--timeout-ms", None if timeout_s is None else str(round(timeout_s * 1000))),
        ("--pause-us", None if pause_s is None else str(round(pause_s * 1_000_000))),
        ("--interval-ms", None if interval_s is None else str(round(interval_s * 1000))),
    ]
    for flag, value in optional:
        if value is not None:
            arguments += [flag, value]
    return [*arguments, "--progress"] if progress else arguments


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """How long answers took, in microseconds: for `short` and `udp-new` from socket to close.

    For `bulk`, whose answer is about all that it sent, from the first byte.
    """

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclasses.dataclass(frozen=True, slots=True)
class CpuTime:
    """CPU seconds of one process, without its start.

    Of their sum the kernel keeps account to the nanosecond; how much of it is the program's
    own code it samples at its clock ticks, so that of short runs the share is a guess.
    """

    user: float
    system: float

    @property
    def user_share(self) -> float:
        """Return the share that the program itself computes, 0 where it did nothing at all."""
        total = self.user + self.system
        return self.user / total if total else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a client saw in all."""

    seconds: float
    count: int  # questions answered
    failed: int
    per_second: float
    open: int  # connections still whole at the end (`established`, `hold`)
    servers: dict[str, int]  # answers by server name
    failures: dict[str, int]  # by errno name
    latency_us: Latency
    bytes: int  # of `bulk`: what the server says it read, 0 where it did not say
    bytes_per_second: float  # until it said so
    cpu_s: CpuTime


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """What a server did in all."""

    accepted: int
    tcp: int  # questions answered
    udp: int
    bytes: int  # of `bulk`
    cpu_s: CpuTime


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What a client saw in one interval that ended `t_ms` after its start."""

    t_ms: int
    open: int
    count: int
    failed: int
    servers: dict[str, int]
    failures: dict[str, int]


def parse_line(line: str) -> Progress | Result:
    """Decode one line of a client's output."""
    fields = json.loads(line)
    if fields.pop("progress", False):
        return Progress(**fields)
    fields["latency_us"] = Latency(**fields["latency_us"])
    fields["cpu_s"] = CpuTime(**fields["cpu_s"])
    for name in ("mode", "to", "port"):
        del fields[name]
    return Result(**fields)


def parse_served(line: str) -> Served:
    """Decode the last line of a server's output."""
    fields = json.loads(line)
    del fields["mode"]
    fields["cpu_s"] = CpuTime(**fields["cpu_s"])
    return Served(**fields)


def _await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if '"ready"' not in process.stdout.readline():
        raise RuntimeError(f"the traffic program ended with status {process.wait()} before it was ready")


def _ended(process: subprocess.Popen[str]) -> int:
    """Wait for a program that has said all, and return its status; none of the thousands keeps a pipe."""
    status = process.wait()
    assert process.stdout is not None
    process.stdout.close()
    return status


class Client:
    """A running client; RuntimeError if it does not even start."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        _await_ready(process)

    def progress(self) -> collections.abc.Iterator[Progress | Result]:
        """Yield each line as it comes, the result last; RuntimeError if there is none."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            parsed = parse_line(line)
            if isinstance(parsed, Result):
                # Before it is handed on: who has got it asks for no more.
                _ended(self.process)
                yield parsed
                return
            yield parsed
        status = _ended(self.process)
        raise RuntimeError(f"the traffic program ended with status {status} and no result")

    def result(self) -> Result:
        """Wait for the end and return what it saw."""
        return next(line for line in self.progress() if isinstance(line, Result))

    def stop(self) -> Result:
        """End it now and return what it saw."""
        self.process.terminate()
        return self.result()


class Server:
    """A server that listens; `stop` is SIGTERM, `kill` SIGKILL; RuntimeError if it does not start."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process
        self._served: Served | None = None
        _await_ready(process)

    def stop(self) -> Served:
        """End it and wait: its connections close. RuntimeError if it had ended otherwise before."""
        self.process.terminate()
        if self._served is None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            status = _ended(self.process)
            if not line:
                raise RuntimeError(f"the traffic program ended with status {status} and no result")
            self._served = parse_served(line)
        return self._served

    def kill(self) -> None:
        """End it at once and wait."""
        self.process.kill()
        self.process.wait()
