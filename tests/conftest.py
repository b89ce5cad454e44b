"""Fixtures that any test may ask for: `needs_bpf` and `needs_lab` before it touches the kernel."""

import pytest

from tests import capabilities


@pytest.fixture(scope="session")
def needs_bpf() -> None:
    capabilities.require(capabilities.missing_for_bpf())


@pytest.fixture(scope="session")
def needs_lab() -> None:
    capabilities.require(capabilities.missing_for_lab())
