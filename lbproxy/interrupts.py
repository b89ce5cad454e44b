"""Signals that end a command in order, also where the exception that they raise is lost.

Python runs a signal's handler between any two instructions of its main thread, and ignores what it raises
in a finalizer or a callback of a weak reference: an HTTP client has some for each request. So what came is
noted, too, and asked for wherever the command waits.
"""

import contextlib
import signal
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator

_NUMBERS: typing.Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """For the block, SIGINT raises KeyboardInterrupt where it would end the process at once."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def handled(by: Callable[[int, types.FrameType | None], None], *, fatal: bool = False) -> Iterator[None]:
    """Have `by` called for each of these signals during the block, in the main thread only.

    With `fatal`, for those that would end the process on the spot: all others are somebody's already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: nohup wants that.
    before = {
        one: handler
        for one in _NUMBERS
        if (handler := signal.getsignal(one)) is not signal.SIG_IGN
        and (handler is signal.SIG_DFL or not fatal)
    }
    for one in before:
        signal.signal(one, by)
    try:
        yield
    finally:
        for one, handler in before.items():
            # None: it was set by no Python, and can not be given back.
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command, as Ctrl-C does."""


class Interrupts:
    """The first of SIGINT, SIGTERM and SIGHUP raises Interrupted, once; more of them change nothing."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._holding = False

    def sleep(self, pause_s: float) -> None:
        """Sleep, and raise Interrupted if a signal has come meanwhile or before."""
        time.sleep(0 if self.number else pause_s)
        if self.number:
            raise Interrupted

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the block, a signal is noted only: what has to be done before the end is done whole."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def caught(self, *, fatal: bool = False) -> contextlib.AbstractContextManager[None]:
        """Have the signals come here during the block, as `handled` has it."""
        return handled(self._note, fatal=fatal)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if not self.number:
            self.number = number
            if not self._holding:
                raise Interrupted
