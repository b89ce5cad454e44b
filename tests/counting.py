"""How connections fared, as the tests of outcomes compare it."""

from lbproxy.core import outcomes


def counts_of(found: outcomes.Outcomes) -> dict[str, int]:
    """How often each end has come about, times left out."""
    return {name: getattr(found, name) for name in ("established", *outcomes.REASONS)}
