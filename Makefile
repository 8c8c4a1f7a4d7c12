# Everything runs in the environment that is active; PYTHON chooses another interpreter.
PYTHON ?= python
OLDEST ?= .venv-oldest

.PHONY: check lint test slow oldest docs

check: lint test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test:
	$(PYTHON) -m pytest -q -n 2

slow:
	$(PYTHON) -m pytest -q -m slow

# the fast tests on the lower bounds of pyproject.toml
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -e ".[all]" -c constraints-oldest.txt
	$(OLDEST)/bin/python -m pytest -q -n 2

docs:
	$(PYTHON) -m zoo.releases > checkpoints.md.new && mv checkpoints.md.new checkpoints.md
	$(PYTHON) tests/measure_golden.py
	$(PYTHON) -m zoo.table docs/models.md
	$(PYTHON) -m recipes.shell
	$(PYTHON) -m recipes.papers > docs/recipes.md.new && mv docs/recipes.md.new docs/recipes.md
	$(PYTHON) -m docs.draw
	$(PYTHON) -m docs.render
	$(PYTHON) -m mkdocs build --strict
