# Every target sets up what it needs: a .venv with the pinned requirements and this package, editable.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL ?= $(PY) -m pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all test-nightly lint docs clean

demo: .venv/.ready
	$(PY) -m twigvlm demo --stream --pruning twig-discount -R 64 --question "Describe the image in detail."

test: .venv/.ready
	$(PY) -m pytest -m "not slow and not nightly" -n 2 --dist loadfile

test-all: .venv/.ready
	$(PY) -m pytest -m "not nightly"

test-nightly: .venv/.ready
	$(PY) -m pytest -m nightly

lint: .venv/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: build/docs/.ready
	build/docs/bin/python -m mkdocs build --strict
	@echo "build/site/index.html"

build/docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
