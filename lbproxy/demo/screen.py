"""Where the demo shows itself: a picture that moves on a terminal, lines of text anywhere else."""

import sys
import time
import types
import typing

from rich import console, live, spinner

from lbproxy.demo import picture, scene

PICTURE_INTERVAL_S = 0.1
LINE_INTERVAL_S = 1.0


class Screen(typing.Protocol):
    """What the story tells, and to whom; a context that leaves the terminal as it was."""

    def __enter__(self) -> "Screen":
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        """End it."""

    def step(self, words: str) -> None:
        """Say what is being prepared."""

    def happened(self, moment: scene.Moment) -> None:
        """Show that something has happened."""

    def refresh(self, seen: scene.Scene) -> None:
        """Show how it stands now; called often."""

    def finish(self, seen: scene.Scene) -> None:
        """Show the result."""


class Picture:
    """One picture, redrawn in place."""

    def __init__(self, terminal: console.Console) -> None:
        self._console = terminal
        self._live = live.Live(console=terminal, auto_refresh=True, transient=True, refresh_per_second=10)
        self._drawn_s = 0.0

    @property
    def _width(self) -> int:
        return min(picture.WIDTH, self._console.width)

    def __enter__(self) -> Screen:
        """Take over the lower end of the terminal."""
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        """Wipe the picture away."""
        self._live.__exit__(kind, value, at)

    def step(self, words: str) -> None:
        """Show a turning wheel."""
        self._live.update(spinner.Spinner("dots", f"{words} …"), refresh=True)

    def happened(self, moment: scene.Moment) -> None:
        """Leave it to the next picture."""

    def refresh(self, seen: scene.Scene) -> None:
        """Redraw, if the last time is a moment ago."""
        now_s = time.monotonic()
        if now_s - self._drawn_s >= PICTURE_INTERVAL_S:
            self._drawn_s = now_s
            self._live.update(picture.live(seen, self._width))

    def finish(self, seen: scene.Scene) -> None:
        """Leave the final picture on the terminal."""
        self._live.stop()
        self._console.print(picture.final(seen, self._width))


class Lines:
    """Lines of plain text, one a second while nothing happens."""

    def __init__(self) -> None:
        self._printed_s = 0.0

    def __enter__(self) -> Screen:
        """Nothing is taken over."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: types.TracebackType | None
    ) -> None:
        """Nothing is to be given back."""

    def step(self, words: str) -> None:
        """Print it."""
        _print(f"{words} …")

    def happened(self, moment: scene.Moment) -> None:
        """Print it with its time."""
        _print(f"{moment.at_s:5.1f} s  {moment.text}")

    def refresh(self, seen: scene.Scene) -> None:
        """Print the rates, once a second."""
        now_s = time.monotonic()
        if not seen.connections or now_s - self._printed_s < LINE_INTERVAL_S:
            return
        self._printed_s = now_s
        rates = "  ".join(f"{backend.name} {seen.rate(backend):,.0f}/s" for backend in seen.backends)
        _print(f"{seen.elapsed_s:5.1f} s  {rates}  failed {seen.failed}")

    def finish(self, seen: scene.Scene) -> None:
        """Print the result as aligned columns."""
        _print("")
        width = max((len(finding.what) for finding in seen.findings), default=0)
        for finding in seen.findings:
            sign = "ok" if finding.ok else "FAILED"
            _print(f"{sign:<6}  {finding.what:<{width}}  {finding.found}")


def choose(*, plain: bool) -> Screen:
    """Return a picture where there is a terminal that can move it, else lines."""
    terminal = console.Console()
    if plain or not sys.stdout.isatty() or terminal.is_dumb_terminal:
        return Lines()
    return Picture(terminal)


def _print(line: str) -> None:
    # At once: whoever reads a pipe wants to follow too.
    print(line, file=sys.stdout, flush=True)
