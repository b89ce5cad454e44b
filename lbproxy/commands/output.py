"""What commands print: that it cannot be written is said in one line, not with a traceback."""

import os
import sys

from lbproxy import errors


def check() -> None:
    """Raise AgentError where there is no standard output: Python has None for one that was closed."""
    if sys.stdout is None:
        raise errors.AgentError("cannot write the output: standard output is closed")


def write(text: str) -> None:
    """Print a text. Raises AgentError where it cannot be written; BrokenPipeError is left as it is."""
    try:
        print(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _failure(error) from error


def write_bytes(content: bytes) -> None:
    """Write what is no text. Raises as `write` does."""
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _failure(error) from error


def flush() -> None:
    """Write what is buffered. Raises as `write` does."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _failure(error) from error


def discard() -> None:
    """Let nobody have what is still to come: Python would complain again when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _failure(error: OSError) -> errors.AgentError:
    discard()
    return errors.AgentError(f"cannot write the output: {error.strerror}")
