"""`lbproxy support-bundle`: one file to send with a report. What can not be had becomes a note in it."""

import argparse
import contextlib
import gzip
import io
import json
import os
import pathlib
import platform
import stat
import sys
import tarfile
import threading
import time
import typing
import urllib.error

import yaml

from lbproxy import errors, noting, secrecy
from lbproxy.bundle import items
from lbproxy.commands import output
from lbproxy.core import inventory, redaction

_LEFT_OUT: typing.Final = (
    "contents of kubeconfigs, tokens, keys and certificates",
    "environments, and arguments of other processes than the agent",
    "annotations, labels and everything else of objects that is not balanced by",
    "payload of packets",
    "single flows: only how many there are; but for what the trace shows",
)
_TOKEN: typing.Final = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Entry(typing.TypedDict):
    """A line of the manifest; `problem` says why a file is missing or not whole."""

    file: str
    what: str
    bytes: int
    seconds: float
    problem: str


def main(args: argparse.Namespace) -> int:
    """Write the bundle; returns 0 whatever could be had. Raises AgentError where it can not be written."""
    if os.geteuid() != 0:
        raise errors.AgentError("a support bundle needs root: little could be looked at")
    if args.output:
        _check(pathlib.Path(args.output))
    node = items.look(args.bpffs, args.trace_s)
    _learn_secrets(node)
    names = redaction.Pseudonyms() if args.redact else None
    if names is not None:
        _learn_names(names, node)
    made = time.gmtime()
    host = "" if args.redact else f"-{platform.node().split('.')[0]}"
    folder = f"lbproxy-bundle{host}-{time.strftime('%Y%m%dT%H%M%SZ', made)}"
    packed, manifest = _pack(node, folder, names, int(time.time()))
    target = pathlib.Path(args.output or f"{folder}.tar.gz")
    _write(target, packed)
    manifest = [entry for entry in manifest if entry["file"] not in items.unasked(node)]
    for problem, files in _by_problem(manifest).items():
        print(f"lbproxy: {', '.join(files)}: {problem}", file=sys.stderr)
    if str(target) != "-":
        whole = sum(not entry["problem"] for entry in manifest)
        output.write(f"{target}: {whole} of {len(manifest)} files, {len(packed) >> 10} KiB")
        if names is not None:
            output.write(_keep_names(names, target))
    elif names is not None:
        print("lbproxy: who is who is not kept: -o FILE writes it beside the bundle", file=sys.stderr)
    return 0


# --- what is not to be in it ---


def _learn_secrets(node: items.Node) -> None:
    """Know what the agent's secrets are, so that no log or error shows them."""
    path = node.settings.kubeconfig
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        secrecy.keep_kubeconfig(yaml.safe_load(path.read_text()) if path else None)
    with contextlib.suppress(OSError):
        secrecy.keep(_TOKEN.read_text())


def _learn_names(names: redaction.Pseudonyms, node: items.Node) -> None:
    host = platform.node()
    own = node.settings.node_name
    words = (word for argument in node.arguments for word in (argument, argument.partition("=")[2]))
    # As it was given: the agent writes it in lower case.
    given = {word.strip() for word in words if word.strip().lower() == own}
    names.learn("node", {host, host.split(".")[0], own, *given})
    try:
        with node.maps() as opened:
            found = inventory.read(opened)
    except (errors.AgentError, OSError):
        return
    for rejected in noting.read(node.root).rejected:
        namespace, slash, name = rejected.name.rpartition("/")
        if rejected.kind in ("Service", "EndpointSlice") and slash:
            names.learn("namespace", {namespace})
            names.learn("service", {name})
    backends = [*found.orphans, *(one for port in found.ports for one in port.backends)]
    names.learn("node", {one.node for one in backends})
    names.learn("zone", {one.zone for one in backends})
    names.learn("namespace", {port.key.service.namespace for port in found.ports})
    names.learn("service", {port.key.service.name for port in found.ports})
    names.learn("port", {port.key.port_name for port in found.ports})


def _cleaned(text: str) -> str:
    return redaction.scrubbed(secrecy.without(text))


# --- what is ---


def _pack(
    node: items.Node, folder: str, names: redaction.Pseudonyms | None, now_s: int
) -> tuple[bytes, list[Entry]]:
    """The archive, and its manifest."""
    manifest: list[Entry] = []
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime, entry.mode = len(content), now_s, 0o600
            archive.addfile(entry, io.BytesIO(content))

        for item in items.ITEMS:
            content, entry = _collect(item, node, names)
            manifest.append(entry)
            if content is not None:
                add(item.file, content)
        told = {"files": manifest, "left_out": _LEFT_OUT, "redacted": names is not None}
        add("manifest.json", (json.dumps(told, indent=2) + "\n").encode())
    return packed.getvalue(), manifest


def _collect(
    item: items.Item, node: items.Node, names: redaction.Pseudonyms | None
) -> tuple[bytes | None, Entry]:
    """One file, or why there is none: in its own thread, since it may hang."""
    results: list[bytes] = []
    problems: list[str] = []

    def run() -> None:
        try:
            results.append(_rendered(item.collect(node), names))
        except Exception as error:  # whatever it is, the others may tell more
            problems.append(_said(error))

    started = time.monotonic()
    thread = threading.Thread(target=run, name=item.file, daemon=True)
    thread.start()
    thread.join(item.seconds)
    content = results[0] if results else None
    problem = problems[0] if problems else ""
    if content is None and not problem:
        problem = f"took longer than {item.seconds:g} s"
    if content is not None and len(content) > items.MOST_BYTES:
        content, problem = content[: items.MOST_BYTES], f"cut off: it has {len(content)} bytes"
    problem = _cleaned(problem)
    return content, Entry(
        file=item.file,
        what=item.what,
        bytes=len(content or b""),
        seconds=round(time.monotonic() - started, 2),
        problem=names.text(problem) if names else problem,
    )


def _said(error: Exception) -> str:
    """What went wrong; of what nobody expects also what kind of error it is."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _said(error.reason)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, errors.LbproxyError | OSError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _by_problem(manifest: typing.Iterable[Entry]) -> dict[str, list[str]]:
    """The files that are missing or not whole, by why: one cause often has several."""
    found: dict[str, list[str]] = {}
    for entry in manifest:
        if entry["problem"]:
            found.setdefault(entry["problem"], []).append(entry["file"])
    return found


def _rendered(found: object, names: redaction.Pseudonyms | None) -> bytes:
    """Text as it is, all else as JSON; without secrets, and with pseudonyms."""
    if isinstance(found, str):
        text = _cleaned(found)
        if names:
            names.learn_from(text)
        return (names.text(text) if names else text).encode()
    value = redaction.scrubbed_value(items.json_of(found), _cleaned)
    if names:
        names.learn_from(json.dumps(value))
    return (json.dumps(names.value(value) if names else value, indent=2, ensure_ascii=False) + "\n").encode()


def _check(target: pathlib.Path) -> None:
    """Refuse before anything is collected. Raises ConfigError.

    The bundle takes the place of what is there: nobody wants that of /dev/null or /dev/stdout, a link.
    """
    if str(target) == "-":
        if sys.stdout.isatty():
            raise errors.ConfigError("-o - writes an archive: not to a terminal")
        return
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(target.lstat().st_mode):
            raise errors.ConfigError(f"-o {target} is there, and no plain file; -o - is standard output")


def _write(target: pathlib.Path, packed: bytes) -> None:
    """Write it whole or not at all, for nobody else to read."""
    if str(target) == "-":
        output.write_bytes(packed)
        return
    try:
        _put(target, packed)
    except OSError as error:
        hint = "; -o names another place, -o - is standard output"
        raise errors.AgentError(f"cannot write {target}: {error.strerror}{hint}") from error


def _put(target: pathlib.Path, content: bytes) -> None:
    """Put a file in the place of whatever is there, never through a link. Raises OSError."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        draft.replace(target)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _keep_names(names: redaction.Pseudonyms, target: pathlib.Path) -> str:
    """Write down who is who, beside the bundle."""
    path = target.with_name(f"{target.name.removesuffix('.tar.gz')}.names.json")
    text = json.dumps({pseudonym: name for name, pseudonym in names.given.items()}, indent=2) + "\n"
    try:
        _put(path, text.encode())
    except OSError as error:
        return f"who is who could not be written to {path}: {error.strerror}"
    return f"{path}: who is who; keep it to yourself"
