# Two commands for a newcomer, as root on Debian 12: `make demo` and `make test`.
# Each installs what it needs first; a second time that takes no time.

PYTHON := /usr/bin/python3
VENV := .venv
SYSTEM_PACKAGES := python3-bpfcc python3-venv libbpf1 linux-libc-dev gcc libc6-dev clang-format iproute2 util-linux iptables nftables ipset

# How many processes share the suite: two where there are two CPUs, else none but this one (0, as a debugger
# and `-s` want it). A module's tests share a lab, so modules stay whole; and they come in the order drawn, not
# by how many tests they have.
WORKERS := $(shell [ "$$(nproc)" -ge 2 ] && echo 2 || echo 0)
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## set up, then run the main job: a small cluster of namespaces, balanced live
	@$(VENV)/bin/lbproxy demo

.PHONY: test
test: setup ## set up, then lint and run the whole test suite (about 12 minutes on two CPUs, 17 with WORKERS=0)
	@$(MAKE) --no-print-directory lint
	@LBPROXY_REQUIRE_ROOT=1 $(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

.PHONY: contract
contract: setup ## hold every scenario of the contract lab against a model of kube-proxy (about 6 minutes)
	@LBPROXY_REQUIRE_ROOT=1 LBPROXY_CONTRACT=all $(VENV)/bin/python -m pytest tests/lab/contract $(PYTEST_ARGS)

.PHONY: marathon
marathon: setup ## 100 kills and 100 upgrades, 10 minutes without an API server, 30,000 services, 60,000 changes (an hour)
	@LBPROXY_REQUIRE_ROOT=1 LBPROXY_MARATHON=1 $(VENV)/bin/python -m pytest -s --timeout=7200 \
		tests/lab/test_marathon.py tests/lab/test_changed_places.py tests/lab/test_hostile_clients.py $(PYTEST_ARGS)

.PHONY: migration
migration: setup ## from kube-proxy's rules to lbproxy and back with 1,000 connections of both families, in each mode (about 4 minutes)
	@LBPROXY_REQUIRE_ROOT=1 LBPROXY_MIGRATION=1000 $(VENV)/bin/python -m pytest -s tests/lab/test_migration.py $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: setup ## a million drawn frames through the packet programs and a reference of them (FUZZ_ARGS="--seed 1")
	@$(VENV)/bin/python -m tests.packets.fuzz $(FUZZ_ARGS)

.PHONY: lint
lint: setup ## types, style, layering, C formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	clang-format --dry-run --Werror $$(find bpf lbproxy/lab benchmarks -name '*.[ch]' -not -path 'bpf/headers/*' -not -path '*/build/*')

.PHONY: format
format: setup ## rewrite Python and C in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	clang-format -i $$(find bpf lbproxy/lab benchmarks -name '*.[ch]' -not -path 'bpf/headers/*' -not -path '*/build/*')

.PHONY: bench
bench: setup ## measure beside kube-proxy and no proxy (about 9 minutes, 14 with a real kube-proxy; BENCH_ARGS="--kube-proxy PATH")
	@$(VENV)/bin/python -m benchmarks.run quick $(BENCH_ARGS)

.PHONY: bench-full
bench-full: setup ## the same at 1 to 30,000 services, with more rounds (about 50 minutes)
	@$(VENV)/bin/python -m benchmarks.run full $(BENCH_ARGS)

.PHONY: report
report: setup ## write the newest measurement into README.md and docs/benchmarks.{md,html,png}
	@$(VENV)/bin/python -m benchmarks.report

.PHONY: setup
setup: $(VENV)/.done ## install what is needed: Debian packages, .venv

$(VENV)/.done: pyproject.toml requirements.lock Makefile
	@missing=$$(for p in $(SYSTEM_PACKAGES); do dpkg-query -W -f='$${Status}\n' $$p 2>/dev/null | grep -q 'install ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "setup: installing $$missing" && \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
	@echo "setup: Python packages into $(VENV)"
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[test,lint]'
	@touch $@

.PHONY: compiled
compiled: setup ## compile the programs into bpf/compiled, for an image without a compiler
	@rm -rf bpf/compiled
	@$(VENV)/bin/python -m lbproxy.kernel.shipping

.PHONY: chart
chart: setup ## write the Helm chart of deploy/helm, of the kustomize folders and the option table
	@$(VENV)/bin/python -m deploy.chart

.PHONY: lock
lock: setup ## write the versions that are installed now into requirements.lock, the image's with hashes
	@{ echo '# Versions that the suite passes with; `make lock` writes them.'; \
	$(VENV)/bin/python -m pip freeze -q --local --exclude-editable --disable-pip-version-check; } > requirements.lock
	@test -d $(VENV)/lock || $(PYTHON) -m venv $(VENV)/lock
	@$(VENV)/lock/bin/python -m pip install -q --disable-pip-version-check 'pip-tools>=7.5'
	@$(VENV)/lock/bin/pip-compile -q --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--no-emit-options --generate-hashes --strip-extras --allow-unsafe -c requirements.lock \
		-o deploy/requirements.txt pyproject.toml
	@sed -i '1i # What the image is made of; `make lock` writes it.' deploy/requirements.txt
	@touch $(VENV)/.done

.PHONY: sbom
sbom: setup ## write sbom.cdx.json: what an image is made of (each image has its own, of what is really in it)
	@$(VENV)/bin/python -m lbproxy.sbom --requirements deploy/requirements.txt \
		--only libbpf1,linux-libc-dev,python3,python3-bpfcc > sbom.cdx.json

.PHONY: audit
audit: setup ## ask the package index whether the image's packages are there, with their hashes, and not withdrawn
	@$(VENV)/bin/python -m deploy.audit

.PHONY: clean
clean: ## remove the virtual environment and caches
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/build
