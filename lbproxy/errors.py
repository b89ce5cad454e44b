"""The failures that are expected, and the exit status of each.

Whatever is not one of these is a bug and ends the process with a traceback; the
datapath stays up meanwhile.
"""

import typing
from collections.abc import Iterable


class LbproxyError(Exception):
    """Something that can go wrong and is said in one line, without a traceback."""

    exit_status: typing.ClassVar[int] = 1

    def lines(self) -> tuple[str, ...]:
        """The lines to show, one a problem."""
        return (str(self),)


class AgentError(LbproxyError):
    """The agent cannot go on: no API server, no right to load programs, a second agent."""


class ConfigError(LbproxyError):
    """Flags or configuration that cannot be used: every problem, each on a line that names its place."""

    exit_status = 2

    def __init__(self, problems: Iterable[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))

    def lines(self) -> tuple[str, ...]:
        """The problems as they were found."""
        return self.problems


class UnsupportedKernel(LbproxyError):  # noqa: N818
    """The kernel lacks `feature`, which exists since version `since`; `hint` says how to get it."""

    exit_status = 3

    def __init__(self, feature: str, since: str, hint: str = "") -> None:
        self.feature = feature
        self.since = since
        self.hint = hint
        text = f"this kernel lacks {feature}, which exists since Linux {since}"
        super().__init__(f"{text}: {hint}" if hint else text)
