# make demo    trains a DCGAN with mpengine, torch.amp and FP32 and compares them; results in out/
# make parity  trains four models with FP32, torch.amp and mpengine and writes docs/parity.md; fails where a row does
# make test    lint, types and tests; among them most of `python -m benchmarks.static --check`, which takes 3 minutes
# make fuzz    the long random tests
# make lint    ruff and mypy alone
# make bench   measures what this machine can: predictions, host time, the step; results in OUT, by default out/bench
# make gpu     OUT=dir [WHEELS=dir]: GPU tests, step, training, compute-sanitizer; no network, no .venv, under 9 minutes
# make docs    draws the plots in docs/schedules
# make clean   removes what the others wrote, but for the environment .venv
#
# The first of them makes .venv; `make gpu` takes PYTHON as it is. PYTHON chooses the interpreter:
# make test PYTHON=python3.12

PYTHON ?= python3
DEMO_ITERATIONS ?= 800

# Idle threads sleep: by default they spin, and two programs that share the cores then run many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
SOURCES := constraints.txt pyproject.toml setup.py

# A small DCGAN, so that fp16 on a CPU takes a minute or two. A scale may double after 200 iterations without an
# overflow, not torch's 2000, so that the plot of so short a run shows it grow as well as back off.
DEMO := --compare --dataset digits --imageSize 16 --nz 4 --ngf 24 --ndf 12 --lr 5e-4 \
	--growth-interval 200 --sample-every 200 --outf out

.PHONY: demo parity test fuzz lint bench gpu docs clean

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/dcgan.py $(DEMO) --iterations $(DEMO_ITERATIONS)

parity: $(VENV)/.demo-installed
	$(BIN)/python -m benchmarks.parity

test: lint
	$(BIN)/python -m pytest

fuzz: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m fuzz

lint: $(VENV)/.test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.test-installed
	$(BIN)/python -m benchmarks.drive bench --out $(or $(OUT),out/bench)

# torch and Triton are those that PYTHON has. WHEELS may hold other libraries' optimizers, pytest and hypothesis.
gpu:
	@test -n "$(OUT)" || { echo "say where the results go: make gpu OUT=dir [WHEELS=dir]"; exit 2; }
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) -m benchmarks.drive gpu --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

docs: $(VENV)/.test-installed
	$(BIN)/python benchmarks/plot_schedules.py

clean:
	rm -rf out build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A stamp says that an installation was completed. It is taken away while one is under way: what was interrupted
# is made anew, and what only became older than its sources is brought up to date in place.
$(VENV)/.demo-installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else "mpengine is tested with \
	Python 3.11 and 3.12, and $(PYTHON) is %d.%d: choose another with make PYTHON=python3.12 ..." % v[:2])'
	@if [ -e $@ ]; then rm $@; else echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	$(INSTALL) '.[examples]'
	@$(check_cuda)
	@touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed
	@rm -f $(VENV)/.demo-installed $@
	$(INSTALL) '.[test]'
	@touch $(VENV)/.demo-installed $@

define check_cuda
if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then \
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.version.cuda else "This machine has an NVIDIA GPU, but pip \
	chose torch %s, a CPU build. Make pip use a package index that has the CUDA build of the torch in constraints.txt \
	(variable PIP_INDEX_URL; remove settings that prefer CPU wheels), then run make again." % torch.__version__)'; \
fi
endef
