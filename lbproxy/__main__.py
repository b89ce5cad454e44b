"""Where the `lbproxy` command begins and ends: there Ctrl-C ends the process, as it does before Python is up.

Python would have it raise KeyboardInterrupt in the midst of an import: a traceback of somebody else's lines,
or none, where a callback loses it. So that comes back only once a command is at work (`interrupts.raised`).
A shell says 130 of both ends. What Python itself imports before this file, nobody can mend here.
"""

import _signal  # type: ignore[import-not-found]  # signal itself takes milliseconds to import


def main() -> int:
    """Run the command that the arguments ask for; returns the exit status."""
    # A script's background job is started with SIGINT ignored: that stays so.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from lbproxy import cli  # noqa: PLC0415 - this is what takes long

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
