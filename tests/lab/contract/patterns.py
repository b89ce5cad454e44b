"""Policies and sets of endpoints that scenarios are put together from."""

from tests.lab.contract.book import LOCAL, LOCAL_TOO, REMOTE, REMOTE_TOO, Endpoint, Object

ITP: dict[str, Object] = {"c": {}, "l": {"internalTrafficPolicy": "Local"}}
ETP: dict[str, Object] = {"c": {}, "l": {"externalTrafficPolicy": "Local"}}
BOTH_LOCAL = ITP["l"] | ETP["l"]
DRAINING: Object = {"ready": False, "serving": True, "terminating": True}
GONE: Object = {"ready": False, "serving": False, "terminating": True}
UNREADY: Object = {"ready": False, "serving": True, "terminating": False}
AFFINITY: Object = {
    "sessionAffinity": "ClientIP",
    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
}
PATTERNS: dict[str, list[Endpoint]] = {
    "none": [],
    "local": [Endpoint(LOCAL)],
    "remote": [Endpoint(REMOTE)],
    "both": [Endpoint(LOCAL), Endpoint(REMOTE)],
    "four": [Endpoint(one) for one in (LOCAL, LOCAL_TOO, REMOTE, REMOTE_TOO)],
    "local-unready": [Endpoint(LOCAL, **UNREADY), Endpoint(REMOTE)],
    "remote-unready": [Endpoint(LOCAL), Endpoint(REMOTE, **UNREADY)],
    "all-unready": [Endpoint(LOCAL, **UNREADY), Endpoint(REMOTE, **UNREADY)],
    "local-draining": [Endpoint(LOCAL, **DRAINING), Endpoint(REMOTE)],
    "remote-draining": [Endpoint(LOCAL), Endpoint(REMOTE, **DRAINING)],
    "all-draining": [Endpoint(LOCAL, **DRAINING), Endpoint(REMOTE, **DRAINING)],
    "local-gone": [Endpoint(LOCAL, **GONE), Endpoint(REMOTE)],
    "all-gone": [Endpoint(LOCAL, **GONE), Endpoint(REMOTE, **GONE)],
    "only-remote-draining": [Endpoint(REMOTE, **DRAINING)],
    "only-local-draining": [Endpoint(LOCAL, **DRAINING)],
    "ready-and-terminating": [Endpoint(LOCAL, terminating=True), Endpoint(REMOTE)],
    "draining-beside-ready": [Endpoint(LOCAL, **DRAINING), Endpoint(LOCAL_TOO), Endpoint(REMOTE)],
    "client-itself": [Endpoint("n1/p1"), Endpoint("n1/p4")],
    "client-and-others": [Endpoint("n1/p1"), Endpoint("n1/p4"), Endpoint(REMOTE)],
    "host-here": [Endpoint("n1")],
    "host-there": [Endpoint("n3")],
    "hosts": [Endpoint("n1"), Endpoint("n3"), Endpoint(LOCAL)],
}
HINTS: dict[str, list[Endpoint]] = {
    "zone": [Endpoint(LOCAL, zones=("b",)), Endpoint(REMOTE, zones=("a",))],
    "zones": [Endpoint(LOCAL, zones=("b", "c")), Endpoint(REMOTE, zones=("c", "a"))],
    "zone-of-others": [Endpoint(LOCAL, zones=("b",)), Endpoint(REMOTE, zones=("c",))],
    "zone-missing": [Endpoint(LOCAL), Endpoint(REMOTE, zones=("a",))],
    "zone-missing-unready": [
        Endpoint(LOCAL, **UNREADY), Endpoint(REMOTE, zones=("a",)), Endpoint(REMOTE_TOO, zones=("b",)),
    ],
    "zone-missing-draining": [
        Endpoint(LOCAL, **DRAINING), Endpoint(REMOTE, zones=("a",)), Endpoint(REMOTE_TOO, zones=("b",)),
    ],
    "node": [Endpoint(LOCAL, nodes=("n3",)), Endpoint(REMOTE, nodes=("n1",))],
    "nodes": [Endpoint(LOCAL, nodes=("n2", "n1")), Endpoint(REMOTE, nodes=("n3",))],
    "node-of-others": [Endpoint(LOCAL, nodes=("n2",)), Endpoint(REMOTE, nodes=("n3",))],
    "node-missing": [Endpoint(LOCAL), Endpoint(REMOTE, nodes=("n1",))],
    "node-before-zone": [
        Endpoint(LOCAL, zones=("a",), nodes=("n3",)), Endpoint(REMOTE, zones=("b",), nodes=("n1",)),
    ],
    "node-fails-zone-decides": [
        Endpoint(LOCAL, zones=("b",), nodes=("n2",)), Endpoint(REMOTE, zones=("a",), nodes=("n3",)),
    ],
    "node-missing-zone-decides": [
        Endpoint(LOCAL, zones=("a",), nodes=("n3",)), Endpoint(REMOTE, zones=("b",)),
    ],
    "zone-all-draining": [
        Endpoint(LOCAL, zones=("b",), **DRAINING), Endpoint(REMOTE, zones=("a",), **DRAINING),
    ],
    "two-in-zone": [
        Endpoint(LOCAL, zones=("a",)), Endpoint(REMOTE, zones=("a",)), Endpoint(REMOTE_TOO, zones=("b",)),
    ],
}  # fmt: skip
