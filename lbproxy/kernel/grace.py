"""The kernel's grace period, after which nobody uses any more what was taken away before."""

import contextlib
import os
import sys

from lbproxy.kernel import libbpf, map_rows


def wait_for_programs() -> None:
    """Return when every program that runs now, on any CPU, has ended: the kernel's RCU grace period.

    A write to a map of maps returns only then, so that whoever changes such a map knows that nobody uses
    the old one any more (maybe_wait_bpf_programs in kernel/bpf/syscall.c; since Linux 4.20).
    """
    with contextlib.ExitStack() as stack:
        inner = libbpf.map_create("array", "waiting", 4, 4, 1, 0)
        stack.callback(os.close, inner)
        outer = libbpf.map_create("array_of_maps", "waiting", 4, 4, 1, 0, inner)
        stack.callback(os.close, outer)
        map_rows.update(outer, bytes(4), inner.to_bytes(4, sys.byteorder))
