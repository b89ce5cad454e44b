import pathlib
import shutil

import pytest

from tests import folders


def test_drafts_and_what_goes_meanwhile_are_passed_over(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, copy = tmp_path / "shared", tmp_path / "copy"
    (shared / "lbproxy").mkdir(parents=True)
    for name in ("bytecode-one.json", "bytecode-pruned.json", ".bytecode-draft"):
        (shared / "lbproxy" / name).write_text(name)
    copy2 = shutil.copy2

    def after_others(file: str, target: str) -> None:
        (shared / "lbproxy/bytecode-pruned.json").unlink(missing_ok=True)
        copy2(file, target)

    monkeypatch.setattr(shutil, "copy2", after_others)
    folders.copy(shared, copy, drafts=".bytecode-*")
    assert [path.read_text() for path in (copy / "lbproxy").iterdir()] == ["bytecode-one.json"]
