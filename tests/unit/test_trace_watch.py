"""How long `lbproxy trace` listens."""

import types
import typing

from lbproxy.kernel import observers
from lbproxy.trace import command as trace


class Ring:
    """Events that come while somebody asks the trace to end."""

    def __init__(self, stop: trace._Stop) -> None:
        self._stop = stop

    def poll(self, _timeout_s: float) -> list[bytes]:
        self._stop.asked = True
        return [b"before"]

    def rest(self) -> list[bytes]:
        return [b"the last"]


def test_what_had_happened_when_it_was_ended_is_told() -> None:
    stop, heard = trace._Stop(), list[bytes]()
    watching = types.SimpleNamespace(ring=lambda: Ring(stop), outlived=lambda: False)
    told = types.SimpleNamespace(full=False, event=heard.append, settle=lambda _now_ns: None)
    trace._watch(
        typing.cast(observers.Observers, watching), typing.cast(trace._Told, told), stop, seconds=60.0
    )
    assert heard == [b"before", b"the last"]
