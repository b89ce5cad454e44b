"""Tries what lbproxy needs of the kernel: with programs and maps that are gone again at once.

Nothing is attached, pinned or mounted.
"""

import contextlib
import importlib.util
import os
import pathlib
import platform
import typing

from lbproxy import abi
from lbproxy.core.preflight import facts
from lbproxy.kernel import bytecode, features, libbpf, loader, programs, source, trials

_JIT: typing.Final = pathlib.Path("/proc/sys/net/core/bpf_jit_enable")
_BTF: typing.Final = pathlib.Path("/sys/kernel/btf/vmlinux")
_HEADER: typing.Final = pathlib.Path("/usr/include/linux/bpf.h")
# The maps of bpf/maps.h that not every kernel with BPF has, and since when.
_MAPS_SINCE: typing.Final = {"lru_hash": "4.10", "lpm_trie": "4.11"}
_MMAPABLE: typing.Final = 1 << 10
_NO_PREALLOC: typing.Final = 1
_ROW_BYTES: typing.Final = 64  # that the kernel adds to each, about
_BUCKET_BYTES: typing.Final = 16


def kernel(*, allowed: bool) -> facts.Kernel:
    """What this kernel is and has; `allowed` says that this process may load programs.

    Where it may not, a refusal says nothing of the kernel.
    """
    found = tuple(_features()) if allowed else tuple(one._replace(found=None) for one in _features())
    return facts.Kernel(
        release=platform.release(),
        machine=platform.machine(),
        features=found,
        tcx=features.has_tcx() if allowed else None,
        jit=_jit(),
        btf=_BTF.exists(),
    )


def _features() -> typing.Iterator[facts.Feature]:
    for one in features.FEATURES:
        if one.helper is None:
            answer = trials.prog_type(one.prog_type)
        else:
            answer = trials.helper(one.prog_type, one.helper)
        yield facts.Feature(one.what, one.since, answer)
    for kind, since in _MAPS_SINCE.items():
        spec = next(spec for spec in abi.MAPS.values() if spec.type == kind)
        answer = trials.map_kind(kind, spec.key_size, spec.value_size, spec.flags)
        yield facts.Feature(f"maps of type {kind}", since, answer)
    yield facts.Feature("arrays that processes can map", "5.5", trials.map_kind("array", 4, 8, _MMAPABLE))
    yield facts.Feature("reading and writing maps in batches", "5.6", trials.batches())
    yield facts.Feature("links to cgroups", "5.7", trials.links())


def _jit() -> bool | None:
    try:
        return _JIT.read_text().strip() != "0"
    except OSError:
        return None


def programs_of(sizes: typing.Mapping[str, int], *, adopted: bool, trial: bool) -> facts.Programs:
    """Where the programs would come from; with `trial`, kept ones are shown to the verifier."""
    # The paths of pins are part of the text, and not of what tells copies apart.
    text = source.compose(programs.SOURCE, sizes, {name: f"/none/{name}" for name in abi.MAPS})
    kept = loader.kept(text)
    if adopted or kept is None or not trial:
        return facts.Programs(adopted=adopted, kept=kept is not None, loaded=0, lacks=tuple(_lacks()))
    try:
        refused = _try(kept, sizes)
    except (OSError, KeyError, ValueError):
        # No memory for the maps, or a copy that is not what it should be: a start would compile anew.
        return facts.Programs(kept=False, loaded=0, lacks=tuple(_lacks()))
    return facts.Programs(loaded=len(programs.of_this_kernel()) - len(refused), refused=refused)


def _try(kept: bytecode.Programs, sizes: typing.Mapping[str, int]) -> tuple[facts.Refusal, ...]:
    with contextlib.ExitStack() as stack:
        maps = {}
        for spec in abi.MAPS.values():
            rows = abi.map_rows(spec, sizes)
            maps[spec.name] = libbpf.map_create(
                spec.type, spec.name, spec.key_size, spec.value_size, rows, spec.flags
            )
            stack.callback(os.close, maps[spec.name])
        maps[abi.TAILS] = libbpf.map_create("prog", abi.TAILS, 4, 4, len(programs.TAILS), 0)
        stack.callback(os.close, maps[abi.TAILS])
        refused = loader.trial(kept, maps)
    return tuple(
        facts.Refusal(program.name, why, program not in programs.SOCKET) for program, why in refused.items()
    )


def _lacks() -> typing.Iterator[str]:
    """What a compilation needs and is not here."""
    if importlib.util.find_spec("bcc") is None:
        yield "python3-bpfcc for this Python"
    elif not any(pathlib.Path("/usr/lib").glob("**/libbcc.so*")):
        yield "libbcc"
    if not _HEADER.exists():
        yield f"{_HEADER} (linux-libc-dev)"
    if not (abi.source_dir() / "headers").is_dir():
        yield f"{abi.source_dir() / 'headers'}"


def map_bytes(sizes: typing.Mapping[str, int]) -> int:
    """About how much kernel memory the maps of these sizes take."""
    total = 0
    for spec in abi.MAPS.values():
        rows = abi.map_rows(spec, sizes)
        if spec.type == "array":
            total += rows * _up(spec.value_size)
            continue
        if spec.type in ("hash", "lru_hash"):
            total += _BUCKET_BYTES << (rows - 1).bit_length()
        if not spec.flags & _NO_PREALLOC:  # else rows are made as they come
            total += rows * (_up(spec.key_size) + _up(spec.value_size) + _ROW_BYTES)
    return total


def _up(size: int) -> int:
    return (size + 7) // 8 * 8
