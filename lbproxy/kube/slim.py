"""Import kubernetes_asyncio's configuration and transport without its models.

The packages `kubernetes_asyncio`, `.client` and `.client.models` import some
700 model classes when they run: 37 MB that lbproxy never uses; `.config` whatever
any kind of credentials needs. They run late
(`lbproxy.late`): only if something is asked for that is not listed here.

Should the library's layout ever change, the ordinary import is used instead:
more memory, same behaviour.
"""

import importlib
import sys
import typing

from lbproxy import late

PACKAGE = "kubernetes_asyncio"

# Per package: the names served without running its body, and the submodule each lives in.
EARLY: dict[str, dict[str, str]] = {
    PACKAGE: {},
    f"{PACKAGE}.client": {
        "ApiClient": "api_client",
        "ApiException": "exceptions",
        "Configuration": "configuration",
    },
    f"{PACKAGE}.client.models": {},
    # Wanted for its name alone, but where a user has a password.
    "urllib3": {},
    # One of the two is needed, or none; a kubeconfig's brings YAML with it.
    f"{PACKAGE}.config": {
        "ConfigException": "config_exception",
        "load_incluster_config": "incluster_config",
        "load_kube_config": "kube_config",
    },
}


class Library(typing.NamedTuple):
    """The parts of kubernetes_asyncio that lbproxy uses."""

    client: typing.Any
    config: typing.Any


def load() -> Library:
    """Import the configuration and transport parts, without the models where that works."""
    if PACKAGE not in sys.modules:
        try:
            late.install({name: early for name, early in EARLY.items() if name not in sys.modules})
            return _import()
        except (ImportError, AttributeError):
            late.forget(PACKAGE)
    return _import()


def _import() -> Library:
    library = Library(
        client=importlib.import_module(f"{PACKAGE}.client"),
        config=importlib.import_module(f"{PACKAGE}.config"),
    )
    for name in EARLY[f"{PACKAGE}.client"]:
        getattr(library.client, name)
    return library
