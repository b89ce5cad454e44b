"""Pages say what is true: commands that there are, and links that lead somewhere."""

import pathlib
import re
import typing

import pytest

from lbproxy import cli as command

ROOT: typing.Final = pathlib.Path(__file__).parents[2]
PAGES: typing.Final = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
_INLINE = re.compile(r"`lbproxy ([a-z][a-z-]+)")
_BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINE = re.compile(r"^(?:\$ |.* -- )?lbproxy ([a-z][a-z-]+)", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: pathlib.Path) -> set[str]:
    """What headings are called in links, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pages
def test_commands_that_are_named_exist(page: pathlib.Path) -> None:
    known = command._parsers()[1].keys()
    text = page.read_text()
    named = {*_INLINE.findall(_BLOCK.sub("", text)), *_LINE.findall("".join(_BLOCK.findall(text)))}
    assert named <= known, named - known


@pages
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for path, anchor in _LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_every_folder_of_the_package_is_where_a_newcomer_looks_for_it() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.parent.name for path in (ROOT / "lbproxy").glob("*/__init__.py")}
    assert folders == set(re.findall(r"^\| `lbproxy/([a-z]+)/` \|", page, re.MULTILINE))
