"""Ctrl-C while a command is still being imported, and when it has said all: 130 for a shell, no traceback.

Python writes a line for each module that it has imported, so a test knows how far a process is. The pipe
holds so few lines that one whose lines nobody reads waits: the signal finds it at work, however slow the
test is.
"""

import fcntl
import os
import signal
import subprocess
import sys
import typing

import pytest

PIPE_BYTES = 4096
AHEAD = 100  # lines of import times, of 42 bytes at least, that a process may be ahead of its reader
MOMENTS = 12
ENDS = 3
ERROR = "lbproxy: error: no lbproxy datapath in /nowhere: start `lbproxy run`, or name its --bpffs\n"
FAILED = 1


def start(*before: str) -> subprocess.Popen[str]:
    """A command that comes to nothing, with all that it imports."""
    command = [*before, sys.executable, "-X", "importtime", "-m", "lbproxy", "status", "--bpffs=/nowhere"]
    # Before anybody writes: a pipe that holds more than that can not be made so small any more.
    end, into = os.pipe()
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    process = subprocess.Popen(command, stderr=into, text=True)
    os.close(into)
    process.stderr = os.fdopen(end)
    return process


def lines_of(process: subprocess.Popen[str]) -> typing.IO[str]:
    assert process.stderr is not None
    return process.stderr


def module(line: str) -> str:
    """The module that a line about imports names; nothing for any other line."""
    return line.rpartition("|")[2].strip() if line.startswith("import time:") else ""


def interrupted(process: subprocess.Popen[str], lines: int) -> str:
    """Send SIGINT when so many modules are there; returns what else it writes to its end."""
    with process:
        before = [lines_of(process).readline() for _ in range(lines)]
        assert all(map(module, before))
        process.send_signal(signal.SIGINT)
        return "".join(line for line in lines_of(process) if not module(line))


@pytest.fixture(scope="module")
def moments() -> list[int]:
    """After how many modules to send a signal, from lbproxy's own first line on."""
    with start() as process:
        modules = [name for line in lines_of(process) if (name := module(line))]
    # What `__main__` imports: the first line after the package's.
    first = modules.index("lbproxy") + 2
    last = len(modules) - AHEAD
    assert last - first > AHEAD
    return list(range(first, last, (last - first) // MOMENTS))


def test_while_it_is_imported(moments: list[int]) -> None:
    for moment in moments:
        process = start()
        assert interrupted(process, moment) == ""
        # Ended by the signal itself: a shell says 128 + 2.
        assert process.returncode == -signal.SIGINT


def test_when_it_has_said_all() -> None:
    for _ in range(ENDS):
        with start() as process:
            while (line := lines_of(process).readline()) != ERROR:
                assert module(line)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines_of(process) if not module(line)] == []
        assert process.returncode in (-signal.SIGINT, FAILED)


def test_what_a_script_has_started_with_it_ignored_goes_on(moments: list[int]) -> None:
    process = start("sh", "-c", "trap '' INT && exec \"$@\"", "sh")
    assert interrupted(process, moments[0]) == ERROR
    assert process.returncode == FAILED
