"""Says between which addresses no flow has a row, so that the programs look none up.

`no_flows` has two words of bits a row: what the agent has found, and what programs have begun
since. When much has, all is found out anew. A program sets its bit before it writes its row, and
takes a pair for one without a flow by both words: so the agent takes back what it has said, waits
until no program runs that has read it, clears what has begun, waits until none runs that has set
its bit before that, and then looks at all rows there are. Until it has, nothing is said, and rows
are looked up.

Rows that the agent writes itself no program begins. They are of held flows: whoever denied them
would pass their packets as they are all the same, and never see such a flow closed.
"""

import array
import contextlib
import threading
import time
import typing

from lbproxy.core import absence, tables
from lbproxy.kernel import maps

# A sixteenth of the bits: with so many, so many packets in vain.
MANY: typing.Final = absence.PAIR_ROWS * 64 // 16
# Where so many flows are under way, looking anew helps nobody.
REST_S: typing.Final = 60.0
_NOTHING: typing.Final = bytes(8 * absence.PAIR_ROWS)


class AbsentFlows:
    """What was said, and what is to be said next. Threads may ask it at once."""

    def __init__(self, kernel: maps.Maps, clock: typing.Callable[[], float] = time.monotonic) -> None:
        self._kernel = kernel
        self._clock = clock
        self._alone = threading.Lock()
        self._found: absence.Pairs | None = None  # by the look that is under way
        self._said_s: float | None = None

    def look(self) -> absence.Pairs | None:
        """Begin a look at all rows, whose keys are to be added; None where none is wanted. Raises OSError."""
        with self._alone:
            self._found = None
            if self._is_stale():
                self._set("none", _NOTHING)
                self._kernel.wait_for_programs()
                self._set("begun", _NOTHING)
                self._kernel.wait_for_programs()
                self._found = absence.Pairs()
            return self._found

    def looked(self, found: absence.Pairs) -> None:
        """End a look: say what it has found. Raises OSError."""
        with self._alone:
            self._found = None
            self._set("none", found.none())
            self._said_s = self._clock()

    @contextlib.contextmanager
    def written(self, keys: bytes) -> typing.Iterator[None]:
        """While the agent itself writes rows with these keys, packed in order. Raises OSError."""
        with self._alone:
            if self._found is not None:
                # It may be past the places where they come.
                self._found.add(keys)
            if self._says_something():
                some = absence.Pairs(self._kernel.column(tables.Table.NO_FLOWS, "none"))
                some.add(keys)
                self._set("none", some.none())
            yield

    def _says_something(self) -> bool:
        return any(self._kernel.column(tables.Table.NO_FLOWS, "none"))

    def _is_stale(self) -> bool:
        if not self._says_something():
            return True
        if self._said_s is not None and self._clock() < self._said_s + REST_S:
            return False
        begun = array.array("Q", self._kernel.column(tables.Table.NO_FLOWS, "begun"))
        return sum(word.bit_count() for word in begun) > MANY

    def _set(self, field: str, bits: bytes) -> None:
        self._kernel.set_column(tables.Table.NO_FLOWS, field, bits)
