"""Signals that end the demo: noted when they come, obeyed where nothing is half done.

A signal that raised wherever it struck could do so while a namespace is being
made or taken down, and leave half of it behind.
"""

import types

from lbproxy import interrupts


class Interrupted(Exception):  # noqa: N818 - not an error: somebody wants it to end
    """The demo has been told to end."""


class Interrupts:
    """Notes the first signal while its `with` block lasts; for the main thread only."""

    def __init__(self) -> None:
        self.number = 0
        self._handled = interrupts.handled(self._note)

    def __enter__(self) -> "Interrupts":
        self._handled.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self._handled.__exit__(kind, value, at)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number:
            raise Interrupted

    @property
    def exit_status(self) -> int:
        """What a shell reports of a command that a signal ended."""
        return 128 + self.number

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.number = self.number or number
