"""What the image is made of: listed whole, in a form that others read, and asked for as it is pinned."""

import json
import pathlib
import re
import subprocess
import sys
import typing

import pytest

from deploy import audit
from lbproxy import sbom

ROOT = pathlib.Path(__file__).parents[2]
REQUIREMENTS = ROOT / "deploy/requirements.txt"
# What CycloneDX 1.5 has of each, and needs.
TYPES = {"application", "library", "file"}
SUMS = {"SHA-256": r"[0-9a-f]{64}"}
PURL = re.compile(r"pkg:(pypi|deb/debian|generic)/[a-z0-9.+-]+@[A-Za-z0-9.+~%_-]+")
SERIAL = re.compile(r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def made() -> dict[str, typing.Any]:
    argv = [sys.executable, "-m", "lbproxy.sbom", "--requirements", str(REQUIREMENTS)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, typing.Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def document() -> dict[str, typing.Any]:
    return made()


def wrong_with(component: dict[str, typing.Any]) -> list[str]:
    """What the schema would refuse."""
    told = []
    if component.get("type") not in TYPES or not component.get("name"):
        told.append("type or name")
    known = {"type", "bom-ref", "name", "version", "purl", "hashes", "licenses"}
    told += sorted(component.keys() - known)
    for one in component.get("hashes", []):
        if one.keys() != {"alg", "content"} or not re.fullmatch(SUMS.get(one["alg"], "-"), one["content"]):
            told.append(f"hash {one}")
    licences = component.get("licenses", [])
    for one in licences:
        if set(one) == {"expression"}:
            # One expression stands alone.
            told += ["expression"] if len(licences) > 1 else []
        elif set(one) != {"license"} or set(one["license"]) not in ({"name"}, {"id"}):
            told.append(f"licence {one}")
    if "purl" in component and not PURL.fullmatch(component["purl"]):
        told.append(component["purl"])
    return told


def test_the_document_is_what_the_schema_asks_for(document: dict[str, typing.Any]) -> None:
    assert (document["bomFormat"], document["specVersion"], document["version"]) == ("CycloneDX", "1.5", 1)
    assert SERIAL.fullmatch(document["serialNumber"])
    root, components = document["metadata"]["component"], document["components"]
    assert {one["name"]: wrong for one in (root, *components) if (wrong := wrong_with(one))} == {}
    refs = [one["bom-ref"] for one in (root, *components)]
    assert len(set(refs)) == len(refs)
    [edge] = document["dependencies"]
    assert [edge["ref"], *edge["dependsOn"]] == refs
    assert wrong_with({"type": "thing", "name": "x", "licenses": [{"expression": "a"}, {"license": {}}]})


def test_everything_that_is_installed_is_in_it(document: dict[str, typing.Any]) -> None:
    components = {one["bom-ref"]: one for one in document["components"]}
    pins = sbom.pinned(REQUIREMENTS.read_text())
    assert [f"{name}=={version}" for name, version, _ in pins] == audit.pinned(REQUIREMENTS.read_text())
    python = [one for ref, one in components.items() if ref.startswith("pkg:pypi/")]
    assert {(one["name"], one["version"]) for one in python} == {(name, number) for name, number, _ in pins}
    assert all(one["hashes"] for one in python)
    assert [one["name"] for one in python if not one.get("licenses")] == []
    sources = {one["name"] for one in components.values() if one["type"] == "file"}
    assert sources == {str(path.relative_to(ROOT)) for path in (ROOT / "bpf").rglob("*.[ch]")}
    # In the image these are Debian's; here whatever is installed.
    dockerfile = (ROOT / "deploy/Dockerfile").read_text().partition("AS agent")[2]
    wanted = set(re.findall(r"\b(libbpf1|python3-bpfcc|python3|linux-libc-dev)\b", dockerfile))
    found = {one["name"] for ref, one in components.items() if ref.startswith("pkg:deb/")}
    assert len(wanted) == 4
    assert not found or wanted <= found


def test_the_same_contents_are_the_same_document(document: dict[str, typing.Any]) -> None:
    assert made() == document
    other = sbom.document([sbom.Pinned("a", "1", ())], {}, {})
    assert other["serialNumber"] != document["serialNumber"]


def test_each_image_has_its_own() -> None:
    stages = re.split(r"^FROM ", (ROOT / "deploy/Dockerfile").read_text(), flags=re.MULTILINE)
    last = {stage.split()[2]: stage for stage in stages if stage.split()[1:2] == ["AS"]}
    for name in ("slim", "full"):
        # After whatever else is installed in it.
        runs = [line for line in last[name].splitlines() if line.startswith("RUN ")]
        assert runs[-1].startswith("RUN python -m lbproxy.sbom --requirements ")


@pytest.mark.parametrize(
    ("metadata", "classifiers", "told"),
    [
        ({"License-Expression": "MIT", "License": "x"}, ["License :: Other"], [{"expression": "MIT"}]),
        (
            {"License": "x" * 65},
            ["License :: OSI Approved :: MIT License"],
            [{"license": {"name": "MIT License"}}],
        ),
        ({"License": "BSD"}, ["Topic :: Internet"], [{"license": {"name": "BSD"}}]),
        ({"License": "x" * 65}, [], []),
    ],
)
def test_licences_are_those_of_the_metadata(
    metadata: dict[str, str], classifiers: list[str], told: list[object]
) -> None:
    assert sbom.licences(metadata, classifiers) == told


# --- the audit ---

WITHDRAWN = (
    "WARNING: The candidate selected for download or install is a yanked version: 'six' candidate "
    "(version 1.0 at somewhere)\nReason for being yanked: broken\nWould install six-1.0\n"
)
MISMATCH = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n"
AWAY = "WARNING: Retrying (Retry(total=0)) after connection broken by ...\nERROR: No matching distribution\n"


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (0, "Would install six-1.1\n", []),
        (0, WITHDRAWN, ["six 1.0 was withdrawn"]),
        (1, MISMATCH, ["THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."]),
        (1, "", ["pip ended with status 1"]),
        (1, AWAY, None),
    ],
)
def test_what_pip_says_is_understood(status: int, said: str, told: list[str] | None) -> None:
    assert audit.problems(status, said) == told


def test_every_package_of_the_image_has_a_hash() -> None:
    text = REQUIREMENTS.read_text()
    assert len(audit.pinned(text)) > 10
    assert audit.without_hash(text) == []
    assert audit.without_hash("a==1 \\\n    --hash=sha256:0\nb==2\n# c==3\n") == ["b==2"]
