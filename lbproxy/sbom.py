"""What this installation is made of, as a CycloneDX document: `python -m lbproxy.sbom`.

An image says so itself, when it is built: which Python packages, with the hashes that they were
installed by and their licences; which packages of Debian; and the sources of the BPF programs.
The same contents give the same document: no time and no random number is in it.
"""

import argparse
import hashlib
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import typing
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping

import lbproxy
from lbproxy import abi

SPEC_VERSION: typing.Final = "1.5"
_ROOT: typing.Final = "lbproxy"
_PINNED: typing.Final = re.compile(
    r"^([\w.-]+)==([^\s;\\]+)((?:[ \t]*\\\n[ \t]*--hash=sha256:[0-9a-f]{64})*)", re.M
)
_HASH: typing.Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_CLASSIFIER: typing.Final = "License :: "
_SPDX: typing.Final = re.compile(r"SPDX-License-Identifier: (.+?)(?: \*/)?$", re.MULTILINE)
_LONGEST_NAME: typing.Final = 64
_SYSTEM: typing.Final = "debian"

Component = dict[str, typing.Any]


class Pinned(typing.NamedTuple):
    """A package that is installed by its version, and by one of these SHA-256 sums."""

    name: str
    version: str
    hashes: tuple[str, ...]


def pinned(requirements: str) -> list[Pinned]:
    """What a requirements file with hashes holds."""
    return [
        Pinned(name, version, tuple(_HASH.findall(rest)))
        for name, version, rest in _PINNED.findall(requirements)
    ]


def document(
    packages: list[Pinned], system: Mapping[str, str], sources: Mapping[str, bytes]
) -> dict[str, typing.Any]:
    """The document; `system` are Debian's packages and their versions, `sources` files of bpf/."""
    root: Component = {
        "type": "application",
        "bom-ref": _ROOT,
        "name": "lbproxy",
        "version": lbproxy.__version__,
        "purl": f"pkg:generic/lbproxy@{lbproxy.__version__}",
        "licenses": [{"expression": "Apache-2.0"}],
    }
    components = [
        *map(_python, sorted(packages)),
        *(_debian(name, version) for name, version in sorted(system.items())),
        *(_source(name, text) for name, text in sorted(sources.items())),
    ]
    refs = [one["bom-ref"] for one in components]
    body = {
        "metadata": {"component": root},
        "components": components,
        "dependencies": [{"ref": _ROOT, "dependsOn": refs}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(body, sort_keys=True))
    head = {"bomFormat": "CycloneDX", "specVersion": SPEC_VERSION, "serialNumber": f"urn:uuid:{serial}"}
    return {**head, "version": 1, **body}


def licences(metadata: Mapping[str, str], classifiers: list[str]) -> list[dict[str, typing.Any]]:
    """A package's licences, as its metadata has them: an expression, else what it is classified as."""
    if expression := metadata.get("License-Expression"):
        return [{"expression": expression}]
    named = [one.rpartition(" :: ")[2] for one in classifiers if one.startswith(_CLASSIFIER)]
    if not named and 0 < len(text := metadata.get("License", "").strip()) <= _LONGEST_NAME:
        named = [text]
    return [{"license": {"name": name}} for name in named if name != "OSI Approved"]


def _python(package: Pinned) -> Component:
    name = re.sub(r"[-_.]+", "-", package.name).lower()
    purl = f"pkg:pypi/{name}@{urllib.parse.quote(package.version)}"
    found: Component = {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
        # Of each file that may be installed for it: which one that is, the machine decides.
        "hashes": [{"alg": "SHA-256", "content": content} for content in package.hashes],
    }
    try:
        metadata = importlib.metadata.metadata(package.name)
    except importlib.metadata.PackageNotFoundError:
        return found
    known = {field: metadata[field] for field in ("License-Expression", "License") if field in metadata}
    told = licences(known, metadata.get_all("Classifier") or [])
    return {**found, "licenses": told} if told else found


def _debian(name: str, version: str) -> Component:
    purl = f"pkg:deb/{_SYSTEM}/{name}@{urllib.parse.quote(version)}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _source(name: str, text: bytes) -> Component:
    found: Component = {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(text).hexdigest()}],
    }
    licence = _SPDX.search(text.decode(errors="replace"))
    return {**found, "licenses": [{"expression": licence[1].strip()}]} if licence else found


def debian_packages() -> dict[str, str]:
    """What dpkg has installed, and in which versions; empty where there is none."""
    try:
        told = subprocess.run(
            ["dpkg-query", "-W", "-f=${db:Status-Abbrev} ${Package} ${Version}\n"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return {}
    rows = (line.split() for line in told.splitlines())
    return {row[1]: row[2] for row in rows if len(row) == 3 and row[0] == "ii"}


def bpf_sources() -> dict[str, bytes]:
    """The sources of the programs, by name."""
    return {f"bpf/{name}": text for name, text in _files(abi.source_dir())}


def _files(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*.[ch]")):
        yield str(path.relative_to(folder)), path.read_bytes()


def main(arguments: list[str]) -> int:
    """Print the document."""
    parser = argparse.ArgumentParser(prog="python -m lbproxy.sbom", description=__doc__.split("\n")[0])
    parser.add_argument("--requirements", type=pathlib.Path, required=True, help="what pip installed from")
    parser.add_argument("--only", default="", help="of Debian's packages only these, separated by commas")
    given = parser.parse_args(arguments)
    system = debian_packages()
    if given.only:
        system = {name: version for name, version in system.items() if name in given.only.split(",")}
    made = document(pinned(given.requirements.read_text()), system, bpf_sources())
    print(json.dumps(made, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
