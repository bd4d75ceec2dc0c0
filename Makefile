PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt

# Reads every page again: a warning in a page that has not changed would not be repeated.
DOCS = $(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet --builder html docs build/docs

# Most tests of real parts wait for one another's processes: four at a time keep two cores busy.
PYTEST = $(BIN)/pytest --quiet -n 4 --dist loadfile --no-loadscope-reorder

# Images: what builds them, what their names begin with, and further options of the build.
BUILDER ?= $(if $(shell command -v buildah),buildah,docker)
REGISTRY ?=
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' cascade/__init__.py)
IMAGE = $(BUILDER) build $(BUILD_OPTIONS) --file Containerfile --build-arg VERSION=$(VERSION) \
	--build-arg REVISION=$(shell git rev-parse HEAD) --build-arg BUNDLE=$(or $(BUNDLE),cascade/bundles/simulator-small)

# Where this is set, each process of the demo and of the tests would compile all their sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long chart kube-programs kube-test kube-test-keda image images cluster-images cluster-test docs handbook fuzz simulate-faults chaos delivery soak bench bench-smoke bundle constraints clean

demo: $(VENV)/.serve
	$(BIN)/cascade demo --out build/demo

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(DOCS)
	$(BIN)/cascade local install
	$(PYTEST) -m 'not long and not kube and not cluster' tests/e2e tests

test-long: $(VENV)/.dev
	$(BIN)/cascade local install
	$(PYTEST) -n 2 -m long tests
	$(BIN)/cascade bench smoke --out build/smoke --json build/smoke.json

# Needs kubectl on PATH.
chart: $(VENV)/.dev
	$(BIN)/python k8s/generate.py

kube-programs: $(VENV)/.dev
	$(BIN)/python tests/kube/build.py all

kube-test: $(VENV)/.dev
	tests/kube/in-own-network.sh $(BIN)/pytest --quiet -m 'kube and not keda' tests/kube

kube-test-keda: $(VENV)/.dev
	$(BIN)/cascade local install
	tests/kube/in-own-network.sh $(BIN)/pytest --quiet -m keda tests/kube

# The images, and in build/images the list of the packages in them (CycloneDX). BUNDLE: a folder of this one whose name
# begins with `bundle`, by default the shipped bundle.
images: image
	$(IMAGE) --target cascade-bundle --tag $(REGISTRY)cascade-bundle:$(VERSION) .
	$(IMAGE) --target cascade-triton-cpu --tag $(REGISTRY)cascade-triton-cpu:$(VERSION) .
	$(IMAGE) --target sbom --output build/images .

image:
	$(IMAGE) --target cascade --tag $(REGISTRY)cascade:$(VERSION) .

cluster-images: $(VENV)/.dev
	$(BIN)/python tests/kube/node/images.py build

cluster-test: $(VENV)/.dev
	$(BIN)/python tests/kube/node/images.py ready
	tests/kube/node/in-node.sh $(BIN)/pytest --quiet --exitfirst -m cluster tests/kube/node

docs: $(VENV)/.dev
	$(DOCS)
	@echo "build/docs/index.html"

handbook: $(VENV)/.dev
	$(BIN)/cascade handbook --data $(or $(DATA),../shared/data/handbook.parquet) --out build/handbook --folds $(or $(FOLDS),1)

fuzz: $(VENV)/.serve
	$(BIN)/cascade fuzz --messages $(or $(N),10000000) --seed $(or $(SEED),1) --json build/fuzz.json

simulate-faults: $(VENV)/.serve
	$(BIN)/cascade simulate-faults --schedules $(or $(N),1000) --seed $(or $(SEED),1) --out build/faults.json

chaos: $(VENV)/.serve
	$(BIN)/cascade chaos --cycles $(or $(CYCLES),200) --seed $(or $(SEED),1) --out build/chaos --json build/chaos.json

delivery: $(VENV)/.serve
	$(BIN)/cascade delivery --out build/delivery --json build/delivery.json

bench-smoke: $(VENV)/.dev
	$(BIN)/cascade bench smoke --out build/smoke --json build/smoke.json

bench: $(VENV)/.dev
	$(BIN)/cascade bench screener --json build/screener.json
	$(BIN)/cascade bench stages --json build/stages.json
	$(BIN)/cascade bench features --json build/features.json
	$(BIN)/cascade bench echo --out build/echo --json build/echo.json
	$(BIN)/cascade bench pipeline --out build/pipeline --json build/pipeline.json --html build/pipeline.html

soak: $(VENV)/.serve
	$(BIN)/cascade soak --minutes $(or $(MINUTES),10) --out build/soak --json build/soak.json

bundle: $(VENV)/.dev
	$(BIN)/cascade simulate --out build/bundle/transactions.parquet --cards 8000 --terminals 16000 --days 120 --seed 1
	$(BIN)/cascade train --data build/bundle/transactions.parquet --features cascade/schemas/simulator-features.toml \
		--training cascade/schemas/simulator-training.toml \
		--name simulator --out cascade/bundles/simulator

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/uv
	@echo "setting up $(VENV) (packages, Apache Kafka, Triton)"
	$(UV) --editable '.[local,plan,report]'
	$(BIN)/cascade local install
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(UV) --editable '.[local,train,dev,docs,otel,plan,report]'
	@touch $@

constraints: | $(BIN)/uv
	$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate --all-extras --python-version 3.11 pyproject.toml \
		| grep -v -i onnxruntime-gpu > constraints.txt

clean:
	rm -rf $(VENV) build
