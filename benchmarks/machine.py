"""Which machine, kernel, commit and versions a run was made with."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
_PACKAGES = ("aiohttp", "kubernetes_asyncio", "msgspec", "pyroute2")


def machine() -> dict[str, str]:
    """Describe the machine."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": str(os.cpu_count()),
        "memory": f"{int(memory[1]) / 1e6:.0f} GB" if memory else "",
        "virtual": "yes" if " hypervisor" in cpuinfo else "no, as far as the CPU says",
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }


def software() -> dict[str, str]:
    """Describe what is measured, and what it runs on."""
    commit = _output("git", "rev-parse", "HEAD")
    # What a run itself writes does not count: its results and the pages made of them.
    changed = _output("git", "status", "--porcelain", "--", ".", *(f":!{path}" for path in _REPORTED))
    return {
        "commit": commit or "unknown",
        "dirty": str(bool(changed)).lower() if commit else "unknown",
        "python": platform.python_version(),
        "compiler": _first_line("gcc", "--version"),
        "libbpf": _debian("libbpf1"),
        "bcc": _debian("python3-bpfcc"),
        **{name: _version(name) for name in _PACKAGES},
        "executable": os.path.basename(sys.executable),
    }


_REPORTED = (
    "benchmarks/results",
    "README.md",
    "docs/benchmarks.md",
    "docs/benchmarks.html",
    "docs/benchmarks.png",
    "docs/comparison.md",
    "docs/balancing.md",
)


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first_line(*argv: str) -> str:
    return _output(*argv).partition("\n")[0]


def _debian(package: str) -> str:
    return _output("dpkg-query", "-W", "-f=${Version}", package)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
