"""One C text for BCC out of the files of bpf/, and its fingerprint.

BCC rewrites map accesses in the main file only: in an included one they compile
and then fail to load. So local includes are put in place, once each, with #line
so that errors still name the file.
"""

import hashlib
import pathlib
import re
import typing

from lbproxy import abi

# Where the kernel has MPTCP; without it, a program that asks for such a socket does not load.
_MPTCP = pathlib.Path("/proc/sys/net/mptcp")
# Where the kernel describes its structs; without it, no program may look into one.
_BTF = pathlib.Path("/sys/kernel/btf/vmlinux")
_INCLUDE = re.compile(r'^#include "([\w./]+)"\s*$')


def flatten(main: str) -> str:
    """The text of a source file with its local includes in place."""
    seen: set[str] = set()

    def lines(name: str) -> typing.Iterator[str]:
        seen.add(name)
        yield f'#line 1 "bpf/{name}"'
        text = (abi.source_dir() / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            match = _INCLUDE.match(line)
            if match is None:
                yield line
            elif match.group(1) not in seen:
                yield from lines(match.group(1))
                yield f'#line {number + 1} "bpf/{name}"'
            else:
                yield ""

    return "\n".join(lines(main)) + "\n"


def fingerprint(main: str, sizes: typing.Mapping[str, int]) -> str:
    """What makes two datapaths the same: their sources, layouts and sizes. 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(flatten(main).encode())
    digest.update(abi.assertions().encode())
    digest.update(repr(sorted(sizes.items())).encode())
    digest.update(repr(features()).encode())
    return digest.hexdigest()


def features() -> dict[str, int]:
    """What the programs may use of this kernel beyond what every kernel must have."""
    return {"MPTCP": int(_MPTCP.exists()), "BTF": int(_BTF.exists())}


def compose(
    main: str,
    sizes: typing.Mapping[str, int],
    pins: typing.Mapping[str, str],
    used: typing.Mapping[str, int] | None = None,
) -> str:
    """The whole text to compile: sizes and pin paths as #define, then the flattened source.

    `pins` gives each map's absolute path on the bpffs; the array of tail calls is beside them. Where there is
    no table that flows are to be moved out of, `flows` itself stands for it. `used` are features, where they
    are to be those of another kernel.
    """
    beside = pathlib.Path(next(iter(pins.values()))).parent
    pins = {abi.FLOWS_BEFORE: pins["flows"], **pins, abi.TAILS: str(beside / abi.TAILS)}
    head = [f"#define LB_ROWS_{name.upper()} {rows}" for name, rows in sorted(sizes.items())]
    head += [f'#define LB_PIN_{name} "{path}"' for name, path in sorted(pins.items())]
    head += [f"#define LB_{name} {value}" for name, value in (used or features()).items()]
    body = flatten(main)
    return "\n".join(head) + "\n" + body + "\n" + '#line 1 "abi.py"\n' + abi.assertions()
