"""Folders that other processes write to meanwhile."""

import contextlib
import pathlib
import shutil
import typing


def copy(folder: pathlib.Path, to: pathlib.Path, drafts: str) -> None:
    """Copy a folder without drafts, which are renamed in the end, and what goes before its turn comes."""

    def copied(file: str, target: str, **_options: typing.Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(file, target)

    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(drafts), copy_function=copied)
