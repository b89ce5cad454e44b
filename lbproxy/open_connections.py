"""Puts right how many connections each backend has open, where a service balances by it.

With each look at the flow table, whose batches it is shown; nothing is read where no service
is counted.
"""

import collections
import typing

from lbproxy import controller
from lbproxy.core import flows, loads, tables
from lbproxy.kernel import maps


class Counted(typing.Protocol):
    """Which backends are counted."""

    @property
    def anew(self) -> int:
        """Changes when a service port is counted from now on: what it has open is not known then."""
        ...

    def __call__(self) -> loads.Identities:
        """Address and port of each, by id."""
        ...


class _Nobody:
    anew = 0

    def __call__(self) -> loads.Identities:
        return {}


nobody: typing.Final[Counted] = _Nobody()


class OfLedger:
    """The backends that an agent's ledger has for services with least-connections."""

    def __init__(self, control: controller.Controller) -> None:
        self._control = control

    @property
    def anew(self) -> int:
        """Of this ledger: one that was restored begins at another number, or has nothing new."""
        return self._control.reconciler.ledger.counted_anew

    def __call__(self) -> loads.Identities:
        """Address and port of each, by id."""
        return self._control.reconciler.ledger.counted_backends()


class Recount:
    """One count of what is open, from the loads as they are now to when it is put right."""

    def __init__(self, kernel: maps.Maps, counted: loads.Identities, deadlines: flows.Deadlines) -> None:
        """Raises OSError."""
        self._kernel = kernel
        self._counted = counted
        self._deadlines = deadlines
        self._found: typing.Counter[int] = collections.Counter()
        self._before = self._loads()

    @property
    def wanted(self) -> bool:
        """Whether anything is counted at all."""
        return bool(self._counted)

    def flows(self, keys: bytes, rows: bytes) -> None:
        """Count a batch of flows."""
        if self._counted:
            self._found.update(flows.open_to(keys, rows, self._deadlines, self._counted))

    def put_right(self) -> None:
        """Count the sockets as well, and correct what is wrong. Raises OSError."""
        if not self._counted:
            return
        self._found.update(loads.of_sockets((row for _, row in self._kernel.rows("sockets")), self._counted))
        wrong = loads.corrections(self._before, self._loads(), self._found)
        self._kernel.apply(
            [
                tables.Put(
                    tables.Table.LOAD_CORRECTIONS,
                    tables.row_key(number),
                    correction.to_bytes(4, tables.BYTE_ORDER),
                )
                for number, correction in sorted(wrong.items())
            ]
        )

    def _loads(self) -> dict[int, loads.Load]:
        if not self._counted:
            return {}
        rows = dict(self._kernel.rows(tables.Table.BACKEND_LOAD))
        corrected = dict(self._kernel.rows(tables.Table.LOAD_CORRECTIONS))
        keys = {number: tables.row_key(number) for number in self._counted}
        return {number: loads.load(rows.get(key), corrected.get(key)) for number, key in keys.items()}
