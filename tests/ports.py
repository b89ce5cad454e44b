"""Ports that nobody takes by chance, while tests run side by side in one namespace."""

import contextlib
import secrets
import socket


def unused(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """One that nobody uses now, of those that the kernel gives only to whoever asks for that very one."""
    while True:
        # Not by `random`: it draws the same in each process that runs tests.
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, kind) as free:
            free.bind(("0.0.0.0", port))
            return port
