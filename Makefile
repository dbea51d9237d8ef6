# Everything on a fresh machine:  make demo   and   make test.  Each makes .venv if it is not there.

PYTHON ?= python3

# The torch to install, before everything else; anything pip understands. torch==2.13.0 is the CUDA build on
# Linux. For a CPU build add the index that serves it:  make test TORCH="torch==2.13.0 --index-url <URL>"
TORCH ?= torch==2.13.0
# A CUDA build of torch brings its own triton; a CPU build brings none, and gets the one torch 2.13.0 pins.
TRITON ?= triton==3.7.1

# One installation for each choice of torch: another TORCH installs again.
INSTALLED = .venv/installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

# Processes that share the tests; a number, or logical: one for each core.
WORKERS ?= logical
# Some of the tests only: files by their names, and what the names of their tests have, as pytest's -k takes it.
# make test TESTS="test_reference test_ppo_loss" K=everything
TESTS =
K =
FILES = $(foreach name,$(TESTS),$(or $(shell find tests -name '$(name).py'),tests/$(name).py))

# verl pins what the rest of the project needs newer: it is tested in an environment of its own.
VERL ?= verl==0.9.1
INSTALLED_VERL = .venv-verl/installed-$(shell printf '%s' '$(TORCH) $(VERL)' | cksum | cut -d ' ' -f 1)

# The ends of what pyproject.toml allows: tests/oldest.txt and tests/newest.txt have the versions, which the library
# and its tests are installed in; instead of a constraints file of the machine, not beside it. The Pythons are those
# of the workflow, or pyenv's, unless PYTHON says another. For a CPU build add the index that serves it:
# make test-oldest TORCH_END="torch --index-url <URL>"
TORCH_END ?= torch
python_of = $(if $(filter-out python3,$(PYTHON)),$(PYTHON),$(shell $(1) -c 'import sys; print(sys.executable)' 2>/dev/null \
	|| ls "$$(pyenv prefix $(1:python%=%) 2>/dev/null)"/bin/$(1) 2>/dev/null || echo $(1)))
PYTHON_oldest = $(call python_of,python3.10)
PYTHON_newest = $(call python_of,python3.13)
PIP_END = PIP_CONSTRAINT=tests/$*.txt .venv-$*/bin/python -m pip --disable-pip-version-check install --quiet
ENDS = $(shell printf '%s' '$(TORCH_END) $(PYTHON)' | cksum | cut -d ' ' -f 1)

# vLLM's pins contradict ours, too: an environment of its own, with the versions of one file.
INSTALLED_VLLM = .venv-vllm/installed-$(shell (printf '%s' '$(TORCH)'; cat tests/vllm/requirements.txt) | cksum | cut -d ' ' -f 1)

PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet
PIP_VERL = .venv-verl/bin/python -m pip --disable-pip-version-check install --quiet
PIP_VLLM = .venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet
RUN = OMP_NUM_THREADS=1 .venv/bin/python

# The tests of impl="triton", on compiled kernels that are emulated.
EMULATED = $(RUN) -m pytest tests/kernels tests/library -m "emulated or numerics" -k "triton or emulated"

.PHONY: help demo test test-oldest test-newest test-verl test-vllm check format aot emulated peers bench docs clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

demo: $(INSTALLED)  ## train a small model with and without AER: a table and pictures in runs/grid-demo
	$(RUN) -m training.experiments demo

test: $(INSTALLED)  ## all tests, or those of TESTS="test_a test_b"; kernels on a GPU, else under Triton's interpreter
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal --durations 25 --durations-min 5 $(FILES) $(if $(K),-k '$(K)')

test-oldest: .venv-oldest/installed-$(ENDS)  ## the core's tests on the oldest Python, torch and triton that we claim, in .venv-oldest
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --core -n $(WORKERS) --dist worksteal

test-newest: .venv-newest/installed-$(ENDS)  ## the same on the newest there are, in .venv-newest
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest --core -n $(WORKERS) --dist worksteal

test-verl: $(INSTALLED_VERL)  ## the tests of the verl integration, in .venv-verl
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/verl

test-vllm: $(INSTALLED_VLLM)  ## the tests of --rollout vllm on a real engine, on a CPU, in .venv-vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm

check: $(INSTALLED)  ## lint, format and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: $(INSTALLED)  ## rewrite the code in the project's format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

aot: $(INSTALLED)  ## compile every kernel for sm_80, sm_90, sm_100 and gfx942; fail on spills and races
	$(RUN) -m bench.aot

emulated: $(INSTALLED)  ## the tests of the kernels on emulated PTX for sm_80, sm_90 and sm_100; a quarter of an hour
	$(EMULATED) --emulate sm_80
	$(EMULATED) --emulate sm_90
	$(EMULATED) --emulate sm_100

peers: $(INSTALLED)  ## what bench compares with, without their dependencies (they contradict each other)
	$(PIP) --no-deps -r bench/peers.txt

bench: $(INSTALLED)  ## measure every operation beside the installed peers; tables and pictures in runs/bench
	@status=0; .venv/bin/python -m pytest bench/ || status=$$?; .venv/bin/python -m bench.report; exit $$status

docs: .venv-docs/installed  ## the documentation as a site in build/site; it loads nothing from elsewhere
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	.venv-docs/bin/python docs/site/links.py build/site
	@echo "To browse it: python3 -m http.server --directory build/site, then http://localhost:8000"

.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	@# the extra alone: the pages are made from the source, which is not imported
	.venv-docs/bin/python -c "import re; print('\n'.join(re.findall(r'\"(.+?)\"', re.search(r'^docs = .*', \
		open('pyproject.toml').read(), re.M)[0])))" > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet -r .venv-docs/requirements.txt
	@touch $@

clean:  ## remove what make has made
	rm -rf .venv .venv-verl .venv-vllm .venv-oldest .venv-newest .venv-docs runs build dist *.egg-info

$(INSTALLED): pyproject.toml Makefile
	@echo "Installing into .venv; torch takes a few minutes the first time."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	@[ "$$(uname)" != Linux ] || .venv/bin/python -c 'import triton' 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) --editable '.[dev]'
	@touch $@

$(INSTALLED_VERL): pyproject.toml Makefile
	@echo "Installing into .venv-verl; torch takes a few minutes the first time."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv-verl
	$(PIP_VERL) $(TORCH)
	@[ "$$(uname)" != Linux ] || .venv-verl/bin/python -c 'import triton' 2>/dev/null || $(PIP_VERL) "$(TRITON)"
	$(PIP_VERL) --editable '.[verl]' "$(VERL)" 'pytest>=8'
	@touch $@

$(INSTALLED_VLLM): pyproject.toml Makefile tests/vllm/requirements.txt
	@echo "Installing into .venv-vllm; torch takes a few minutes the first time."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv-vllm
	$(PIP_VLLM) $(TORCH)
	@[ "$$(uname)" != Linux ] || .venv-vllm/bin/python -c 'import triton' 2>/dev/null || $(PIP_VLLM) "$(TRITON)"
	$(PIP_VLLM) --no-deps -r tests/vllm/requirements.txt
	$(PIP_VLLM) --no-deps --editable .
	@touch $@

.venv-%/installed-$(ENDS): pyproject.toml Makefile tests/%.txt
	@echo "Installing into .venv-$*; torch takes a few minutes the first time."
	@$(PYTHON_$*) -c '' || { echo 'There is no $(PYTHON_$*); make test-$* PYTHON=/path/of/python takes another one' >&2; exit 1; }
	@$(PYTHON_$*) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON_$*) -m venv --clear .venv-$*
	$(PIP_END) $(TORCH_END)
	@[ "$$(uname)" != Linux ] || .venv-$*/bin/python -c 'import triton' 2>/dev/null || $(PIP_END) triton
	$(PIP_END) --editable '.[test]'
	@touch $@
