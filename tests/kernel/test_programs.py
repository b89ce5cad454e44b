"""Every program by itself through the compiler and the verifier, and what is said when it does not pass."""

import collections.abc
import os
import pathlib
import re
import shutil
import typing

import pytest

from lbproxy import abi, errors
from lbproxy.kernel import btf, bytecode, libbpf, loader, programs, source
from tests import serving
from tests.kernel import conftest


@pytest.fixture(scope="module")
def pins(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[pathlib.Path]:
    """A bpffs with every map."""
    with conftest.mounted(tmp_path_factory.mktemp("programs") / "bpf") as root:
        conftest.create_maps(root / "maps", serving.SIZES)
        yield root


def text(pins: pathlib.Path) -> str:
    paths = {name: str(pins / "maps" / name) for name in abi.MAPS}
    return source.compose(programs.SOURCE, serving.SIZES, paths)


@pytest.fixture(scope="module")
def loaded(pins: pathlib.Path) -> pathlib.Path:
    """Every program, through the verifier."""
    loader.compile_and_pin(
        text(pins), {program.name: str(pins / "programs" / program.name) for program in programs.PROGRAMS}
    )
    return pins / "programs"


@pytest.mark.parametrize("program", programs.PROGRAMS, ids=lambda program: program.name)
def test_the_verifier_takes(loaded: pathlib.Path, program: programs.Program) -> None:
    fd = libbpf.obj_get(str(loaded / program.name))
    assert libbpf.prog_id(fd) > 0
    os.close(fd)


def test_a_kept_copy_that_the_kernel_refuses_is_compiled_anew(
    pins: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = next(program for program in programs.SOCKET if program.name == "sock_release")
    path = pins / "programs" / "again"
    loader.compile_and_pin(text(pins), {one.name: str(path)})
    [kept] = (tmp_path / "lbproxy").iterdir()
    good = kept.read_bytes()
    path.unlink()
    # It leaves the program without an end.
    (name, program), *_ = bytecode.decode(good).items()
    kept.write_text(bytecode.encode({name: program._replace(code=program.code[:-8])}))
    loader.compile_and_pin(text(pins), {one.name: str(path)})
    assert path.exists()
    assert kept.read_bytes() == good
    path.unlink()
    monkeypatch.setattr(loader, "compiled", None)
    loader.compile_and_pin(text(pins), {one.name: str(path)})
    path.unlink()


def test_a_kernel_that_does_not_describe_itself_takes_what_it_is_given(pins: pathlib.Path) -> None:
    """Without BTF no program may look into its structs: the one at TCP sockets then does without."""
    (one,) = (program for program in programs.SOCKET if program.name == "sock_health")
    paths = {name: str(pins / "maps" / name) for name in abi.MAPS}
    features = dict.fromkeys(source.features(), 0)
    plain = source.compose(programs.SOURCE, serving.SIZES, paths, features)
    code = loader.compiled(plain, [one])[one.function].code
    assert bytecode.with_sk_err(code, 0) == code
    loader.compile_and_pin(plain, {one.name: str(pins / "programs" / "without_btf")})


def test_a_kernel_whose_description_lacks_what_is_read_is_given_the_same(
    pins: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the program would read nothing, and see no connection that fails."""
    made = []
    compiled = loader.compiled

    def noted(text: str, *more: typing.Any) -> bytecode.Programs:
        made.append(compiled(text, *more))
        return made[-1]

    monkeypatch.setattr(loader, "compiled", noted)
    for nothing in ("read", "shipped"):
        monkeypatch.setattr(bytecode, nothing, lambda _key: None)
    monkeypatch.setattr(bytecode, "write", lambda _key, _programs: None)
    monkeypatch.setattr(btf, "offset", lambda _struct, _field: None)
    loader.compile_and_pin(described(pins), {"sock_health": str(pins / "programs" / "undescribed")})
    ((code, _),) = made[0].values()
    assert bytecode.with_sk_err(code, 0) == code
    assert "how connections end is told by their states" in caplog.text


def described(pins: pathlib.Path) -> str:
    """The source for a kernel that describes itself."""
    paths = {name: str(pins / "maps" / name) for name in abi.MAPS}
    return source.compose(programs.SOURCE, serving.SIZES, paths, {**source.features(), "BTF": 1})


def test_every_program_of_the_source_is_listed() -> None:
    text = source.flatten(programs.SOURCE)
    functions = re.findall(r"^int (lb_\w+)\(", text, re.MULTILINE)
    assert sorted(functions) == sorted(program.function for program in programs.PROGRAMS)


@pytest.fixture
def copy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The sources in a folder of one's own, to be broken."""
    folder = tmp_path / "sources"
    shutil.copytree(abi.source_dir(), folder)
    monkeypatch.setattr(abi, "source_dir", lambda: folder)
    return folder


def append(folder: pathlib.Path, name: str, broken: str) -> int:
    """Put a line at the end of a source file, inside a header's guard; returns its number."""
    lines = (folder / name).read_text().splitlines()
    at = len(lines) - 1 if name.endswith(".h") else len(lines)
    lines.insert(at, broken)
    (folder / name).write_text("\n".join(lines) + "\n")
    return at + 1


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("int lb_broken(void) { return nonsense; }", "error: use of undeclared identifier 'nonsense'"),
        ("static inline int odd(void) { int unused; return 0; }", "error: unused variable 'unused'"),
        ("static inline int odd(int a) { if (a = 1) return 1; return 0; }", "error: using the result of an"),
    ],
)
@pytest.mark.parametrize("name", ["select.h", "sock_lb.c"])
def test_what_does_not_compile_is_told_by_file_and_line(
    pins: pathlib.Path, copy: pathlib.Path, name: str, broken: str, said: str
) -> None:
    line = append(copy, name, broken)
    with pytest.raises(errors.AgentError, match="cannot load the BPF programs") as failed:
        loader.compile_and_pin(text(pins), {"connect4": str(pins / "never")})
    assert f"bpf/{name}:{line}:" in str(failed.value)
    assert said in str(failed.value)
    assert "Traceback" not in str(failed.value)
    assert "\n" not in str(failed.value)
    assert not (pins / "never").exists()


def test_a_struct_that_python_reads_otherwise_does_not_compile(
    pins: pathlib.Path, copy: pathlib.Path
) -> None:
    header = (copy / "abi.h").read_text()
    (copy / "abi.h").write_text(header.replace("\t__u32 slot_count;", "\t__u64 slot_count;"))
    with pytest.raises(errors.AgentError, match=r"abi\.py.*static.assert"):
        loader.compile_and_pin(text(pins), {"connect4": str(pins / "never")})


def test_what_the_verifier_refuses_is_told_in_a_line(pins: pathlib.Path, copy: pathlib.Path) -> None:
    main = (copy / "sock_lb.c").read_text()
    body = "int lb_recvmsg4(struct bpf_sock_addr *ctx)\n{\n"
    assert body in main
    broken = body + "\treturn *(volatile int *)(long)ctx->user_port;\n"
    (copy / "sock_lb.c").write_text(main.replace(body, broken))
    with pytest.raises(errors.AgentError, match="cannot load the BPF programs: ") as failed:
        loader.compile_and_pin(text(pins), {"recvmsg4": str(pins / "never")})
    assert "invalid" in str(failed.value)
    assert not (pins / "never").exists()


def test_includes_are_put_in_place_once_and_keep_their_line_numbers() -> None:
    flat = source.flatten(programs.SOURCE)
    assert not re.findall(r'^#include "', flat, re.MULTILINE)
    assert flat.count("struct frontend_key {") == 1
    where, line = "", 0
    for row in flat.splitlines():
        if found := re.match(r'#line (\d+) "bpf/(.*)"', row):
            line, where = int(found[1]) - 1, found[2]
            continue
        line += 1
        written = (abi.source_dir() / where).read_text().splitlines()[line - 1]
        assert row == written or written.startswith('#include "')


def test_a_fingerprint_follows_sources_layouts_and_sizes(copy: pathlib.Path) -> None:
    before = source.fingerprint(programs.SOURCE, serving.SIZES)
    assert source.fingerprint(programs.SOURCE, dict(reversed(serving.SIZES.items()))) == before
    assert source.fingerprint(programs.SOURCE, serving.sizes(slots=1)) != before
    append(copy, "counters.h", "/* another comment */")
    assert source.fingerprint(programs.SOURCE, serving.SIZES) != before
