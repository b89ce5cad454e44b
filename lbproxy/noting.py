"""Writes down what only the agent knows, for the read-side commands: a pin beside the tables (core.notes).

They so need no way to the agent, and still know what it found when it is gone.
"""

import asyncio
import logging
import pathlib
import time
import typing

from lbproxy import secrecy
from lbproxy.core import notes
from lbproxy.kernel import one_row

if typing.TYPE_CHECKING:
    # The read-side commands have no use for an agent's parts.
    from lbproxy import controller
    from lbproxy.probes import prober

PIN: typing.Final = "notes"
_PAUSE_S: typing.Final = 1.0
_PAUSES: typing.Final = 100  # as long as a look has taken, of processor time
_READS: typing.Final = 5  # of a row that is being written each time
_log = logging.getLogger(__name__)


class Noting:
    """Looks every second, and writes what has changed."""

    def __init__(self, root: pathlib.Path, probes: "prober.Prober", control: "controller.Controller") -> None:
        self._path = f"{root}/{PIN}"
        self._probes = probes
        self._control = control
        self._written = b""
        self._written_of: object = None
        self._problem = ""

    async def run(self) -> typing.NoReturn:
        """Write until cancelled."""
        while True:
            began_s = time.thread_time()
            self.look()
            await asyncio.sleep(pause_s(time.thread_time() - began_s))

    def look(self) -> None:
        """Write down what is not written yet."""
        # Where nothing has changed, nothing is gathered.
        unserved = self._control.unserved
        known = (self._probes.changes, dict(self._control.rejected), unserved)
        if known == self._written_of:
            return
        ahead_s = time.time() - time.monotonic()
        found = notes.Known(
            self._probes.off,
            ((key, secrecy.without(reason)) for key, reason in self._control.rejected.items()),
            self._probes.troubles(),
            ((name, secrecy.without(reason)) for name, reason in self._probes.mistakes.items()),
            self._probes.spared(),
            self._probes.asked.items(),
            map(secrecy.without, unserved),
        )
        document = notes.encode(found, lambda at_s: at_s + ahead_s)
        try:
            if document != self._written:
                one_row.write(self._path, "lb_notes", notes.MOST_BYTES, document)
        except OSError as error:
            if str(error) != self._problem:
                _log.warning("cannot write down what the agent knows, for other commands: %s", error)
            self._problem = str(error)
        else:
            self._written, self._written_of, self._problem = document, known, ""


def pause_s(took_s: float) -> float:
    """How long to wait after a look that took so much: nobody else has had a turn meanwhile."""
    return max(_PAUSE_S, _PAUSES * took_s)


def read(root: pathlib.Path) -> notes.Notes:
    """What the agent has written down; nothing where none has, or where it can not be understood."""
    for _ in range(_READS):
        try:
            row = one_row.read(f"{root}/{PIN}")
        except OSError:
            break
        if row is None:
            break
        if (found := notes.decode(row)) is not None:
            return found
    return notes.NOTHING
