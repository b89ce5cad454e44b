"""Compiles the programs for an installed package: `python -m lbproxy.kernel.shipping`, as root.

A node that is given such a package needs no compiler. One file for each set of features that
kernels may have; of the sizes of maps only that which the programs themselves know must be the
default one, which is that of `sockets`.
"""

import dataclasses
import itertools
import pathlib
import sys
import tempfile
import typing

from lbproxy import abi, trace_abi
from lbproxy.config import config
from lbproxy.kernel import bpffs, bytecode, generation, loader, observers, programs, source


def kernels() -> list[dict[str, int]]:
    """Every set of features that a kernel may have."""
    names = list(source.features())
    every = itertools.product((0, 1), repeat=len(names))
    return [dict(zip(names, values, strict=True)) for values in every]


def make(
    folder: pathlib.Path, sizes: typing.Mapping[str, int], wanted: typing.Iterable[typing.Mapping[str, int]]
) -> list[pathlib.Path]:
    """Compile for maps of these sizes, and each set of features, into a folder; returns the files.

    Raises AgentError, OSError.
    """
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # The compiler wants to see the maps.
        root = pathlib.Path(scratch) / "bpf"
        bpffs.ensure(root)
        try:
            for spec in abi.MAPS.values():
                generation.create(root, spec, abi.map_rows(spec, sizes))
            generation.create(root, generation.TAILS, len(programs.TAILS))
            pins = {name: str(root / name) for name in abi.MAPS}
            for features in wanted:
                text = source.compose(programs.SOURCE, sizes, pins, features)
                path = folder / f"{loader.shipped_key(text)}.json"
                path.write_text(bytecode.encode(loader.compiled(text, programs.PROGRAMS)))
                made.append(path)
            made.append(_observers(folder, sizes))
        finally:
            bpffs.remove(root)
    return made


def _observers(folder: pathlib.Path, sizes: typing.Mapping[str, int]) -> pathlib.Path:
    """What `lbproxy trace` loads, which is the same for every kernel."""
    text = observers.compose(sizes)
    path = folder / f"{loader.shipped_key(text)}.json"
    made = loader.compiled(text, observers.all_programs(), tuple(trace_abi.MAPS))
    path.write_text(bytecode.encode(made))
    return path


if __name__ == "__main__":
    for written in make(bytecode.shipped_dir(), dataclasses.asdict(config.MapRows()), kernels()):
        print(f"compiled: {written}", file=sys.stderr)
