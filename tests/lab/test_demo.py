"""`lbproxy demo` as a newcomer runs it: it shows what it promises, and whatever ends it leaves nothing."""

import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import tempfile
import typing
from xml.etree import ElementTree

import pytest

from lbproxy import cgroup2
from lbproxy.lab import cluster, netns
from tests import polling

pytestmark = pytest.mark.usefixtures("needs_lab", "needs_bpf")

ARGV = (sys.executable, "-m", "lbproxy", "demo")
TIMEOUT_S = 120
ANSI = "\x1b"


def start(*arguments: str, **options: typing.Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*ARGV, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def cgroup_of(process: pathlib.Path) -> str:
    try:
        return (process / "cgroup").read_text()
    except OSError:  # it has just ended
        return ""


def leftovers(pid: int) -> list[str]:
    """List what a demo with this process id has on this machine."""
    run = f"{cluster.PREFIX}-{pid}-"
    mount = cgroup2.mount_point()
    assert mount is not None
    names = [*netns.names(), *os.listdir(mount), *os.listdir(tempfile.gettempdir())]
    mounts = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    # One that has ended is still listed, with its cgroup, until whoever inherits it takes notice.
    processes = [
        path
        for path in pathlib.Path("/proc").glob("[0-9]*")
        if f"/{run}" in cgroup_of(path) and cluster.start_time(int(path.name))
    ]
    return [
        *(name for name in names if name.startswith(run)),
        *(line for line in mounts if run in line),
        *(str(path) for path in processes),
    ]


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    stderr = process.stderr.read() if process.stderr else ""
    raise AssertionError(f"never said {words!r}: {''.join(said)}{stderr}")


def test_it_shows_what_it_promises_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "demo.svg"
    process = start("--seconds", "2", "--screenshot", str(path))
    said, complaints = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, complaints) == (0, ""), said
    assert leftovers(process.pid) == []
    assert ANSI not in said
    assert "FAILED" not in said
    results = dict(re.findall(r"^ok +(.+?)  +(.+)$", said, re.MULTILINE))
    assert results["Failed"] == "0"
    assert int(results["Connections"].split()[0].replace(",", "")) > 0
    assert results["Service without endpoints"].startswith("refused in ")
    assert any(found.endswith("datapath adopted") for found in results.values())
    for happened in ("taken out", "server is stopped", "put back", "SIGKILL", "datapath adopted"):
        assert re.search(rf"^ *\d+\.\d s  .*{re.escape(happened)}", said, re.MULTILINE), happened
    text = path.read_text()
    assert "://" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "shop-1" in "".join(ElementTree.fromstring(text).itertext())


def test_on_a_terminal_it_is_a_picture() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
    process = subprocess.Popen([*ARGV, "--seconds", "1"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    # Reading a terminal that nobody has open any more is EIO.
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass
    finally:
        os.close(ours)
    assert process.wait(TIMEOUT_S) == 0, shown
    assert leftovers(process.pid) == []
    assert ANSI.encode() in shown
    words = re.sub(rf"{ANSI}\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "0 failed" in words
    assert "shop-1 on n1" in words


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [
        ("building a cluster", signal.SIGINT, 130),
        ("starting the agent", signal.SIGINT, 130),
        ("is taken out", signal.SIGINT, 130),
        ("the agent is killed", signal.SIGTERM, 143),
        # Not the last step of all: it may be over before the signal comes.
        ("the agent is back", signal.SIGHUP, 129),
    ],
)
def test_interrupted_anywhere_it_leaves_nothing(words: str, number: int, status: int) -> None:
    # Its own group, interrupted as a terminal does: everything in it at once.
    process = start("--plain", "--seconds", "1", start_new_session=True)
    with process:
        read_until(process, words)
        os.killpg(process.pid, number)
        _, complaints = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == status
    assert complaints == "lbproxy: interrupted; nothing is left behind\n"
    assert leftovers(process.pid) == []


def test_a_reader_that_goes_away_ends_it_cleanly() -> None:
    process = start("--plain", "--seconds", "1")
    with process:
        read_until(process, "connects to")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 141
    assert leftovers(process.pid) == []


def test_what_a_killed_demo_left_is_removed_by_the_next() -> None:
    process = start("--plain", "--seconds", "1")
    with process:
        read_until(process, "connects to")
        assert any("/bpf bpf " in line or " - bpf " in line for line in leftovers(process.pid))
        process.kill()
        process.wait()
    cluster.sweep()
    polling.eventually(lambda: leftovers(process.pid) == [], what="the end of what was left")
