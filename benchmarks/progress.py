"""Progress lines with the time left, from what each step was expected to take and what it took."""

import collections.abc
import dataclasses
import http.client
import subprocess
import sys
import time
import typing

from lbproxy import errors

# What a step may end with that says something of who is measured, or of the machine: anything else is a bug.
FAILURES = (
    errors.LbproxyError, OSError, RuntimeError, subprocess.SubprocessError, http.client.HTTPException,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One part of a run."""

    label: str
    expected_s: float
    action: collections.abc.Callable[[], str]  # returns a line about what it found


def left_s(done_expected_s: float, done_s: float, ahead_expected_s: float) -> float:
    """Return what the rest will take, if it is as far off as what is done was."""
    # Little is known while little is done: the estimate counts as half a minute of experience.
    pace = (done_s + 30) / (done_expected_s + 30)
    return ahead_expected_s * pace


def duration(seconds: float) -> str:
    """Say how long, as one would: `40 s`, `5 min`."""
    return f"{round(seconds)} s" if seconds < 90 else f"{round(seconds / 60)} min"


def run(
    steps: collections.abc.Sequence[Step],
    after_each: collections.abc.Callable[[Step, Exception | None], None],
    out: typing.TextIO = sys.stderr,
    clock: collections.abc.Callable[[], float] = time.monotonic,
) -> None:
    """Take each step, with a line before and after: also when one has failed (`FAILURES`), the next.

    `after_each` gets what a step failed with, None where it did not.
    """
    total_s = sum(step.expected_s for step in steps)
    done_expected_s = 0.0
    started_s = clock()
    for step in steps:
        spent_s = clock() - started_s
        left = duration(left_s(done_expected_s, spent_s, total_s - done_expected_s))
        print(f"[{done_expected_s / total_s:4.0%}, {left} left] {step.label}", file=out, flush=True)
        failed = None
        try:
            said = step.action()
        except FAILURES as error:
            failed, said = error, f"FAILED: {error}"
        print(f"    {said}", file=out, flush=True)
        after_each(step, failed)
        done_expected_s += step.expected_s
    print(f"[100%] done in {duration(clock() - started_s)}", file=out, flush=True)
