"""What the annotations of a Service ask for, and what is passed over in them.

A typing error must not take a Service down: what can not be understood is warned of, and counts as not said.
"""

import functools
import typing
from collections.abc import Callable, Mapping, Sequence

import msgspec

from lbproxy.core import (
    ejection,
    model,
    port_probes,
    probe,
    ramp,
    spill,
    weights,
    wire,
)
from lbproxy.core.wording import quote

ALGORITHM_ANNOTATION = "lbproxy.io/algorithm"
MODE_ANNOTATION = "lbproxy.io/mode"
WEIGHTS_ANNOTATION = "lbproxy.io/weights"
SLOW_START_ANNOTATION = "lbproxy.io/slow-start"
ZONE_ANNOTATION = "lbproxy.io/zone-spill-over"
EJECTION_ANNOTATION = "lbproxy.io/outlier-ejection"
PROBE_ANNOTATION = "lbproxy.io/probe"
PROBE_SETTINGS_ANNOTATION = "lbproxy.io/probe-settings"

_ALGORITHMS = {algorithm.label: algorithm for algorithm in model.Algorithm}
_MODES = {mode.value: mode for mode in model.PacketMode}
_LEAST_CONNECTIONS_WITH_DSR = (
    "with mode dsr it holds for sockets that dial the ClusterIP; all other addresses need Maglev"
)
_NO_TEXT = "not a text: put it in quotes"  # YAML takes 1.4 for a number and `on` for true

_Choice = typing.TypeVar("_Choice")


class Asked(typing.NamedTuple):
    """What they ask for; the defaults where they say nothing, or nothing that is understood."""

    algorithm: model.Algorithm | None = None
    mode: model.PacketMode | None = None
    weights: model.Weights | None = None
    slow_start_s: float = 0.0
    zone_spill_over: float = 0.0
    probes: port_probes.PortProbes | None = None
    probe_mistake: str = ""
    outlier_ejection: ejection.Ejection | None = None


_NOTHING: typing.Final = Asked()


def read(
    said: wire.ServiceAnnotations | None, ports: Sequence[model.ServicePort], warnings: list[str]
) -> Asked:
    """Read the annotations of a Service with these ports; adds to `warnings` what is passed over."""
    if said is None:
        return _NOTHING
    algorithm = _annotated(ALGORITHM_ANNOTATION, said.algorithm, _ALGORITHMS, warnings)
    mode = _annotated(MODE_ANNOTATION, said.mode, _MODES, warnings)
    if mode is model.PacketMode.DSR and algorithm is model.Algorithm.LEAST_CONNECTIONS:
        warnings.append(f"metadata.annotations[{ALGORITHM_ANNOTATION}]: {_LEAST_CONNECTIONS_WITH_DSR}")
    probes, mistake = _probes(said, ports, warnings)
    return Asked(
        algorithm=algorithm,
        mode=mode,
        weights=_weights(said.weights, warnings),
        slow_start_s=_number(SLOW_START_ANNOTATION, said.slow_start, ramp.parse_s, warnings),
        zone_spill_over=_number(ZONE_ANNOTATION, said.zone_spill_over, spill.parse, warnings),
        probes=probes,
        probe_mistake=mistake,
        outlier_ejection=_ejection(said.outlier_ejection, warnings),
    )


def _annotated(
    annotation: str, text: object, choices: Mapping[str, _Choice], warnings: list[str]
) -> _Choice | None:
    if text is msgspec.UNSET:
        return None
    chosen = choices.get(text) if isinstance(text, str) else None
    if chosen is None:
        # A typo must not take a service down.
        choice = " or ".join(sorted(choices))
        wrong = f"not {choice}" if isinstance(text, str) else _NO_TEXT
        warnings.append(f"metadata.annotations[{annotation}]: {quote(text)} is {wrong}: the default is used")
    return chosen


def _number(annotation: str, text: object, parse: Callable[[str], float], warnings: list[str]) -> float:
    """Return 0 where there is none, or none that is understood."""
    if text is msgspec.UNSET:
        return 0.0
    try:
        if not isinstance(text, str):
            raise ValueError(_NO_TEXT)
        return parse(text)
    except ValueError as error:
        warnings.append(f"metadata.annotations[{annotation}]: {quote(text)} is {error}: passed over")
        return 0.0


def _weights(text: object, warnings: list[str]) -> model.Weights | None:
    if text is msgspec.UNSET:
        return None
    field = f"metadata.annotations[{WEIGHTS_ANNOTATION}]"
    if not isinstance(text, str):
        warnings.append(f"{field}: {quote(text)} is {_NO_TEXT}: all weights are equal")
        return None
    said, problems = weights.parse(text)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        warnings.append(f"{field}: {problems[0]}{more}: passed over")
    return said


def _probes(
    said: wire.ServiceAnnotations, ports: Sequence[model.ServicePort], warnings: list[str]
) -> tuple[port_probes.PortProbes | None, str]:
    """The probes of a Service's ports, or what is wrong with them."""
    asked, settings = said.probe, said.probe_settings
    if asked is msgspec.UNSET:
        if settings is not msgspec.UNSET:
            field = f"metadata.annotations[{PROBE_SETTINGS_ANNOTATION}]"
            warnings.append(f"{field}: without {PROBE_ANNOTATION}: passed over")
        return None, ""
    try:
        if not isinstance(asked, str):
            raise probe.ProbeError(_NO_TEXT)
        if not isinstance(settings, str | msgspec.UnsetType):
            raise probe.SettingsError(_NO_TEXT)
        found = _shared_probes(asked, settings or "")
        _check_ports(found, {port.name: port.protocol.name for port in ports}, asked)
    except probe.ProbeError as error:
        of_settings = isinstance(error, probe.SettingsError)
        annotation = PROBE_SETTINGS_ANNOTATION if of_settings else PROBE_ANNOTATION
        why = f"{quote(settings if of_settings else asked)}: {error}"
        warnings.append(f"metadata.annotations[{annotation}]: {why}: backends are not probed")
        return None, f"{annotation}: {why}"
    return found, ""


def _check_ports(probes: port_probes.PortProbes, protocols: Mapping[str, str], asked: str) -> None:
    """Raise ProbeError where a probe is of no port that the Service has; `asked` is what says the probes."""
    for name, found in probes.named:
        if name not in protocols:
            kind = probe.ProbeError if name in port_probes.names(asked) else probe.SettingsError
            raise kind(f"the Service has no port {name}")
        if found is not None and not found.suits(protocols[name]):
            raise probe.ProbeError(f"port {name}: asks at {found.protocol} ports, and that is none")
    others, named = probes.others, {name for name, _ in probes.named}
    left = [protocol for name, protocol in protocols.items() if name not in named]
    if others is not None and not probes.shared and not any(map(others.suits, left)):
        more = " that no line names" if named else ""
        raise probe.ProbeError(f"asks at {others.protocol} ports, and the Service has none{more}")


def _ejection(text: object, warnings: list[str]) -> ejection.Ejection | None:
    if text is msgspec.UNSET:
        return None
    try:
        if not isinstance(text, str):
            raise ejection.EjectionError(_NO_TEXT)
        return ejection.parse(text)
    except ejection.EjectionError as error:
        field = f"metadata.annotations[{EJECTION_ANNOTATION}]"
        warnings.append(f"{field}: {quote(text)}: {error}: no backend is ejected")
        return None


# A relist compares every probe with the one that is known: the same object is equal at once.
@functools.lru_cache(1024)
def _shared_probes(asked: str, settings: str) -> port_probes.PortProbes:
    return port_probes.parse(asked, settings)
