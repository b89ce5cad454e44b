"""Packages whose body runs late: only when something in it is asked for.

Some packages import all they have when any part of them is imported. A stand-in in
`sys.modules`, put there first, lets parts be imported by themselves: it knows where
a few names live, finds submodules, and asked for anything else it runs the
package's real body and is from then on the package itself. So nothing is missing,
only late.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Mapping


class LatePackage(types.ModuleType):
    """A package whose body runs when a name is asked for that is neither early nor a submodule."""

    def __init__(self, spec: importlib.machinery.ModuleSpec, early: Mapping[str, str]) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__path__ = spec.submodule_search_locations or []
        self.__file__ = spec.origin
        self.__package__ = spec.name
        self.__loader__ = spec.loader
        self._early = early
        self._ran = False

    def __getattr__(self, name: str) -> object:
        """Serve an early name from its submodule, any other by running the package."""
        # Submodules ask for this one while the package's body, which imports them, could not run yet.
        if name == "__version__":
            return importlib.metadata.version(self.__name__.partition(".")[0])
        # Tools probe every module for dunder names: only the one that matters is answered.
        if self._ran or (name.startswith("__") and name != "__all__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in self._early:
            value = getattr(importlib.import_module(f"{self.__name__}.{self._early[name]}"), name)
            setattr(self, name, value)
            return value
        # `from package import submodule` asks for the attribute before it imports.
        if importlib.util.find_spec(f"{self.__name__}.{name}"):
            return importlib.import_module(f"{self.__name__}.{name}")
        # Before the body runs: it asks this module for names while it is half done.
        self._ran = True
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def install(packages: Mapping[str, Mapping[str, str]]) -> None:
    """Put stand-ins for packages in `sys.modules`, parents first.

    For each: the names it serves without running its body, and the submodule that
    each lives in. Raises ImportError where one is not a package.
    """
    for name, early in packages.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = sys.modules.get(parent_name)
        spec = importlib.machinery.PathFinder.find_spec(name, parent.__path__ if parent else None)
        if spec is None or spec.loader is None or spec.submodule_search_locations is None:
            raise ImportError(f"{name} is not a package")
        sys.modules[name] = LatePackage(spec, early)
        if parent is not None:
            setattr(parent, leaf, sys.modules[name])


def forget(package: str) -> None:
    """Drop every module of a package, so that the next import starts afresh."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
