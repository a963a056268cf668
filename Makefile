PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test lint minimum

# Train an unmasking policy with GRPO on embedded problems; ends with a table and a plot.
train: $(VENV)/installed
	$(RUN) train_policy.py grpo

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The tests on the oldest versions that setup.cfg promises.
minimum:
	$(PYTHON) .ci/minimum_versions.py

# The file says that the environment is whole: an interrupted installation is made again.
$(VENV)/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --constraint constraints.txt -e ".[test]"
	touch $@
