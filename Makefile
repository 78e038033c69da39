# One command each; `make` alone lists them. Everything is installed into .venv, except what the tests need from the
# system (a browser, curl, a C compiler), which apt-get installs if it is missing.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# What the browser's side is built and tested with, from npm.
WEB := $(VENV)/web
# The Autobahn test suite.
AUTOBAHN := $(VENV)/autobahn
# Each process takes whole files, in the order of tests/conftest.py, which also says how many processes there are.
# PARALLEL= runs one test after the other.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
# What has no business where the server is has a place of its own in .venv, by the name of its extra in pyproject.toml:
# what the examples are made of, the fuzzer, and Locust, which brings gevent. Little of it is ever imported, so it is
# not compiled ahead.
PLACES := load fuzz examples
# The least coverage, in percent, of each of the packages.
COVERAGE := 90

APT_GET = $$(test "$$(id -u)" = 0 || echo sudo) env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120
INSTALL = $(APT_GET) install -y --no-install-recommends

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore
# Tests start servers by the hundred: whatever the shell says, the sources are not compiled anew for each.
export PYTHONDONTWRITEBYTECODE =

.PHONY: examples example-vanilla example-react example-fastapi example-django example-nginx example-celery example-bullmq example-rq help conformance setup setup-dev system run test test-fast bench web sizes lint types format clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | column -t -s $$'\t' 2>/dev/null || grep '##' $(MAKEFILE_LIST)

setup: $(BIN)/statuswire  ## install the server into .venv

setup-dev: $(VENV)/.dev  ## the same with everything for tests and linters

run: setup  ## start the server with a live demo (ARGS="--port 8080" is passed on)
	@# The shell becomes the server, so a signal for this command reaches it; the demo ends when the server's output does.
	@exec $(BIN)/statuswire serve $(ARGS) > >(exec $(BIN)/python tools/demo.py --follow)

example-celery example-bullmq example-rq: example-%: setup-dev system
	@exec $(BIN)/python tools/examples/live.py $* $(ARGS)

# Pages of applications. What these are made of is in places of their own, not where the server is.
example-vanilla: setup
	@exec $(BIN)/python -m tools.examples.web $(@:example-%=%) $(ARGS)

example-react: setup
	@command -v node >/dev/null && command -v npm >/dev/null || $(MAKE) --silent system
	@$(MAKE) --silent $(VENV)/react/.done
	@exec $(BIN)/python -m tools.examples.web react $(ARGS)

# Node looks for packages beside what imports them, so there is a link to where they are.
REACT := tools/examples/react_example
$(VENV)/react/.done: $(REACT)/package.json $(REACT)/package-lock.json
	@mkdir -p $(VENV)/react
	@cp $^ $(VENV)/react
	cd $(VENV)/react && npm ci --silent --no-audit --no-fund --ignore-scripts
	@ln -sfn ../../../$(VENV)/react/node_modules $(REACT)/node_modules
	@touch $@

example-fastapi example-django: setup $(VENV)/examples/.done
	@exec $(BIN)/python -m tools.examples.web $(@:example-%=%) $(ARGS)

example-nginx: setup $(VENV)/examples/.done
	@PATH="$$PATH:/usr/sbin:$(VENV)/nginx/usr/sbin" command -v nginx >/dev/null || $(MAKE) --silent system
	@exec $(BIN)/python -m tools.examples.web nginx $(ARGS)

$(PLACES:%=$(VENV)/%/.done): $(VENV)/%/.done: pyproject.toml | $(BIN)/python
	test -x $(VENV)/$*/bin/python || $(BIN)/python -m venv --without-pip $(VENV)/$*
	$(BIN)/pip --python $(VENV)/$*/bin/python install --quiet --no-compile --editable '.[$*]'
	@touch $@

examples:  ## list the examples: applications and queues with live jobs, each by one command (ARGS="--port 8080")
	@echo 'make example-vanilla    a page with live bars, without a framework'
	@echo 'make example-react      the same with React and Vite'
	@echo 'make example-fastapi    users who log in to a FastAPI application, and see their own jobs'
	@echo 'make example-django     the same with Django and its sessions'
	@echo 'make example-nginx      the FastAPI application and statuswire on one origin, behind nginx'
	@echo 'make example-celery     the jobs of a Celery application on the dashboard'
	@echo 'make example-bullmq     the jobs of BullMQ'
	@echo 'make example-rq         the jobs of RQ'

test: setup-dev  ## run every test and measure coverage
	@$(MAKE) --silent -j2 system places
	@$(MAKE) --silent $(VENV)/react/.done
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PARALLEL) $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include='protocol/*' --fail-under=$(COVERAGE)
	$(BIN)/coverage report --include='server/*' --fail-under=$(COVERAGE)
	$(BIN)/coverage report --include='statuswire/*' --fail-under=$(COVERAGE)

# One after the other: pip writes into the sources' directory when it installs them as editable.
.PHONY: places
places:
	@for place in $(PLACES); do $(MAKE) --silent $(VENV)/$$place/.done || exit; done

test-fast: setup-dev  ## the tests that take under a minute
	$(BIN)/pytest -q $(PARALLEL) -m 'not slow' $(PYTEST_ARGS)

.PHONY: test-long
test-long: drain-long queues-long test-offline hostility fuzz conformance soak  ## all that has a long form, in it (an hour and a half)

.PHONY: drain-long
drain-long: setup-dev system  ## a server is stopped behind nginx while a thousand read 5,000 updates/s (half a minute)
	STATUSWIRE_TEST_READERS=1000 $(BIN)/pytest -q -s tests/integration/test_drain_under_load.py $(PYTEST_ARGS)

.PHONY: queues-long
queues-long: setup-dev system  ## real queues under every trouble there is a test for, all kinds by all troubles (ten minutes)
	QUEUES=all $(BIN)/pytest -q -s --durations=0 tests/integration/test_queues.py $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: $(VENV)/fuzz/.done  ## fuzz each parser, and whole conversations, for a minute (FUZZ_SECONDS=, FUZZ_TARGETS="http …")
	$(VENV)/fuzz/bin/python -m tests.fuzz.run $(FUZZ_TARGETS) --seconds $${FUZZ_SECONDS:-60} --keep $(VENV)/fuzz/found

.PHONY: hostility
hostility: setup-dev system  ## every attack for ten seconds (HOSTILITY_SECONDS=), and a table of what readers felt
	HOSTILITY_SECONDS=$${HOSTILITY_SECONDS:-10} HOSTILITY_REPORT=hostility.md $(BIN)/pytest -q tests/hostility
	@cat hostility.md

.PHONY: test-offline
test-offline: setup-dev system  ## pages without a network for a whole minute, of all kinds (three minutes)
	OFFLINE_S=60 $(BIN)/pytest -q tests/web/test_failures.py -k 'offline or without_a_word'

bench:  ## measure speed: by itself, then beside others (twenty minutes of a quiet machine; see perf/README.md)
	@$(MAKE) --no-print-directory --keep-going bench-self bench-peers

bench-self: setup system  ## beside this machine's bare limit: a table, a plot (nine minutes)
	$(BIN)/pip install --quiet --editable '.[plots]'
	$(BIN)/python -m perf.bench $(BENCH_ARGS)

soak: setup  ## clients that come and go for half an hour, and nothing that grows (SOAK_SECONDS=300 for five minutes)
	$(BIN)/python -m perf.soak --seconds $(or $(SOAK_SECONDS),1800)

.PHONY: isolation
isolation: setup-dev  ## measure whether time tells another user's jobs from none (ISOLATION_ARGS="--store redis://…")
	$(BIN)/python -m perf.isolation $(ISOLATION_ARGS)

.PHONY: soak budget peers bench-self bench-peers load locust
budget: setup system  ## count instructions per delivery, publish and connection, and make them the budget
	$(BIN)/python -m perf.budget --write

peers: system  ## install what others make, to be measured beside this server (into .venv/peers, for nothing else)
	test -x $(VENV)/peers/bin/python || $(BIN)/python -m venv $(VENV)/peers
	$(VENV)/peers/bin/pip install --quiet -r perf/peers/requirements.txt
	mkdir -p $(VENV)/peers/node && cp perf/peers/package.json perf/peers/package-lock.json $(VENV)/peers/node
	cd $(VENV)/peers/node && npm ci --silent --no-fund --no-audit
	@# Nothing of Debian's is installed: it is only unpacked, with whatever this machine lacks for it.
	apt-cache show pushpin libnginx-mod-nchan >/dev/null 2>&1 || $(APT_GET) update || true
	test -e $(VENV)/peers/nginx/usr/sbin/nginx || { mkdir -p $(VENV)/peers/nginx && cd $(VENV)/peers/nginx && \
		apt-get -qq -o APT::Sandbox::User=root download nginx libnginx-mod-nchan && \
		for package in *.deb; do dpkg -x $$package . || exit; done; } || echo 'without nchan: no package of it here' >&2
	test -e $(VENV)/peers/pushpin/usr/bin/pushpin || { mkdir -p $(VENV)/peers/pushpin && cd $(VENV)/peers/pushpin && \
		needs=$$(apt-get -qq -s install --reinstall --no-install-recommends pushpin condure zurl | sed -n 's/^Inst \([^ ]*\) .*/\1/p') && \
		apt-get -qq -o APT::Sandbox::User=root download $$needs && \
		for package in *.deb; do dpkg -x $$package . || exit; done; } || echo 'without pushpin: no package of it here' >&2

load: setup $(VENV)/load/.done  ## users of every kind by Locust, headless, and what must hold (LOAD_ARGS="--seconds 10")
	$(BIN)/python -m perf.scenarios $(LOAD_ARGS)

locust: $(VENV)/load/.done  ## the same users with Locust's web page, against a server that runs (LOAD_ARGS="--host URL")
	PYTHONPATH=. $(VENV)/load/bin/locust -f perf/locustfile.py --class-picker --host http://127.0.0.1:3000 $(LOAD_ARGS)

bench-peers: setup peers  ## this server beside others, in one run: tables, plots, documents (ten minutes)
	$(BIN)/pip install --quiet --editable '.[plots]'
	$(BIN)/python -m perf.peers $(BENCH_ARGS)

web: $(WEB)/.done  ## make what browsers are given in server/web/ from server/web/src/ (needs node; `make system`)
	node tools/web/build.mjs $(WEB)

sizes: web  ## the same, and what it weighs
	@for file in $$(cd server/web && ls client.* share.js react.js job-progress.js 2>/dev/null); do \
		printf '%-16s %6d bytes, %5d gzipped\n' $$file $$(wc -c < server/web/$$file) $$(gzip -9nc server/web/$$file | wc -c); done

conformance: setup-dev system  ## Autobahn whole, HTTP beside nginx, real clients (15 minutes); writes docs/conformance.md
	CONFORMANCE=$(VENV)/conformance.json $(BIN)/pytest -q --timeout=7200 tests/conformance
	$(BIN)/python -m tests.conformance.report $(VENV)/conformance.json

lint: setup-dev  ## style
	$(BIN)/ruff check .

types: setup-dev  ## strict type checks
	$(BIN)/mypy
	$(BIN)/mypy --strict tools perf

format: setup-dev  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was installed and built here
	rm -rf $(VENV) $(REACT)/node_modules build *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/statuswire: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test,queues-test,hooks-test,lint]'
	@touch $(BIN)/statuswire $@

# The suite that is run against /ws/echo, with the Python that it needs.
$(AUTOBAHN)/wstest: $(wildcard tests/conformance/autobahn/*) | $(BIN)/python
	@tests/conformance/autobahn/install.sh $(AUTOBAHN) $(BIN)/pip
	@touch $@

$(WEB)/.done: tools/web/package.json tools/web/package-lock.json
	@mkdir -p $(WEB)
	@cp $^ $(WEB)
	cd $(WEB) && npm ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@

# The first Python that is new enough. Debian and Ubuntu ship it without `ensurepip`, which `venv` needs.
$(BIN)/python:
	@for python in python3 python3.14 python3.13 python3.12 python3.11; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if ! $${python:-false} -c 'import ensurepip' 2>/dev/null; then \
		$(APT_GET) update && $(INSTALL) $${python:-python3}-venv || exit; \
	fi; \
	$${python:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")' && \
	$${python:-python3} -m venv $(VENV)

# Nothing may be started on this machine by its tests' needs: nginx is only unpacked, and of Redis only redis-tools is
# installed, which has the one binary that is the server and the sentinel by the name it is called by.
system:  ## install what the tests need from the system
	@missing=(); \
	command -v curl >/dev/null || missing+=(curl ca-certificates); \
	command -v gcc >/dev/null && test -e /usr/include/stdio.h || missing+=(gcc libc6-dev); \
	command -v valgrind >/dev/null || missing+=(valgrind); \
	command -v openssl >/dev/null || missing+=(openssl); \
	command -v systemd-analyze systemd-socket-activate | grep -q activate || missing+=(systemd); \
	browser=$$(command -v chromium chromium-browser google-chrome google-chrome-stable | head -n 1); \
	nginx=$$(PATH="$$PATH:/usr/sbin" command -v nginx || ls $(VENV)/nginx/usr/sbin/nginx 2>/dev/null); \
	command -v node >/dev/null || missing+=(nodejs); \
	command -v npm >/dev/null || missing+=(npm); \
	test -n "$$(ls /usr/lib/*/faketime/libfaketime.so.1 2>/dev/null)" || missing+=(faketime); \
	redis=$$(command -v redis-server redis-sentinel | wc -l); \
	if test "$$redis" != 2; then command -v redis-check-rdb >/dev/null || missing+=(redis-tools); fi; \
	haproxy=$$(PATH="$$PATH:/usr/sbin" command -v haproxy || ls $(VENV)/haproxy/usr/sbin/haproxy 2>/dev/null); \
	if test "$${#missing[@]}" != 0 -o -z "$$browser" -o -z "$$nginx" -o -z "$$haproxy"; then $(APT_GET) update; fi; \
	if test "$${#missing[@]}" != 0; then $(INSTALL) "$${missing[@]}" || exit; fi; \
	if test "$$redis" != 2; then \
		for name in redis-server redis-sentinel; do ln -sf "$$(command -v redis-check-rdb)" $(BIN)/$$name || exit; done; fi; \
	if test -z "$$browser"; then $(INSTALL) chromium || $(INSTALL) chromium-browser || exit; fi; \
	if test -z "$$nginx"; then \
		mkdir -p $(VENV)/nginx && cd $(VENV)/nginx && apt-get -qq -o APT::Sandbox::User=root download nginx && dpkg -x nginx_*.deb . || exit; cd - >/dev/null; fi; \
	if test -z "$$haproxy"; then \
		needs=$$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances haproxy | \
			grep -E '^lib(lua|opentracing|pcre2|crypt1|systemd)' | sort -u); \
		mkdir -p $(VENV)/haproxy && cd $(VENV)/haproxy && apt-get -qq -o APT::Sandbox::User=root download haproxy $$needs && \
		for package in *.deb; do dpkg -x $$package . || exit; done; cd - >/dev/null; fi
	@$(MAKE) --silent $(WEB)/.done $(AUTOBAHN)/wstest
