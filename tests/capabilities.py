"""What this machine must offer for a test; a lack skips it, or fails it where LBPROXY_REQUIRE_ROOT=1."""

import ctypes
import errno
import os

import pytest

from lbproxy.lab import cluster

BPF_MAP_TYPE_ARRAY = 2


def require(missing: list[str]) -> None:
    """Skip, or fail where nothing may be skipped, unless `missing` is empty."""
    if not missing:
        return
    reason = f"needs {', '.join(missing)}"
    if os.environ.get("LBPROXY_REQUIRE_ROOT") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def missing_for_bpf() -> list[str]:
    """Say what is missing to load BPF programs."""
    try:
        libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        return ["libbpf.so.1"]
    fd = libbpf.bpf_map_create(BPF_MAP_TYPE_ARRAY, b"probe", 4, 4, 1, None)
    if fd < 0:
        return [f"the bpf system call (it says {errno.errorcode.get(-fd, fd)})"]
    os.close(fd)
    return []


def missing_for_lab() -> list[str]:
    """Say what is missing to build a lab."""
    return cluster.missing_capabilities()
