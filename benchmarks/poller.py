"""Connects to one address over and over, and says when the answer changes. Standard library alone.

    poller.py ADDRESS PORT TIMEOUT_MS PAUSE_MS

One JSON object a line: `{"t_ns": …, "answer": NAME or ERRNO, "ok": true or false}`
whenever the outcome differs from the one before, with CLOCK_MONOTONIC as time, so
that other processes can compare it with theirs. On SIGTERM a last line with totals:
`{"answers": {NAME: n}, "failures": {ERRNO: n}}`.
"""

import collections
import errno
import json
import signal
import socket
import sys
import time


def ask(address: str, port: int, timeout_s: float) -> tuple[bool, str]:
    """Make one connection, ask, and return whether there was an answer, and it or the error's name."""
    with socket.socket() as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect((address, port))
            connection.send(b"\n")
            answer = connection.recv(128)
        except TimeoutError:
            return False, "ETIMEDOUT"
        except OSError as error:
            return False, errno.errorcode.get(error.errno or 0, str(error))
    return (True, answer.decode().strip()) if answer else (False, "EOF")


def main(address: str, port: str, timeout_ms: str, pause_ms: str) -> None:
    """Poll until SIGTERM."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    outcomes: collections.Counter[tuple[bool, str]] = collections.Counter()
    before: tuple[bool, str] | None = None
    target, timeout_s, pause_s = int(port), int(timeout_ms) / 1e3, int(pause_ms) / 1e3
    while not stopped:
        outcome = ask(address, target, timeout_s)
        now_ns = time.monotonic_ns()
        outcomes[outcome] += 1
        if outcome != before:
            print(json.dumps({"t_ns": now_ns, "answer": outcome[1], "ok": outcome[0]}), flush=True)
            before = outcome
        if pause_s:
            time.sleep(pause_s)
    answers, failures = (
        {name: n for (ok, name), n in outcomes.items() if ok == want} for want in (True, False)
    )
    print(json.dumps({"answers": answers, "failures": failures}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
