"""How long it takes to decode a cluster's Services and EndpointSlices, and what they occupy.

Run: .venv/bin/python -m benchmarks.decode [services]. It does not measure the
transport, nor the splitting of a list into objects.
"""

import gc
import platform
import statistics
import sys
import time
import tracemalloc

import msgspec

from lbproxy.core import decode, model, plan, state

ENDPOINTS = 4
ROUNDS = 5


def service(number: int) -> bytes:
    """Return a Service as an API server writes it, managed fields included."""
    name = f"service-{number:05}"
    return msgspec.json.encode(
        {
            "metadata": {
                "name": name,
                "namespace": f"team-{number % 50}",
                "uid": f"00000000-0000-4000-8000-{number:012}",
                "resourceVersion": str(number),
                "creationTimestamp": "2025-01-01T00:00:00Z",
                "labels": {"app": name},
                "managedFields": _managed_fields({"f:ports": {}, "f:selector": {}, "f:type": {}}),
            },
            "spec": {
                "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
                "selector": {"app": name},
                "clusterIP": f"10.96.{number >> 8}.{number & 255}",
                "clusterIPs": [f"10.96.{number >> 8}.{number & 255}"],
                "type": "ClusterIP",
                "sessionAffinity": "None",
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "internalTrafficPolicy": "Cluster",
            },
            "status": {"loadBalancer": {}},
        }
    )


def endpoint_slice(number: int) -> bytes:
    """Return that Service's EndpointSlice."""
    name = f"service-{number:05}"
    return msgspec.json.encode(
        {
            "metadata": {
                "name": f"{name}-x{number:04}",
                "generateName": f"{name}-",
                "namespace": f"team-{number % 50}",
                "uid": f"00000000-0000-4000-9000-{number:012}",
                "resourceVersion": str(number),
                "labels": {"app": name, "kubernetes.io/service-name": name},
                "annotations": {
                    "endpoints.kubernetes.io/last-change-trigger-time": "2025-01-01T00:00:00.123456789Z"
                },
                "managedFields": _managed_fields({"f:addressType": {}, "f:endpoints": {}, "f:ports": {}}),
            },
            "addressType": "IPv4",
            "endpoints": [
                {
                    "addresses": [f"10.{index}.{number >> 8}.{number & 255}"],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "nodeName": f"node-{(number + index) % 100}",
                    "zone": f"zone-{index % 3}",
                    "targetRef": {"kind": "Pod", "name": f"{name}-{index}", "namespace": "default"},
                }
                for index in range(ENDPOINTS)
            ],
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        }
    )


def _managed_fields(fields: dict[str, object]) -> list[object]:
    return [
        {
            "manager": "kube-controller-manager",
            "operation": "Update",
            "apiVersion": "v1",
            "time": "2025-01-01T00:00:00Z",
            "fieldsType": "FieldsV1",
            "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": fields},
        }
    ]


def main(services: int = 30_000) -> None:
    """Print the medians of a few rounds."""
    raw_services = [service(number) for number in range(services)]
    raw_slices = [endpoint_slice(number) for number in range(services)]
    print(f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}")
    total_s = 0.0
    for name, decoder, raws in (
        ("services", decode.service, raw_services),
        ("slices", decode.endpoint_slice, raw_slices),
    ):
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for raw in raws:
                decoder(raw)
            times.append(time.perf_counter() - started)
        median_s = statistics.median(times)
        total_s += median_s
        each_us = median_s / len(raws) * 1e6
        print(f"{len(raws)} {name} of {len(raws[0])} bytes: {median_s:.3f} s, {each_us:.1f} us each")
    print(f"together: {total_s:.3f} s")

    print(f"state of {services} services x {ENDPOINTS} endpoints: {occupied_bytes(services) / 1e6:.1f} MB")

    cluster = fill(state.ClusterState("node-0"), services)
    started = time.perf_counter()
    for known in cluster.services():
        plan.plan(cluster, known.name, plan.Defaults(model.Algorithm.RANDOM))
    each_us = (time.perf_counter() - started) / services * 1e6
    print(f"plan: {each_us:.1f} us a service")


def fill(cluster: state.ClusterState, services: int) -> state.ClusterState:
    """Tell a state of that many services and their slices."""
    for number in range(services):
        cluster.apply(decode.service(service(number)))
        cluster.apply(decode.endpoint_slice(endpoint_slice(number)))
    return cluster


def occupied_bytes(services: int) -> int:
    """Return the memory that the state of so many services holds on to."""
    tracemalloc.start()
    cluster = fill(state.ClusterState("node-0"), services)
    gc.collect()
    occupied, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del cluster
    return occupied


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
