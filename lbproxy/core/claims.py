"""Who has which frontend, where two service ports may claim the same one (SEL-12).

The first in name order has it, whatever the order in which they came, so that
all nodes agree; when it goes, the next one takes over without a gap.
"""

from lbproxy.core import model, tables


class Claims:
    """Frontend keys and the service ports that claim them."""

    def __init__(self) -> None:
        self._owners: dict[bytes, model.PortKey] = {}
        self._for_outside = 0
        self.contested: dict[bytes, set[model.PortKey]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def places(self) -> int:
        """How many addresses and ports can be dialled: some have a second frontend, for clients outside."""
        return len(self._owners) - self._for_outside

    def __contains__(self, key: object) -> bool:
        return key in self._owners

    def owner(self, key: bytes) -> model.PortKey | None:
        """The port that has a frontend."""
        return self._owners.get(key)

    def claim(self, key: bytes, port: model.PortKey) -> bool:
        """Claim a frontend; True where the port has it now."""
        owner = self._owners.get(key)
        if owner is not None and owner != port:
            rivals = self.contested.setdefault(key, {owner})
            rivals.add(port)
            if min(rivals) != port:
                return False
        self._owners[key] = port
        self._for_outside += owner is None and is_for_outside(key)
        return True

    def release(self, key: bytes, port: model.PortKey) -> tuple[bool, model.PortKey | None]:
        """Give a frontend up: whether the port had it, and who has it now."""
        rivals = self.contested.get(key, set())
        rivals.discard(port)
        if len(rivals) < 2:
            self.contested.pop(key, None)
        if self._owners.get(key) != port:
            return False, self._owners.get(key)
        if rivals:
            self._owners[key] = min(rivals)
            return True, self._owners[key]
        del self._owners[key]
        self._for_outside -= is_for_outside(key)
        return True, None


def is_for_outside(key: bytes) -> bool:
    """Whether a frontend is what clients outside have instead of another one."""
    return bool(key[-1] & tables.SCOPE_OUTSIDE)  # the scope is a key's last byte
