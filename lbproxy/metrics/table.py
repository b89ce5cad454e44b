"""Every metric of the agent, written down once.

What is exported and docs/metrics.md are both made from these definitions. Names
that begin with kubeproxy_ are kube-proxy's own, with its types, labels and
buckets (contract 19.1), so that existing dashboards and alerts keep working.
"""

import dataclasses
import enum
import typing


class Type(enum.StrEnum):
    """A Prometheus metric type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclasses.dataclass(frozen=True, slots=True)
class Definition:
    """One metric: its full name, type, meaning, labels, and upper bounds of a histogram's buckets."""

    name: str
    type: Type
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FAMILY: typing.Final = ("ip_family",)
KIND: typing.Final = ("kind",)
MAP: typing.Final = ("map",)
SERVICE_PORT: typing.Final = ("namespace", "service", "port", "protocol", "ip_family")
BACKEND: typing.Final = ("namespace", "service", "port", "protocol", "backend")

_SYNC_BUCKETS: typing.Final = tuple(0.001 * 2**n for n in range(15))
_PROGRAMMING_BUCKETS: typing.Final = tuple(
    map(float, (0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)))
)

# --- kube-proxy's ---

SYNC_DURATION = Definition(
    "kubeproxy_sync_proxy_rules_duration_seconds",
    Type.HISTOGRAM,
    "How long a pass took, from planning to the last write; one pass writes both families",
    FAMILY,
    _SYNC_BUCKETS,
)
SYNC_FULL_DURATION = Definition(
    "kubeproxy_sync_full_proxy_rules_duration_seconds",
    Type.HISTOGRAM,
    "How long a pass over every service took: the first one, and the first after a failed one",
    FAMILY,
    _SYNC_BUCKETS,
)
SYNC_PARTIAL_DURATION = Definition(
    "kubeproxy_sync_partial_proxy_rules_duration_seconds",
    Type.HISTOGRAM,
    "How long a pass over the services that changed took",
    FAMILY,
    _SYNC_BUCKETS,
)
SYNC_LAST = Definition(
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    Type.GAUGE,
    "When a pass last succeeded, in Unix time",
    FAMILY,
)
SYNC_LAST_QUEUED = Definition(
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    Type.GAUGE,
    "When a pass was last asked for, in Unix time",
    FAMILY,
)
NETWORK_PROGRAMMING = Definition(
    "kubeproxy_network_programming_duration_seconds",
    Type.HISTOGRAM,
    "From the change of a pod or service, as the EndpointSlice notes it, to the rows in the kernel",
    FAMILY,
    _PROGRAMMING_BUCKETS,
)
ENDPOINT_CHANGES_PENDING = Definition(
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    Type.GAUGE,
    "EndpointSlice changes that are not in the kernel yet",
)
ENDPOINT_CHANGES = Definition(
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    Type.COUNTER,
    "EndpointSlice changes that concerned a service",
)
SERVICE_CHANGES_PENDING = Definition(
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    Type.GAUGE,
    "Service changes that are not in the kernel yet",
)
SERVICE_CHANGES = Definition(
    "kubeproxy_sync_proxy_rules_service_changes_total",
    Type.COUNTER,
    "Service changes; each counts once, not once a family",
)
NO_LOCAL_ENDPOINTS = Definition(
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    Type.GAUGE,
    "Service ports with a Local traffic policy that have usable endpoints, but none on this node",
    ("traffic_policy", "ip_family"),
)
CONNTRACK_DURATION = Definition(
    "kubeproxy_conntrack_reconciler_sync_duration_seconds",
    Type.HISTOGRAM,
    "How long a search took for UDP sockets whose backend no longer serves; one search covers both families",
    FAMILY,
    _SYNC_BUCKETS,
)
CONNTRACK_DELETED = Definition(
    "kubeproxy_conntrack_reconciler_deleted_entries_total",
    Type.COUNTER,
    "Connected UDP sockets that were closed since their backend no longer serves and others do; "
    "lbproxy keeps no conntrack entries",
    FAMILY,
)
HEALTHZ = Definition("kubeproxy_proxy_healthz_total", Type.COUNTER, "Answers of /healthz", ("code",))
LIVEZ = Definition("kubeproxy_proxy_livez_total", Type.COUNTER, "Answers of /livez", ("code",))

# --- of client-go, which kube-proxy's dashboards show too ---

REST_REQUESTS = Definition(
    "rest_client_requests_total",
    Type.COUNTER,
    "Requests to the API server, by status; `<error>` where there was no answer",
    ("code", "method", "host"),
)
REST_DURATION = Definition(
    "rest_client_request_duration_seconds",
    Type.HISTOGRAM,
    "How long the API server took to begin its answer",
    ("verb", "host"),
    (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0),
)

# --- what is balanced ---

SERVICES = Definition("lbproxy_services", Type.GAUGE, "Services that are in the kernel")
SERVICE_PORTS = Definition(
    "lbproxy_service_ports", Type.GAUGE, "Service ports that are in the kernel, by family", FAMILY
)
FRONTENDS = Definition(
    "lbproxy_frontends",
    Type.GAUGE,
    "Addresses and ports that clients can dial; a NodePort counts once a family",
)
BACKENDS = Definition(
    "lbproxy_backends",
    Type.GAUGE,
    "Backends by state; a draining one is gone from the API and its row about to be cleared, an unhealthy "
    "one is ready, but a probe of this node or its connections speak against it",
    ("state",),
)
STARVED = Definition(
    "lbproxy_starved_service_ports",
    Type.GAUGE,
    "Service ports that a full map keeps from being served as planned; should be 0",
)

ALL_UNHEALTHY = Definition(
    "lbproxy_all_unhealthy_service_ports",
    Type.GAUGE,
    "Service ports all of whose backends are unhealthy (or more than panic= allows), of a traffic policy's "
    "choice at least: all are used",
)

# --- probes of backends ---

PROBES = Definition(
    "lbproxy_probes_total",
    Type.COUNTER,
    "Probes of backends, by what they speak and how they ended; not-made: this node could not ask",
    ("type", "result"),
)
PROBE_DURATION = Definition(
    "lbproxy_probe_duration_seconds",
    Type.HISTOGRAM,
    "How long a probe took that passed or failed; one that was not answered took its whole timeout",
    ("type",),
    tuple(0.0005 * 2**n for n in range(16)),
)
PROBE_TARGETS = Definition(
    "lbproxy_probe_targets",
    Type.GAUGE,
    "Addresses and ports that this node probes; those of several service ports count once",
)
PROBE_LATE = Definition(
    "lbproxy_probe_late_seconds",
    Type.GAUGE,
    "How long the probe that waits longest has been due; should be below a second",
)
PROBE_DOWN = Definition(
    "lbproxy_probe_failed_backends",
    Type.GAUGE,
    "Backends of a service port that probes have found down; of probed service ports, at most "
    "--metrics-max-series of them, those with the most first",
    SERVICE_PORT,
)

EJECTED = Definition(
    "lbproxy_ejected_backends",
    Type.GAUGE,
    "Backends of a service port that are left out, since more of their connections failed than of the "
    "others'; shown where there is one, at most --metrics-max-series service ports",
    SERVICE_PORT,
)
EJECTIONS = Definition(
    "lbproxy_ejections_total", Type.COUNTER, "Times that a backend was left out for its failures"
)

# --- what the kernel counted ---

SERVICE_CONNECTIONS = Definition(
    "lbproxy_service_connections_total",
    Type.COUNTER,
    "Connections and UDP flows to a service port, by name of the port; shown once there is one",
    SERVICE_PORT,
)
SERVICE_REFUSED = Definition(
    "lbproxy_service_connects_refused_total",
    Type.COUNTER,
    "Connects and flows to a service port that were refused for want of a usable backend; shown once "
    "there is one",
    SERVICE_PORT,
)
BACKEND_CONNECTIONS = Definition(
    "lbproxy_backend_connections_total",
    Type.COUNTER,
    "Connections and UDP flows that a backend was given; shown once there is one, at most "
    "--metrics-max-series of them, those with the most connections first",
    BACKEND,
)
BACKEND_OPEN = Definition(
    "lbproxy_backend_open_connections",
    Type.GAUGE,
    "Connections and flows that a backend has open on this node, where the algorithm is "
    "least-connections; at most --metrics-max-series of them, those with the most first",
    BACKEND,
)
BACKEND_HANDSHAKES = Definition(
    "lbproxy_backend_handshakes_total",
    Type.COUNTER,
    "TCP connections through this node that a backend has answered, by whose they are: `node`, of its own "
    "processes and pods, or `elsewhere`; as bounded as the connections, like all that follows of backends",
    (*BACKEND, "clients"),
)
BACKEND_HANDSHAKE_SECONDS = Definition(
    "lbproxy_backend_handshake_seconds_total",
    Type.COUNTER,
    "What those took from SYN to SYN-ACK, all together",
    (*BACKEND, "clients"),
)
BACKEND_FAILURES = Definition(
    "lbproxy_backend_failures_total",
    Type.COUNTER,
    "TCP connections through this node that failed: refused; unanswered for a second, or no way there; "
    "resets of open ones by the backend; lost, since nothing was acknowledged any more (of `node` alone). "
    "Of `elsewhere` also those that a firewall forbids. Shown once there is one",
    (*BACKEND, "clients", "reason"),
)
BACKEND_RTT = Definition(
    "lbproxy_backend_rtt_seconds",
    Type.GAUGE,
    "Round-trip time to a backend of late, smoothed over its connections",
    (*BACKEND, "clients"),
)
SERIES_OMITTED = Definition(
    "lbproxy_metrics_series_omitted",
    Type.GAUGE,
    "Series that --metrics-max-series leaves out, of all metrics of backends and of unhealthy service ports",
)
DATAPATH_EVENTS = Definition(
    "lbproxy_datapath_events_total",
    Type.COUNTER,
    "What the programs count besides connections, see below",
    ("event",),
)
EVENTS: typing.Final = {
    "refused": "refused for want of a usable backend: connects, and first packets of flows",
    "dropped": "left to time out: the traffic policy allows none of the backends on this node",
    "bad_slot": "a slot without a live backend; must stay 0",
    "spilled": "records of sockets that went to the spill map: --map-rows sockets=N makes it rarer",
    "spill_failed": "records of sockets that could not be kept: their peers' addresses are the backends'",
    "affinity_failed": "clients whose backend could not be remembered",
    "unsteady": "frontends that changed at each of four looks",
    "source_denied": "connections and flows from outside loadBalancerSourceRanges",
    "ports_exhausted": "flows dropped for want of a port to masquerade with: see --masquerade-ports",
    "flows_full": "new flows that may be forgotten early, since flows is full: --map-rows flows=N",
    "flow_failed": "packets dropped since their flow could not be kept",
    "fragment_lost": "fragments whose first one was not seen",
    "too_big": "packets too big to encapsulate; their senders were told",
    "bad_tunnel": "encapsulated packets that no backend here wants",
    "mangled": "packets dropped half rewritten; must stay 0",
    "health_failed": "connections whose outcome could not be kept: --map-rows backend_health=N",
    "no_route": "flows dropped since no route leads to their backend",
}
"""What each event is: a LB_COUNTER_ constant of bpf/abi.h."""

FLOWS = Definition(
    "lbproxy_flows",
    Type.GAUGE,
    "Flows that the packet path translates, counted every 10 s, where there are many less often; "
    "assured are those whose client has answered",
    ("protocol", "assured"),
)
HELD_FLOWS = Definition(
    "lbproxy_held_flows",
    Type.GAUGE,
    "Flows that kube-proxy has begun and that are left to it until they end (docs/migration.md)",
)

# --- the maps ---

MAP_ROWS = Definition(
    "lbproxy_map_rows",
    Type.GAUGE,
    "Rows in use of a BPF map; those that the programs fill are counted every 10 or 15 s at most",
    MAP,
)
MAP_CAPACITY = Definition("lbproxy_map_capacity_rows", Type.GAUGE, "Rows that a BPF map has room for", MAP)
MAP_BYTES = Definition(
    "lbproxy_map_bytes", Type.GAUGE, "Kernel memory of a BPF map, as the kernel accounts for it", MAP
)

MAP_GROWTHS = Definition(
    "lbproxy_map_growths_total",
    Type.COUNTER,
    "Times that a BPF map was made larger, while it served, since it filled up",
    MAP,
)

# --- the sources ---

WATCH_CONNECTED = Definition(
    "lbproxy_watch_connected",
    Type.GAUGE,
    "Whether a watch is open; of manifests, whether they can be read",
    KIND,
)
WATCH_LAST_EVENT = Definition(
    "lbproxy_watch_last_event_timestamp_seconds",
    Type.GAUGE,
    "When a watch last said anything, bookmarks included; of manifests, when they last changed (Unix time)",
    KIND,
)
WATCH_RELISTS = Definition(
    "lbproxy_watch_relists_total", Type.COUNTER, "Full lists after the first one", KIND
)
WATCH_FAILURES = Definition(
    "lbproxy_watch_failures_total", Type.COUNTER, "Lists and watches that failed and were tried again", KIND
)
REJECTED_OBJECTS = Definition(
    "lbproxy_rejected_objects",
    Type.GAUGE,
    "Objects that could not be understood and whose last good version is in force; "
    "of manifests, files and folders that can not be read, or are gone",
    KIND,
)
REJECTED = Definition(
    "lbproxy_rejected_total", Type.COUNTER, "Times that an object could not be understood", KIND
)
WARNINGS = Definition(
    "lbproxy_warnings_total",
    Type.COUNTER,
    "Annotations and fields of objects in force that are passed over, each counted when it is first seen",
    KIND,
)

# --- the agent ---

SYNC_FAILURES = Definition(
    "lbproxy_sync_failures_total", Type.COUNTER, "Passes that ended with a write the kernel did not take"
)
DATAPATH_PROBLEMS = Definition(
    "lbproxy_datapath_problems",
    Type.GAUGE,
    "What keeps programs from the hooks and devices where they belong, a line of /healthz each; should be 0",
)
PUT_BACK = Definition(
    "lbproxy_programs_put_back_total",
    Type.COUNTER,
    "Programs that the agent put back at a hook or device, where somebody had taken them away",
)
BUILD_INFO = Definition(
    "lbproxy_build_info",
    Type.GAUGE,
    "Always 1: the version of the agent and the fingerprint of the programs that run",
    ("version", "fingerprint"),
)
DATAPATH_START = Definition(
    "lbproxy_datapath_start",
    Type.GAUGE,
    "Always 1: whether the agent, when it started, created, adopted, relinked or replaced the datapath",
    ("how",),
)

TABLE: typing.Final = tuple(value for value in list(globals().values()) if isinstance(value, Definition))
