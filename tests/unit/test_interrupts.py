"""What signals do to a command that has to end in order."""

import os
import signal
import sys
import typing

import pytest

from lbproxy import interrupts


def test_the_first_signal_raises_and_more_change_nothing() -> None:
    signals = interrupts.Interrupts()
    with signals.caught():
        with pytest.raises(interrupts.Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.number == signal.SIGTERM


def test_one_that_is_lost_in_a_finalizer_is_noticed_at_the_next_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.exc_type))

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGHUP)

    signals = interrupts.Interrupts()
    with signals.caught():
        Finalized()
        assert lost == [interrupts.Interrupted]
        with pytest.raises(interrupts.Interrupted):
            signals.sleep(3600)


def test_what_has_to_be_done_before_the_end_is_done_whole() -> None:
    signals = interrupts.Interrupts()
    with signals.caught():
        with signals.held():
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(interrupts.Interrupted):
            signals.sleep(0)


def test_what_was_ignored_stays_so_and_what_was_not_is_given_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGINT)
    try:
        signals = interrupts.Interrupts()
        with signals.caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGINT) != before[1]
        assert (signals.number, signal.getsignal(signal.SIGHUP)) == (0, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) == before[1]
    finally:
        signal.signal(signal.SIGHUP, before[0])


def test_what_somebody_handles_is_left_to_him_where_only_the_fatal_are_caught() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    came: list[int] = []
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, lambda number, _frame: came.append(number))
        with interrupts.Interrupts().caught(fatal=True):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
            with pytest.raises(interrupts.Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGHUP]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        (signal.SIG_DFL, signal.default_int_handler),
        (signal.SIG_IGN, signal.SIG_IGN),
        (signal.default_int_handler, signal.default_int_handler),
    ],
)
def test_a_command_at_work_is_told_of_ctrl_c_and_nothing_before_and_after(
    outside: typing.Any, inside: typing.Any
) -> None:
    before = signal.signal(signal.SIGINT, outside)
    try:
        with interrupts.raised():
            assert signal.getsignal(signal.SIGINT) is inside
        assert signal.getsignal(signal.SIGINT) is outside
        if inside is signal.default_int_handler:
            with pytest.raises(KeyboardInterrupt), interrupts.raised():
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is outside
    finally:
        signal.signal(signal.SIGINT, before)
