"""Whether what the image is made of can still be had as it was pinned: `make audit`.

Asks the package index that pip is configured for, by pip: every version of deploy/requirements.txt must
be there, with one of its hashes, and not be withdrawn. Where no index answers that is said, and nothing
is wrong. Known weaknesses are not looked up: no such list can be had without a service of its own.
"""

import pathlib
import re
import subprocess
import sys
import typing

REQUIREMENTS: typing.Final = pathlib.Path(__file__).with_name("requirements.txt")
TIMEOUT_S: typing.Final = 300
_UNREACHABLE: typing.Final = re.compile(
    r"Retrying \(|connection broken|NewConnectionError|Name or service not known|ReadTimeoutError"
)
_YANKED: typing.Final = re.compile(r"yanked version: '([^']+)' candidate \(version (\S+)")
_ERROR: typing.Final = re.compile(r"^ERROR: (.*)$", re.MULTILINE)


def pinned(requirements: str) -> list[str]:
    """The packages of a requirements file, as NAME==VERSION."""
    return re.findall(r"^[\w.-]+==[^\s;]+", requirements, re.MULTILINE)


def without_hash(requirements: str) -> list[str]:
    """Those of them that no hash follows."""
    lines = re.sub(r"\\\n\s*", " ", requirements).splitlines()
    return [line.split()[0] for line in lines if re.match(r"[\w.-]+", line) and "--hash=sha256:" not in line]


def problems(status: int, said: str) -> list[str] | None:
    """What pip's exit status and output amount to; None where it could not ask."""
    if status and _UNREACHABLE.search(said):
        return None
    found = [f"{name} {version} was withdrawn" for name, version in _YANKED.findall(said)]
    if status:
        found += _ERROR.findall(said) or [f"pip ended with status {status}"]
    return found


def ask() -> tuple[int, str]:
    """Have pip find every package and check its hash; nothing is installed."""
    argv = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--require-hashes", "--no-cache-dir"]
    argv += ["--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *argv, "-r", str(REQUIREMENTS)],
        capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """Say what was found; 1 where something is wrong."""
    text = REQUIREMENTS.read_text()
    wrong = [f"{one} has no hash" for one in without_hash(text)]
    found = problems(*ask())
    if found is None:
        print("audit: skipped, no package index answers", file=sys.stderr)
    for one in (*wrong, *(found or ())):
        print(f"audit: {one}", file=sys.stderr)
    if wrong or found:
        return 1
    if found is not None:
        print(f"audit: {len(pinned(text))} packages are there, with their hashes, and none was withdrawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
