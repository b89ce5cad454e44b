"""The real agent in a node of the lab: started, asked how it is, killed, and its pins taken down."""

import contextlib
import http.client
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

from lbproxy import errors
from lbproxy.config import config
from lbproxy.kernel import bpffs
from lbproxy.lab import cgroups, cluster, netns

END_TIMEOUT_S = 10.0
_PINS = "bpf"
_DATAPATH = re.compile(r"\bdatapath (\w+) fingerprint=")


class NodeAgent:
    """`lbproxy run` on a node; leaving the context ends whatever runs there and removes the pins."""

    def __init__(self, lab: cluster.Lab, node: str, manifests: pathlib.Path) -> None:
        self._lab = lab
        self._node = node
        self._manifests = manifests
        self._pins = lab.workdir / _PINS
        self._process: subprocess.Popen[str] | None = None
        self._starts = 0

    def __enter__(self) -> "NodeAgent":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        # All of the node, not only the agent: the child that loads programs must not pin any more.
        group = self._lab.cgroup(self._node)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        (group / "cgroup.kill").write_text("1")
        while cgroups.processes(group) and time.monotonic() < deadline_s:
            time.sleep(0.002)
        if self._pins.exists():
            bpffs.remove(self._pins)

    def start(self) -> None:
        """Start it; `is_ready` tells when it serves."""
        self._starts += 1
        argv = [
            sys.executable, "-m", "lbproxy", "run",
            "--manifests", str(self._manifests),
            "--node-name", self._node,
            "--cgroup", str(self._lab.cgroup(self._node)),
            "--bpffs", str(self._pins),
            "--healthz-bind-address", f"127.0.0.1:{config.HEALTHZ_PORT}",
            "--metrics-bind-address", f"127.0.0.1:{config.METRICS_PORT}",
        ]  # fmt: skip
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = self._lab.popen(self._node, argv, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """End it with SIGKILL: it can not even say goodbye."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def check(self) -> None:
        """Raise AgentError, with its last words, if it has ended by itself."""
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        # The frame that Python draws around a group of exceptions says nothing.
        words = [line.strip(" +-|") for line in said]
        reason = next((line for line in reversed(words) if line), "it said nothing")
        reason = reason.removeprefix("lbproxy: error: ")
        raise errors.AgentError(f"the agent ended with status {status}: {reason}")

    def is_ready(self) -> bool:
        """Tell whether it answers 200 at /healthz."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return netns.inside(self._lab.netns(self._node), _healthz) == http.HTTPStatus.OK
        return False

    def datapath(self) -> str:
        """Return how it came by its programs: created, adopted, relinked, replaced; "" if it has not said."""
        found = _DATAPATH.search(self._log.read_text(encoding="utf-8", errors="replace"))
        return found[1] if found else ""

    @property
    def _log(self) -> pathlib.Path:
        return self._lab.workdir / f"agent-{self._starts}.log"


def _healthz() -> int:
    connection = http.client.HTTPConnection("127.0.0.1", config.HEALTHZ_PORT, timeout=1)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    finally:
        connection.close()
