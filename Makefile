# Palisade: everything a clean clone needs. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

NODES ?= 1
SECONDS_EACH ?= 600
CARGO ?= cargo
# Tools that setup installs for this clone only (bpf-linker, kubectl).
export PATH := $(CURDIR)/.tools/bin:$(PATH)
TARGET_DIR := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)

.PHONY: help setup build release demo test test-cluster fuzz lint bench image clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo NODES=3 runs the walk-through across three nodes."
	@echo "  make test-cluster CONNECTIVITY='--external-ip 1.1.1.1' asks for what is outside, too."

setup: ## Install what is missing: toolchain for eBPF, bpf-linker, kubectl (needs root)
	@scripts/setup.sh

build: setup ## Build every binary (development profile, first result soonest)
	@$(CARGO) build --workspace --locked

release: setup ## Build every binary, optimised
	@$(CARGO) build --workspace --locked --release

demo: build ## Bring up a cluster, run the Star Wars walk-through, take it down again
	@$(TARGET_DIR)/debug/palisade demo starwars --nodes $(NODES)

test: build ## Run every test, those that need root and the kernel included
	@scripts/setup.sh test
	@scripts/test.sh

test-cluster: build ## Run the end-to-end tests in the cluster that KUBECONFIG leads to
	@PALISADE=$(TARGET_DIR)/debug/palisade scripts/test-cluster.sh $(CONNECTIVITY)

fuzz: setup ## Fuzz the proxy's readers, each for SECONDS_EACH (needs g++)
	@scripts/fuzz.sh $(SECONDS_EACH)

lint: setup ## Check formatting and run clippy with warnings denied
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets --locked -- --deny warnings

bench: release ## Measure the data path and the control path, as a table and as JSON
	@$(TARGET_DIR)/release/palisade bench

image: setup ## Write dist/palisade-VERSION.tar, an OCI image of what runs in a cluster
	@scripts/image.sh dist

clean: ## Remove build output (tools installed by setup stay in .tools)
	@$(CARGO) clean
