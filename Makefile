# make train: environment, then the tiny experiment to the end.
# make small: a tokenizer and the experiment of 8M parameters, about an hour and a half; again: it resumes.
# make test:  environment with test tools, then the suite without the markers below.
# make slow:  the tests above 2.5 CPU seconds: whole programs, kills, several processes, buckets, README's commands, notebooks.
# make faults: the accidents that take minutes (50 kills at random moments, a full disk) besides those of the suite.
# make exhaustive: every case of what the suite samples, such as all shapes of the Triton kernels.
# make wheel-check: the wheel, installed outside the repository, trains and generates.
# make notebooks: run the notebooks and store their outputs.
# make docs:   the documentation, into site/; a broken link fails.
# PYTHON=python3.12 make test picks the interpreter; uv is used where it is there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
# Each environment remembers its interpreter: another PYTHON makes a new one.
IDENTITY := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

.PHONY: train small test slow faults exhaustive lint notebooks wheel-check docs clean

train: $(VENV)/.installed-base
	$(BIN)/python train.py --config configs/tiny.yaml

small: $(VENV)/.installed-base
	test -f runs/small_tokenizer.json || $(BIN)/python -m transmamba_jax.data.train_tokenizer --config configs/tiny.yaml \
	  --vocab-size 2048 --output runs/small_tokenizer.json
	$(BIN)/python train.py --config configs/small.yaml --workdir runs/small

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "slow and not faults and not exhaustive"

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/faults -m "faults or not faults"

exhaustive: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m exhaustive

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(VENV)/.installed-dev
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb
	$(BIN)/ruff format notebooks

wheel-check: $(VENV)/.python-$(IDENTITY)
	PYTHON=$(BIN)/python .ci/wheel_check

docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.python-$(IDENTITY):
	@test -n "$(IDENTITY)" || { echo "'$(PYTHON)' does not run; set PYTHON to a Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$(PYTHON) is Python $(IDENTITY); this project needs 3.11, 3.12 or 3.13: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	rm -rf $(VENV)
	$(if $(UV),$(UV) venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
	@touch $@

$(VENV)/.installed-base: pyproject.toml $(VENV)/.python-$(IDENTITY)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.python-$(IDENTITY)
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed-base

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.python-$(IDENTITY)
	$(INSTALL) -e '.[docs]'
	@touch $@ $(VENV)/.installed-base

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build site *.egg-info
