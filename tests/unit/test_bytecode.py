"""Compiled programs between two starts: which copies are used, and which are not."""

import os
import pathlib
import secrets
import shutil
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy import abi
from lbproxy.kernel import bytecode, programs, source

INSTRUCTION = struct.Struct("=BBhi")
MAP_FD = 1 << 4
MAPS = {7: "flows", 9: "settings"}


def load_map(fd: int) -> bytes:
    return INSTRUCTION.pack(0x18, MAP_FD | 1, 0, fd) + INSTRUCTION.pack(0, 0, 0, 0)


CODE = INSTRUCTION.pack(0xB7, 0, 0, 7) + load_map(7) + load_map(9) + INSTRUCTION.pack(0x95, 0, 0, 0)


@pytest.fixture
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lbproxy"


def test_a_program_gets_the_maps_of_whoever_loads_it() -> None:
    program = bytecode.unlinked(CODE, MAPS)
    assert program.uses == {1: "flows", 3: "settings"}
    assert bytecode.linked(program, {"flows": 7, "settings": 9}) == CODE
    other = bytecode.linked(program, {"flows": 70_000, "settings": 9})
    assert other == CODE[:8] + load_map(70_000) + load_map(9) + CODE[-8:]


def test_the_offset_of_an_error_is_this_kernels() -> None:
    load = INSTRUCTION.pack(0x61, 0x21, abi.constant("SK_ERR"), 0)  # r1 = *(u32 *)(r2 + …)
    other = INSTRUCTION.pack(0x61, 0x21, 8, 0) + INSTRUCTION.pack(0x63, 0x21, abi.constant("SK_ERR"), 0)
    found = bytecode.with_sk_err(CODE + load + other, 284)
    assert found == CODE + INSTRUCTION.pack(0x61, 0x21, 284, 0) + other
    unknown = bytecode.with_sk_err(CODE + load + other, None)
    assert unknown == CODE + INSTRUCTION.pack(0xB4, 0x01, 0, 0) + other  # w1 = 0


def test_a_number_that_stands_for_another_gives_way_to_it() -> None:
    stands, other = abi.constant("MOVING"), abi.constant("MOST_UNASSURED")
    code = [INSTRUCTION.pack(0xB7, 3, 0, stands), INSTRUCTION.pack(0xB7, 4, 0, 5), load_map(stands)]
    found = bytecode.with_numbers(b"".join(code), {stands: 1, other: 7})
    assert found == INSTRUCTION.pack(0xB7, 3, 0, 1) + code[1] + code[2]


def test_a_map_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(KeyError):
        bytecode.unlinked(CODE, {7: "flows"})


@given(
    st.dictionaries(
        st.text(), st.builds(bytecode.Program, st.binary(), st.dictionaries(st.integers(0, 9999), st.text()))
    )
)
def test_programs_survive_being_written(programs: bytecode.Programs) -> None:
    assert bytecode.decode(bytecode.encode(programs)) == programs


def test_what_was_kept_is_found_under_its_key_only(home: pathlib.Path) -> None:
    programs = {"lb_x": bytecode.unlinked(CODE, MAPS)}
    bytecode.write("one", programs)
    assert bytecode.read("one") == programs
    assert bytecode.read("other") is None
    assert [path.name for path in home.iterdir()] == ["bytecode-one.json"]
    assert bytecode.forget() == 1
    assert bytecode.read("one") is None


def test_the_key_is_that_of_the_text_wherever_the_maps_are() -> None:
    text = '#define LB_PIN_flows "/a/flows"\nint x;\n'
    one = bytecode.key(text, ["f"], ["-Wall"])
    assert one == bytecode.key(text.replace("/a/", "/b/"), ["f"], ["-Wall"])
    assert one != bytecode.key(text + "int y;\n", ["f"], ["-Wall"])
    assert one != bytecode.key(text, ["f", "g"], ["-Wall"])
    assert one != bytecode.key(text, ["f"], ["-Wall", "-g"])
    assert bytecode.pinned_maps(text) == {"flows": "/a/flows"}


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_copy_that_others_may_write_is_not_used(home: pathlib.Path, mode: int) -> None:
    bytecode.write("one", {"lb_x": bytecode.unlinked(CODE, MAPS)})
    (home / "bytecode-one.json").chmod(mode)
    assert bytecode.read("one") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}', b'{"a": ["!", {}]}', b"\xff"])
def test_a_copy_that_is_broken_is_not_used(home: pathlib.Path, content: bytes) -> None:
    bytecode.write("one", {})
    (home / "bytecode-one.json").write_bytes(content)
    assert bytecode.read("one") is None


def test_old_copies_go(home: pathlib.Path) -> None:
    for number in range(16):
        bytecode.write(str(number), {})
        os.utime(home / f"bytecode-{number}.json", (number, number))
    # Those that are used stay, however long ago they were made.
    assert bytecode.read("0") == {}
    for name in ("new", "last"):
        bytecode.write(name, {})
    assert bytecode.read("last") == bytecode.read("15") == bytecode.read("3") == bytecode.read("0") == {}
    assert bytecode.read("1") is bytecode.read("2") is None


def test_no_place_to_keep_them_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such")
    bytecode.write("one", {})
    assert bytecode.read("one") is None


# --- what else makes a copy the right one ---


def test_the_key_is_that_of_the_headers_too(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, listed = tmp_path / "bpf", tmp_path / "linux-libc-dev:amd64.md5sums"
    shutil.copytree(abi.source_dir(), sources)
    before = bytecode.key("", [], [])
    monkeypatch.setattr(abi, "source_dir", lambda: sources)
    assert bytecode.key("", [], []) == before
    keys = [before]
    with (sources / "headers" / "include" / "linux" / "log2.h").open("a") as header:
        header.write("#define ODD 1\n")
    keys.append(bytecode.key("", [], []))
    monkeypatch.setattr(bytecode, "_HEADER_LISTS", str(tmp_path))
    for content in ("one", "other"):
        listed.write_text(content)
        keys.append(bytecode.key("", [], []))
    monkeypatch.setattr(bytecode, "_SYSTEM_HEADERS", ("/no/such",))
    keys.append(bytecode.key("", [], []))
    assert len(set(keys)) == 5


def test_the_key_is_that_of_the_whole_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [bytecode.key("", [], [])]
    for number in range(3):
        fewer = bytecode._LIBRARIES[:number] + bytecode._LIBRARIES[number + 1 :]
        with monkeypatch.context() as patch:
            patch.setattr(bytecode, "_LIBRARIES", fewer)
            keys.append(bytecode.key("", [], []))
    assert len(set(keys)) == 4


# --- what comes compiled ---


def test_the_key_of_what_is_shipped_is_that_of_the_source_and_the_sizes_in_it() -> None:
    sizes = dict.fromkeys(abi.row_names(), 64)

    def keyed(place: str = "/a", flag: str = "", mptcp: int = 1, larger: str = "") -> str:
        pins = {name: f"{place}/{name}" for name in abi.MAPS}
        wanted = {name: rows * (2 if name == larger else 1) for name, rows in sizes.items()}
        text = source.compose(programs.SOURCE, wanted, pins, {"MPTCP": mptcp})
        return bytecode.shipped_key(text, [flag])

    assert keyed() == keyed(place="/elsewhere")
    for name in sizes:
        assert (keyed(larger=name) != keyed()) is (name == "sockets"), name
    assert len({keyed(), keyed(mptcp=0), keyed(flag="-O1")}) == 3


def test_what_is_shipped_is_used_where_it_can_be_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytecode, "shipped_dir", lambda: tmp_path)
    assert bytecode.shipped("one") is None
    (tmp_path / "one.json").write_text("{")
    assert bytecode.shipped("one") is None
    (tmp_path / "one.json").write_text(bytecode.encode({"f": bytecode.Program(b"12", {1: "flows"})}))
    assert bytecode.shipped("one") == {"f": bytecode.Program(b"12", {1: "flows"})}


# --- nobody leads us elsewhere ---


def test_the_folder_is_ours_alone(home: pathlib.Path) -> None:
    bytecode.write("one", {})
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "bytecode-one.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(home: pathlib.Path, mode: int) -> None:
    bytecode.write("one", {})
    home.chmod(mode)
    bytecode.write("other", {})
    assert bytecode.read("one") is None
    assert bytecode.forget() == 0
    assert [path.name for path in home.iterdir()] == ["bytecode-one.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_or_a_copy_of_another_user_is_not_used(home: pathlib.Path) -> None:
    bytecode.write("one", {})
    os.chown(home / "bytecode-one.json", 65534, 65534)
    assert bytecode.read("one") is None
    bytecode.write("one", {})
    assert bytecode.read("one") == {}
    os.chown(home, 65534, 65534)
    bytecode.write("other", {})
    assert bytecode.read("one") is None
    assert [path.name for path in home.iterdir()] == ["bytecode-one.json"]


def test_no_link_is_followed(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    home.symlink_to(elsewhere)
    bytecode.write("one", {})
    assert list(elsewhere.iterdir()) == []
    home.unlink()
    bytecode.write("one", {})
    kept, victim = home / "bytecode-one.json", elsewhere / "victim"
    kept.rename(victim)
    kept.symlink_to(victim)
    assert bytecode.read("one") is None
    victim.write_text("precious")
    bytecode.write("one", {})
    assert victim.read_text() == "precious"
    assert bytecode.read("one") == {}
    assert not kept.is_symlink()


def test_a_draft_never_opens_what_is_there(home: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = home.parent / "victim"
    victim.write_text("precious")
    home.mkdir(mode=0o700)
    monkeypatch.setattr(secrets, "token_hex", lambda _: "known")
    (home / ".bytecode-one.known").symlink_to(victim)
    bytecode.write("one", {})
    assert victim.read_text() == "precious"


def test_drafts_of_the_killed_go(home: pathlib.Path) -> None:
    home.mkdir(mode=0o700)
    old, new = home / ".bytecode-one.123", home / ".bytecode-one.456"
    for draft in (old, new):
        draft.touch()
    os.utime(old, (1, 1))
    bytecode.write("one", {})
    assert (old.exists(), new.exists()) == (False, True)
    assert bytecode.forget() == 1
    assert list(home.iterdir()) == []
