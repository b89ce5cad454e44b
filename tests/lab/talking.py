"""Connections that must survive: the near end of `talker.py`.

with talking.Talker(lab, "n1/p1", [("tcp", "10.96.0.1", 80, 100)]) as talker:
    ...
    assert talker.report().broken == {}
"""

import collections.abc
import dataclasses
import json
import pathlib
import select
import subprocess
import sys
import types
import typing

from lbproxy.lab import cluster

_TALKER = pathlib.Path(__file__).with_name("talker.py")
_WAIT_S = 60.0
Kind = typing.Literal["tcp", "udp", "sendto"]
Target = tuple[Kind, str, int, int]  # how, address, port, how many


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """How connections fare; `lost` are datagrams without an answer in time, `asked` all questions."""

    open: int
    broken: dict[str, int]
    lost: int
    asked: int


class Talker:
    """Connections from one place of a lab, open while the `with` block lasts."""

    def __init__(
        self, lab: cluster.Lab, where: str, to: collections.abc.Sequence[Target], pause_s: float = 0.2
    ) -> None:
        self.count = sum(count for *_, count in to)
        self.tcp = sum(count for kind, _, _, count in to if kind == "tcp")
        argv = [sys.executable, "-I", "-S", str(_TALKER), json.dumps({"to": to, "pause_s": pause_s})]
        self._process = lab.popen(where, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self) -> Report:
        """Wait until all are open and have been answered."""
        return self._read()

    def report(self) -> Report:
        """Have each ask once more, and tell how they are."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End all of them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait(_WAIT_S)
        self._process.stdout.close()

    def _read(self) -> Report:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _WAIT_S)[0]:
            raise RuntimeError("the talker does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the talker ended with status {self._process.wait()}")
        return Report(**json.loads(line))

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self.close()
