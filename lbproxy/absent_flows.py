"""Says between which addresses no flow has a row, so that the programs look none up.

`no_flows` has two words of bits a row: what the agent has found, and what programs have begun
since. When much has, all is found out anew. A program sets its bit before it writes its row:
so the agent takes back what it has said, clears what has begun, waits until no program runs
that has set its bit before that, and then looks at all rows there are. Until it has, nothing
is said, and rows are looked up.

Rows that the agent writes itself are not begun. They are of held flows, whose packets pass as
they are, as those that have no row do.
"""

import array
import time
import typing

from lbproxy.core import absence, ledger, tables
from lbproxy.kernel import maps

# A sixteenth of the bits: with so many, so many packets in vain.
MANY: typing.Final = absence.PAIR_ROWS * 64 // 16
# Where so many flows are under way, looking anew helps nobody.
REST_S: typing.Final = 60.0
_NOTHING: typing.Final = bytes(8 * absence.PAIR_ROWS)


class AbsentFlows:
    """What was said, and what is to be said next."""

    def __init__(self, kernel: maps.Maps, clock: typing.Callable[[], float] = time.monotonic) -> None:
        self._kernel = kernel
        self._clock = clock
        self._taken_back_s: float | None = None
        self._said_s: float | None = None

    @property
    def due_s(self) -> float | None:
        """From when on a look at all rows will do; None where none is wanted."""
        return None if self._taken_back_s is None else self._taken_back_s + ledger.RECYCLE_AFTER_S

    def look(self) -> absence.Pairs | None:
        """Begin a look at all rows, whose keys are to be added; None where none is wanted."""
        return absence.Pairs() if self.due_s is not None and self._clock() >= self.due_s else None

    def looked(self, found: absence.Pairs | None) -> None:
        """End a look: say what it has found. Without one, take back what was said if it is time for that.

        Raises OSError.
        """
        if found is not None:
            self._kernel.set_column(tables.Table.NO_FLOWS, "none", found.none())
            self._taken_back_s, self._said_s = None, self._clock()
        elif self._taken_back_s is None and self._is_stale():
            self._kernel.set_column(tables.Table.NO_FLOWS, "none", _NOTHING)
            self._kernel.set_column(tables.Table.NO_FLOWS, "begun", _NOTHING)
            self._taken_back_s = self._clock()

    def _is_stale(self) -> bool:
        if not any(self._kernel.column(tables.Table.NO_FLOWS, "none")):
            return True
        if self._said_s is not None and self._clock() < self._said_s + REST_S:
            return False
        begun = array.array("Q", self._kernel.column(tables.Table.NO_FLOWS, "begun"))
        return sum(word.bit_count() for word in begun) > MANY
