"""Fixtures that any test may ask for: `needs_bpf` and `needs_lab` before it touches the kernel.

Compiled programs are kept in a folder of the checkout's own, whoever compiles them first: tests
neither use nor empty what the user's own lbproxy keeps. A test that removes them asks for
`spare_cache`, else every test after it compiles again.
"""

import collections.abc
import contextlib
import pathlib

import hypothesis
import pytest

from lbproxy import interrupts
from tests import capabilities, folders

# No clock decides whether a property test passes, in whichever folder it is: so before any of them is read.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM and SIGHUP end a session as Ctrl-C does: what its tests have made and mounted goes."""
    caught = contextlib.ExitStack()
    caught.enter_context(interrupts.Interrupts().caught(fatal=True))
    config.add_cleanup(caught.close)


@pytest.fixture(scope="session")
def needs_bpf() -> None:
    capabilities.require(capabilities.missing_for_bpf())


@pytest.fixture(scope="session")
def needs_lab() -> None:
    capabilities.require(capabilities.missing_for_lab())


@pytest.fixture(scope="session", autouse=True)
def cache_home(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> collections.abc.Iterator[pathlib.Path]:
    """Where the agents and commands of this session keep compiled programs, and look for them."""
    kept = pytestconfig.cache if pytestconfig.pluginmanager.has_plugin("cacheprovider") else None
    home = kept.mkdir("compiled") if kept else tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture
def spare_cache(
    cache_home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """A copy of what is kept, for a test that removes it, as `lbproxy cleanup` does."""
    copy = tmp_path / "spare-cache"
    # Side by side others write to it, and remove what is old.
    folders.copy(cache_home, copy, drafts=".bytecode-*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy))
    return copy
