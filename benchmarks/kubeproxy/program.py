"""A real kube-proxy's program: its version, how it is called, and the iptables that it finds."""

import pathlib
import re
import shutil
import subprocess

from benchmarks.kubeproxy import load
from lbproxy import errors

_TOOLS = ("iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore")


class ProgramError(errors.LbproxyError):
    """The program is no kube-proxy, or lacks a tool; the text says what."""


def version(program: pathlib.Path) -> str:
    """Ask a kube-proxy for its version (`v1.36.0`); ProgramError where it is none."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramError(f"{program} does not run: {error}") from error
    match = re.match(r"Kubernetes (v\S+)", done.stdout)
    if match is None:
        raise ProgramError(f"{program} does not say that it is a kube-proxy: {done.stdout[:100]!r}")
    return match[1]


def command(
    program: pathlib.Path, said: str, backend: load.Backend, master: str, node: str, cluster_cidr: str
) -> list[str]:
    """Return the command line of a kube-proxy of the version `said`, against an API server at this URL."""
    mode = "nftables" if backend is load.Backend.NATIVE else "iptables"
    argv = [
        str(program), "--master", master, "--hostname-override", node, "--proxy-mode", mode,
        "--kube-api-content-type", "application/json", "--cluster-cidr", cluster_cidr,
        # Sizing the connection tracker is for the whole machine, which is not ours.
        "--conntrack-max-per-core", "0",
    ]  # fmt: skip
    # Before 1.31 the mode was behind a gate.
    gated = mode == "nftables" and said.startswith(("v1.29.", "v1.30."))
    return [*argv, "--feature-gates", "NFTablesProxyMode=true"] if gated else argv


def tool_version(backend: load.Backend) -> str:
    """Return what the tool of a backend says of itself: `iptables v1.8.9 (legacy)`."""
    try:
        done = subprocess.run([backend, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ProgramError(f"{backend} does not run: {error}") from error
    return done.stdout.strip()


def tools(folder: pathlib.Path, backend: load.Backend) -> pathlib.Path:
    """Return this folder, made if it is not there, in which `iptables` is the one with this backend."""
    if folder.exists():
        return folder
    folder.mkdir()
    for tool in _TOOLS if backend is not load.Backend.NATIVE else ():
        family, _, rest = tool.partition("-")
        name = f"{family}-{backend.removeprefix('iptables-')}{'-' if rest else ''}{rest}"
        found = shutil.which(name)
        if found is None:
            raise ProgramError(f"{name} is not installed")
        # It looks at the name that it was called by.
        wrapper = folder / tool
        wrapper.write_text(f'#!/bin/sh\nexec "{found}" "$@"\n')
        wrapper.chmod(0o755)
    return folder
