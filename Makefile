PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# Containers often set it; every process would then compile all the modules that it imports, which takes it seconds.
export PYTHONDONTWRITEBYTECODE =

.PHONY: train test lint types docs minimum

# Train an unmasking policy with GRPO on embedded problems; ends with a table and a plot.
train: $(VENV)/installed
	$(RUN) train_policy.py grpo

test: $(VENV)/installed-for-tests
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-for-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy on the packages as they are installed: agents/ and eval/ inside dllm_gym.
types: $(VENV)/installed-for-tests build/package
	cd build/package && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/setup.cfg -p dllm_gym

# The documentation as a site, build/site/index.html; warnings are errors.
docs: $(VENV)/installed-for-tests build/package
	$(RUN) -m mkdocs build --quiet

build/package: $(wildcard dllm_gym/*)
	rm -rf $@ && mkdir -p $@/dllm_gym
	ln -s $(CURDIR)/dllm_gym/* $(CURDIR)/agents $(CURDIR)/eval $@/dllm_gym

# The tests on the oldest versions that setup.cfg promises.
minimum:
	$(PYTHON) .ci/minimum_versions.py

# The file says that the environment is whole: an interrupted installation is made again. Modules are compiled as they
# are imported, which takes half a minute less than all at once.
INSTALL = $(RUN) -m pip install -q --no-compile --constraint constraints.txt

$(VENV)/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[all]"
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(INSTALL) -e ".[test]"
	touch $@
