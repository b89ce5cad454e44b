"""What the metrics server's pages for people and tools say of the agent: /configz, /flagz, /statusz."""

import dataclasses
import datetime
import platform
import typing
from collections.abc import Iterable

import lbproxy
from lbproxy import secrecy
from lbproxy.config import config, kinds
from lbproxy.core import healthz, model

_WARNING: typing.Final = "For people to read: programs should not rely on how this looks."


def configz(settings: config.Config) -> dict[str, typing.Any]:
    """What /configz shows: the settings in effect that tools ask kube-proxy for (MS-3)."""
    duration = kinds.format_duration
    ranges = ["primary"] if settings.nodeport_primary else [str(net) for net in settings.nodeport_addresses]
    return {
        "kubeproxy.config.k8s.io": {
            "kind": "KubeProxyConfiguration",
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "mode": settings.proxy_mode.value,
            "hostnameOverride": settings.node_name,
            "bindAddress": str(settings.bind_address or ""),
            "healthzBindAddress": str(settings.healthz_bind_address or ""),
            "metricsBindAddress": str(settings.metrics_bind_address or ""),
            "bindAddressHardFail": settings.bind_address_hard_fail,
            "clusterCIDR": ",".join(map(str, settings.cluster_cidrs)),
            "detectLocalMode": settings.detect_local_mode.value,
            "nodePortAddresses": ranges,
            "configSyncPeriod": duration(settings.config_sync_period_s),
            settings.proxy_mode.value: {
                "masqueradeAll": settings.masquerade_all,
                "minSyncPeriod": duration(settings.min_sync_period_s),
                "syncPeriod": duration(settings.sync_period_s),
            },
        }
    }


def flagz(settings: config.Config) -> str:
    """What /flagz shows: every setting in effect, as the agent has it."""
    fields = sorted(dataclasses.fields(settings), key=lambda field: field.name)
    lines = (f"{field.name.replace('_', '-')}={_text(getattr(settings, field.name))}" for field in fields)
    return secrecy.without("\n".join(("lbproxy flags", _WARNING, "", *lines, "")))


def statusz(started: healthz.Moment, now: healthz.Moment, paths: Iterable[str]) -> str:
    """What /statusz shows: which version this is, and since when it runs."""
    minutes, seconds = divmod(int(now.monotonic_s - started.monotonic_s), 60)
    hours, minutes = divmod(minutes, 60)
    since = datetime.datetime.fromtimestamp(started.wall_s, datetime.UTC)
    return "\n".join(
        (
            "lbproxy statusz",
            _WARNING,
            "",
            f"Started: {since:%a %b %e %H:%M:%S UTC %Y}",
            f"Up: {hours} hr {minutes:02} min {seconds:02} sec",
            f"Python version: {platform.python_version()}",
            f"Binary version: {lbproxy.__version__}",
            "",
            f"Paths: {' '.join(sorted(paths))}",
            "",
        )
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, config.ListenAddress):
        return str(value)
    if isinstance(value, model.Algorithm):
        return value.label
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ",".join(f"{name}={_text(of)}" for name, of in dataclasses.asdict(value).items())
    return str(value)
