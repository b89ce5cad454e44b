"""Each test needs an interpreter of its own: what is imported there can not be undone here."""

import json
import subprocess
import sys
from typing import Any

REPORT = """
import json, sys
pages = int(open("/proc/self/statm").read().split()[1])
modules = [name for name in sys.modules if name.startswith("kubernetes_asyncio")]
print(json.dumps({"rss_kb": pages * 4, "modules": len(modules), "found": found}))
"""


def run(code: str) -> Any:
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + REPORT], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_the_client_needs_a_third_of_the_memory_and_few_modules() -> None:
    slim = run("from lbproxy.kube import client, slim\nslim.load()\nfound = 0")
    full = run("import lbproxy.kube.client, kubernetes_asyncio.client, kubernetes_asyncio.config\nfound = 0")
    assert slim["modules"] < 30 < 500 < full["modules"]
    assert full["rss_kb"] - slim["rss_kb"] > 20_000


def test_whoever_wants_the_rest_gets_it_and_the_same_classes() -> None:
    got = run(
        "from lbproxy.kube import slim\n"
        "library = slim.load()\n"
        "import kubernetes_asyncio\n"
        "from kubernetes_asyncio import client, config, dynamic, stream, utils, watch\n"
        "found = [\n"
        "    client.Configuration is library.client.Configuration,\n"
        "    client.models.V1Service is client.V1Service,\n"
        "    client.CoreV1Api.__module__,\n"
        "    kubernetes_asyncio.__version__ == client.__version__,\n"
        "    hasattr(client, 'NoSuchApi'),\n"
        "]\n"
    )
    assert got["found"] == [True, True, "kubernetes_asyncio.client.api.core_v1_api", True, False]


def test_any_part_of_the_library_can_be_imported_first() -> None:
    got = run(
        "from lbproxy.kube import slim\nslim.load()\n"
        "from kubernetes_asyncio.dynamic.client import DynamicClient\nfound = DynamicClient.__name__\n"
    )
    assert got["found"] == "DynamicClient"


def test_star_imports_see_everything() -> None:
    got = run(
        "from lbproxy.kube import slim\nslim.load()\n"
        "from kubernetes_asyncio.client import *\nfound = CoreV1Api.__name__\n"
    )
    assert got["found"] == "CoreV1Api"


def test_another_layout_is_imported_as_usual() -> None:
    got = run(
        "from lbproxy.kube import slim\n"
        "slim.EARLY['kubernetes_asyncio.client']['Configuration'] = 'moved_away'\n"
        "library = slim.load()\n"
        "found = library.client.Configuration.__name__\n"
    )
    assert got["found"] == "Configuration"
    assert got["modules"] > 500


def test_a_library_that_is_already_imported_is_left_alone() -> None:
    got = run(
        "import kubernetes_asyncio.client\n"
        "from lbproxy.kube import slim\n"
        "found = slim.load().client is kubernetes_asyncio.client\n"
    )
    assert got["found"] is True


def test_urllib3_comes_only_where_somebody_has_a_password() -> None:
    got = run(
        "import sys\n"
        "from lbproxy.kube import slim\n"
        "library = slim.load()\n"
        "before = 'urllib3.util' in sys.modules\n"
        "settings = library.client.Configuration()\n"
        "settings.username, settings.password = 'a', 'b'\n"
        "found = [before, settings.get_basic_auth_token()]\n"
    )
    assert got["found"] == [False, "Basic YTpi"]


def test_a_urllib3_that_is_already_imported_is_left_alone() -> None:
    got = run(
        "import urllib3\n"
        "from lbproxy.kube import slim\n"
        "slim.load()\n"
        "import sys\n"
        "found = sys.modules['urllib3'] is urllib3\n"
    )
    assert got["found"] is True
