# Every target does its own set-up; a second call does no work twice.
#   make train    fetch the model, teach it the facts of data.py, draw the curves
#   make test     lint, unit tests, parity with PEFT, one short run on the real model
PYTHON ?= python3
PY := .venv/bin/python
RUN ?= runs/demo

.PHONY: setup train test slow lint plots doctor lines clean

setup: .venv/dev.done

train: .venv/run.done
	$(PY) train.py $(ARGS)

test: lint
	$(PY) -m pytest -m "not slow"

slow: setup
	$(PY) -m pytest -m slow

lint: setup
	$(PY) -m ruff check .

plots: .venv/run.done
	$(PY) -m plots $(RUN)

doctor: .venv/run.done
	$(PY) -m scripts.doctor $(ARGS)

lines:
	@git ls-files -z '*.py' ':!tests' | xargs -0 wc -l | sort -n

clean:
	rm -rf .venv runs

.venv/run.done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev.done: requirements-dev.txt .venv/run.done
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
