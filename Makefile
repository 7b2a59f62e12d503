# `make` lists the targets.

# The Python that makes the virtual environment: 3.11 or newer. A candidate
# counts only if it starts, as some systems have stubs that do not.
PYTHON ?= $(shell for p in python3.11 python3; do \
	"$$p" -c "" >/dev/null 2>&1 && echo "$$p" && break; done)
# Where the virtual environment lives.
VENV ?= .venv
# What is installed there, pinned.
REQUIREMENTS ?= requirements.txt
# Options of pip for them.
INSTALL ?=
# Where `make study` writes.
WORKDIR ?= runs/fashion_mnist
# Further arguments of the program that a target runs.
ARGS ?=

RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
SOURCES := .ci $(wildcard benchmarks configs models) setup.py sos tests
PIP := $(RUN) -m pip --disable-pip-version-check
# One process for each of two cores; more of them wait for each other, as
# TensorFlow is itself multi-threaded.
JOBS ?= 2
# Neighbouring tests share models, so that each process gets a part in order.
PYTEST = $(RUN) -m pytest --numprocesses=$(JOBS) --dist=worksteal
# The oldest TensorFlow that is supported has an environment of its own.
OLDEST = VENV="$(VENV)-tf2.20" REQUIREMENTS=requirements-tf2.20.txt

# A TPU needs another build of TensorFlow, with all its packages pinned: some
# of them ask for the usual build, whose files would replace its own.
TPU = VENV="$(VENV)-tpu" REQUIREMENTS=requirements-tpu.txt INSTALL=--no-deps
# Of the releases that tensorflow-tpu 2.20 asks for, the newer ones lack
# functions that it needs, so that the import aborts.
LIBTPU := libtpu==0.0.21

# TensorFlow's start-up notes would drown everything else.
export TF_CPP_MIN_LOG_LEVEL ?= 2
# The one backend that `sos` supports, whatever ~/.keras/keras.json says.
export KERAS_BACKEND := tensorflow

.DELETE_ON_ERROR:
.PHONY: help docs study study-full translate environment environment-oldest test \
	environment-tpu environment-tpu-here test-slow test-browser test-oldest \
	test-oldest-here compatibility soak lint format bench lock bazel-query wheel clean

help:  ## list the targets
	@echo "Usage: make TARGET [VARIABLE=value]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' \
		$(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON, VENV ($(VENV)), REQUIREMENTS, ARGS, JOBS,"
	@echo "  WORKDIR ($(WORKDIR))"

# The stamp comes last, so that an interrupted installation is taken up again.
$(READY): $(REQUIREMENTS) setup.py
	@test -n "$(PYTHON)" || { echo "No python3.11 or python3 found. Install \
	Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	sys.exit(0 if sys.version_info >= (3, 11) else f"$(PYTHON) is Python {v}, \
	but 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.11")'
	@rm -f $@
	@echo "Making the virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv "$(VENV)"
	@echo "Installing the pinned packages; this takes a few minutes once"
	@$(PIP) install --quiet $(INSTALL) --requirement $(REQUIREMENTS)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

study: $(READY)  ## run the study on Fashion-MNIST (WORKDIR=, ARGS=)
	@$(RUN) -m models.sweep --config=configs/fashion_mnist.py \
		--workdir="$(WORKDIR)" $(ARGS)

study-full: $(READY)  ## run the long study on a residual network (days)
	@$(RUN) -m models.sweep --config=configs/fashion_mnist_full.py \
		--workdir="$(WORKDIR)" $(ARGS)

study-full: WORKDIR = runs/fashion_mnist_full

translate: $(READY)  ## train a small translator and score it (WORKDIR=, ARGS=)
	@$(RUN) -m models.train --config=configs/libreoffice_help.py \
		--workdir="$(WORKDIR)" $(ARGS)

translate: WORKDIR = runs/translate

environment: $(READY)  ## make the virtual environment

test: $(READY)  ## run the fast tests (ARGS="-k name" picks some)
	@$(PYTEST) -m "not slow and not browser" $(ARGS)

test-slow: $(READY)  ## run the slow tests
	@$(PYTEST) -m slow $(ARGS) || { status=$$?; \
		test $$status -eq 5 || exit $$status; \
		echo "No slow tests to run."; }

# One process, as the tests share the browser. Names what it skips.
test-browser: $(READY)  ## test the report of a study in the system's Chromium
	@$(RUN) -m pytest -m browser -p no:xdist -rs tests/browser_test.py $(ARGS)

# Only what may depend on the version of TensorFlow.
test-oldest:  ## run tests marked `oldest` with TensorFlow 2.20, as on a TPU
	@$(MAKE) --no-print-directory $(OLDEST) test-oldest-here

test-oldest-here: $(READY)
	@$(PYTEST) -m oldest $(ARGS)

environment-oldest:  ## make the virtual environment with TensorFlow 2.20
	@$(MAKE) --no-print-directory $(OLDEST) environment

# The check needs no TPU.
environment-tpu:  ## make the virtual environment of a TPU VM, .venv-tpu
	@$(MAKE) --no-print-directory $(TPU) environment environment-tpu-here

environment-tpu-here: $(READY)
	@$(RUN) .ci/check_tpu_environment.py

compatibility: $(READY)  ## make docs/compatibility.md anew and compare it
	@$(RUN) -m tests.support.compatibility $(ARGS)

soak: $(READY)  ## kill training 50 times and compare the weights (ARGS=)
	@$(RUN) -m tests.support.soak $(ARGS)

lint: $(READY)  ## check style and formatting
	@$(RUN) -m ruff check $(SOURCES)
	@$(RUN) -m ruff format --check $(SOURCES)

format: $(READY)  ## repair what can be repaired of style and formatting
	@$(RUN) -m ruff check --fix $(SOURCES)
	@$(RUN) -m ruff format $(SOURCES)

# Without tpu_compile and gpu_step, which install a compiler.
bench: $(READY)  ## run every benchmark of CPUs (ARGS go to each)
	@for name in mask_update train_step "train_step --model=transformer" \
			decode frozen resume launchers input_pipeline; do \
		$(RUN) -m benchmarks.$$name $(ARGS) || exit; \
	done

# In an environment of its own: it must work when the pinned versions do not.
lock:  ## pin every dependency anew (ARGS=--upgrade for the newest versions)
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	$(PYTHON) -m venv "$$tmp" && \
	"$$tmp/bin/python" -m pip --disable-pip-version-check \
		install --quiet uv && \
	compile() { "$$tmp/bin/uv" pip compile --quiet --universal \
		--python-version 3.11 $${extras:---extra study --extra test --extra docs} \
		--no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" "$$@" \
		$(ARGS) setup.py >/dev/null; } && \
	compile --output-file requirements.txt && \
	cp requirements.txt requirements-tf2.20.txt && \
	printf '%s\n' 'tensorflow<2.21' 'tf-keras<2.21' >"$$tmp/oldest" && \
	compile --no-annotate --constraint "$$tmp/oldest" \
		--output-file requirements-tf2.20.txt && \
	extras="--extra study --extra test" compile --no-annotate --no-header \
		--constraint requirements-tf2.20.txt --no-emit-package tensorflow \
		--output-file "$$tmp/tpu" && \
	{ printf '%s\n' \
		"# Written by \`make lock\`, from requirements-tf2.20.txt." \
		"# Install with --no-deps: other packages ask for \`tensorflow\`, whose" \
		"# files would replace those of tensorflow-tpu." \
		$(LIBTPU) && \
	sed -n 's/^tensorflow==/tensorflow-tpu==/p' requirements-tf2.20.txt && \
	cat "$$tmp/tpu"; } >requirements-tpu.txt
	@echo "Wrote requirements.txt, requirements-tf2.20.txt and" \
		"requirements-tpu.txt"

bazel-query:  ## read BUILD with Bazel (ARGS="'deps(//:models)'")
	@$(PYTHON) .ci/bazel_query.py $(ARGS)

docs: $(READY)  ## build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "Wrote site/index.html"

wheel: $(READY)  ## build the wheel into dist/
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove the virtual environment and everything built or cached
	@rm -rf .venv .venv-tf2.20 .venv-tpu .build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune \
		-exec rm -rf {} +
