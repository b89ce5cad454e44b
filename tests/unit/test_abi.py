"""The one reading of bpf/abi.h that C and Python share, checked against the C compiler itself."""

import pathlib
import re
import subprocess
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.core import tables

ROWS: dict[str, tuple[typing.Any, typing.Any]] = {
    "frontend_key": (tables.FrontendKey, tables.frontend_key),
    "frontend": (tables.Frontend, tables.frontend),
    "backend": (tables.Backend, tables.backend),
    "service_meta": (tables.ServiceMeta, tables.service_meta),
    "locality": (tables.Locality, tables.locality),
    "settings": (tables.Settings, tables.settings),
    "device": (tables.Device, tables.device),
    "tunnel_end_key": (tables.TunnelEndKey, tables.tunnel_end_key),
    "flow_key": (tables.FlowKey, tables.flow_key),
    "flow": (tables.Flow, tables.flow),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes and offsets as gcc says, by `struct` and `struct.field`, and the constants."""
    folder = tmp_path_factory.mktemp("abi")
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/types.h>", '#include "abi.h"']
    lines.append("int main(void) {")
    header = (abi.source_dir() / "abi.h").read_text()
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\}", header, re.DOTALL | re.MULTILINE):
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for field in re.findall(r"^\t__\w+ (\w+)", body, re.MULTILINE):
            where = f"offsetof(struct {name}, {field})"
            lines.append(f'printf("{name}.{field} %zu\\n", {where});')
    lines += [
        f'printf("{constant} %zu\\n", (size_t)({constant}));'
        for constant in re.findall(r"^#define (LB_\w+) +[0-9]", header, re.MULTILINE)
    ]
    (folder / "abi.c").write_text("\n".join([*lines, "}"]))
    command = ["gcc", "-Wall", "-Werror", f"-I{abi.source_dir()}", "-o", "abi", "abi.c"]
    subprocess.run(command, cwd=folder, check=True)
    said = subprocess.run(["./abi"], cwd=folder, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in map(str.split, said.splitlines())}


def test_structs_are_as_the_compiler_lays_them_out(compiled: dict[str, int]) -> None:
    read = {layout.name: layout.size for layout in abi.LAYOUTS.values()}
    read |= {
        f"{layout.name}.{field.name}": field.offset
        for layout in abi.LAYOUTS.values()
        for field in layout.fields
    }
    assert read == {name: number for name, number in compiled.items() if not name.startswith("LB_")}
    assert len(abi.LAYOUTS) >= 15


def test_constants_are_as_the_compiler_reads_them(compiled: dict[str, int]) -> None:
    constants = {name: number for name, number in compiled.items() if name.startswith("LB_")}
    assert constants.items() <= abi.CONSTANTS.items()
    assert abi.constant("ABI_VERSION") == constants["LB_ABI_VERSION"]


def test_the_assertions_hold_in_c_and_can_fail(tmp_path: pathlib.Path) -> None:
    def compiles(assertions: str) -> bool:
        text = f'#include <linux/types.h>\n#include "abi.h"\n{assertions}'
        (tmp_path / "check.c").write_text(text)
        command = ["gcc", f"-I{abi.source_dir()}", "-fsyntax-only", "check.c"]
        return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 0

    assert compiles(abi.assertions())
    assert not compiles(abi.assertions().replace("frontend, slot_count) == 8", "frontend, slot_count) == 12"))


def values(layout: abi.Layout) -> st.SearchStrategy[tuple[typing.Any, ...]]:
    made: list[st.SearchStrategy[typing.Any]] = []
    for field in layout.fields:
        if field.name.startswith("pad"):
            continue
        if field.code.endswith("s"):
            made.append(st.binary(min_size=field.size, max_size=field.size))
        elif field.code[0].isdigit():
            count = int(field.code[:-1])
            made += [st.integers(0, 2 ** (8 * field.size // count) - 1)] * count
        else:
            made.append(st.integers(0, 2 ** (8 * field.size) - 1))
    return st.tuples(*made)


@pytest.mark.parametrize("name", sorted(abi.LAYOUTS))
@given(data=st.data())
def test_rows_survive_packing(name: str, data: st.DataObject) -> None:
    layout = abi.LAYOUTS[name]
    row = data.draw(values(layout))
    packed = layout.pack(*row)
    assert len(packed) == layout.size
    assert layout.unpack(packed) == row
    assert layout.unpack(memoryview(packed)) == row


@pytest.mark.parametrize("name", sorted(ROWS))
@given(data=st.data())
def test_named_rows_survive_packing(name: str, data: st.DataObject) -> None:
    row_type, unpack = ROWS[name]
    assert row_type._fields == abi.LAYOUTS[name].names
    row = row_type(*data.draw(values(abi.LAYOUTS[name])))
    assert unpack(row.pack()) == row


def test_padding_is_zero_and_addresses_keep_their_order() -> None:
    row = tables.Frontend(1, 2, 3, 4, 5, 6, 7).pack()
    layout = abi.LAYOUTS["frontend"]
    assert row[layout.offset("pad") :] == bytes(layout.size - layout.offset("pad"))
    key = tables.FrontendKey(bytes(range(16)), b"\x01\xbb", 6, 0).pack()
    assert key == bytes([*range(16), 0x01, 0xBB, 6, 0])


@pytest.mark.parametrize("body", ["\tint field;\n", "\t__u32 a, b;\n", "\tstruct other field;\n", "x\n"])
def test_a_field_that_can_not_be_read_is_an_error(body: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        abi._parse_struct("broken", body)


def test_every_map_of_the_header_is_read() -> None:
    declared = re.findall(r"^LB_MAP\(", (abi.source_dir() / "maps.h").read_text(), re.MULTILINE)
    assert len(abi.MAPS) == len(declared)
    assert {table.value for table in tables.Table} <= abi.MAPS.keys()
    spec = abi.MAPS["frontends"]
    assert (spec.type, spec.key_size, spec.value_size) == (
        "hash",
        abi.LAYOUTS["frontend_key"].size,
        abi.LAYOUTS["frontend"].size,
    )


def test_sizes_come_from_configuration_or_from_the_header() -> None:
    sizes = {name: 10 + number for number, name in enumerate(abi.row_names())}
    assert abi.map_rows(abi.MAPS["frontends"], sizes) == sizes["frontends"]
    assert abi.map_rows(abi.MAPS["backend_stats"], sizes) == sizes["backends"]
    assert abi.map_rows(abi.MAPS["settings"], sizes) == 1
    assert abi.map_rows(abi.MAPS["counters"], sizes) == abi.constant("COUNTERS")


def test_a_name_that_the_header_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="LB_NO_SUCH_THING"):
        abi.constant("NO_SUCH_THING")
    with pytest.raises(TypeError, match=r"bpf/abi\.h says"):
        tables._layout("backend", tables.Frontend)
