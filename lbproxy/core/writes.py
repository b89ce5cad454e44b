"""The order in which one change's writes are made: at no point does anything lead to what is not there.

What is pointed at comes first and the pointer last; what goes, the other way round.
"""

from lbproxy.core import claims, tables


class Writes:
    """Writes by phase, so that many services share one batch of each."""

    def __init__(self) -> None:
        self.names: list[tables.Write] = []
        self.ranges: list[tables.Write] = []
        self.backends: list[tables.Write] = []
        self.slots: list[tables.Write] = []
        self.earlier: list[tables.Write] = []
        self.absence_gone: list[tables.Write] = []
        self.frontends: dict[bytes, bytes] = {}  # the last row that is chosen for each
        self.frontends_gone: dict[bytes, None] = {}  # a set that keeps its order; nobody claims these
        self.absence: list[tables.Write] = []
        self.ranges_gone: list[tables.Write] = []
        self.earlier_gone: list[tables.Write] = []
        self.retired: list[tables.Write] = []
        self.ends_gone: list[tables.Write] = []
        self.names_gone: list[tables.Write] = []

    def in_order(self) -> list[tables.Write]:
        """Pointed at before pointing, and the other way round for what goes."""
        come = [tables.Put(tables.Table.FRONTENDS, key, row) for key, row in self.frontends.items()]
        gone = [tables.Delete(tables.Table.FRONTENDS, key) for key in self.frontends_gone]
        return [
            *self.names,
            *self.ranges,
            *self.backends,
            *self.slots,
            *self.earlier,
            *self.absence_gone,
            *sorted(come, key=_is_for_outside, reverse=True),
            *sorted(gone, key=_is_for_outside),
            *self.absence,
            *self.ranges_gone,
            *self.earlier_gone,
            *self.retired,
            *self.ends_gone,
            *self.names_gone,
        ]

    def remove_frontend(self, key: bytes) -> None:
        """Remove a frontend, and write no row that this change has chosen for it before."""
        self.frontends.pop(key, None)
        self.frontends_gone[key] = None


def _is_for_outside(write: tables.Write) -> bool:
    return claims.is_for_outside(write.key)
