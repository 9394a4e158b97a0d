# The two commands of the README are `make lab` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

# A Go that setup fetched comes first; see hack/setup.
export PATH := $(CURDIR)/.cache/go/bin:$(PATH)
export CGO_ENABLED := 0
export GOFLAGS := -buildvcs=false

VERSION := $(shell git describe --always --dirty 2>/dev/null || echo development)
LDFLAGS := -s -w -X main.version=$(VERSION)
SITE := bin/site
LAB_TOKEN := .lab/lab/root-token
LAB_TOOLS := nomad nomad-driver-podman secrets-server versitygw ansible
TEST_TIMEOUT ?= 80m
HOST_PROGRAMS := site-host object-storage-service

.PHONY: setup build lab lab-down test test-unit test-full lint bench tools generate clean

setup: ## install what this machine lacks
	@hack/setup

# site carries what runs on the hosts, for both architectures.
build: ## build bin/site and bin/site-host
	@mkdir -p bin
	for program in $(HOST_PROGRAMS); do for arch in amd64 arm64; do \
	  GOOS=linux GOARCH=$$arch go build -trimpath -ldflags "-s -w" -o internal/hostbinary/$$program-linux-$$arch ./cmd/$$program; \
	done; done
	go build -trimpath -tags embed_site_host -ldflags "$(LDFLAGS)" -o $(SITE) ./cmd/site

tools: build ## build the pinned tools into the cache
	$(SITE) tool install $(LAB_TOOLS)

lab: setup tools ## boot the lab and bring it to a healthy job
	$(SITE) lab up
	[ -f $(LAB_TOKEN) ] || { rm -f sites/lab/init.age; $(SITE) root-token new $(LAB_TOKEN); }
	$(SITE) bootstrap-deploy --site=lab --root-token-file=$(LAB_TOKEN)
	$(SITE) status --site=lab
	@echo
	@echo "The application answers:"
	@$(SITE) tunnel --site=lab hello --get=/version
	@echo
	@echo "Look around:"
	@echo "  $(SITE) status --site=lab              what runs"
	@echo "  $(SITE) logs --site=lab hello          what it says"
	@echo "  $(SITE) tunnel --site=lab hello        open it at a local address"
	@echo "  $(SITE) lab shell                      a root shell on the host"
	@echo "  $(SITE) deploy --site=lab              after a commit"
	@echo "  $(SITE) secrets rotate --all --site=lab  a new password, while it runs"
	@echo "  make lab-down                          remove it"

lab-down: ## remove the lab
	$(SITE) lab down
	rm -f sites/lab/init.age # sealed to the root token that went with the lab

test-unit: ## tests without root or a lab, under a minute
	SITE_TEST_UNIT=1 go test ./...

test: setup tools ## every test, on a lab of its own
	SITE_TEST_LAB=1 SITE_TEST_SITE=$(CURDIR)/$(SITE) go test -p 1 -timeout $(TEST_TIMEOUT) ./...

test-full: setup tools ## the long matrices too
	SITE_TEST_LAB=1 SITE_TEST_FULL=1 SITE_TEST_SITE=$(CURDIR)/$(SITE) go test -p 1 -count=1 -timeout 3h ./...

lint: setup build ## formatting, import rules, build files, generated files
	hack/lint

generate: build ## write what is generated: build files, command reference, golden files
	$(SITE) tool install gazelle
	hack/bazel
	SITE_TEST_UNIT=1 go test ./internal/adapter/toolchain ./internal/cli ./internal/reconcile/host ./internal/site \
	  -run 'Catalogue|Reference|Golden|Formatted' -update

bench: setup tools ## speed and memory, as ratios; see docs/performance.md
	SITE_TEST_LAB=1 SITE_TEST_SITE=$(CURDIR)/$(SITE) go test -run '^$$' -bench . -benchtime 1x -timeout 60m ./test/bench/... ./internal/adapter/openbao ./internal/adapter/postgres

clean: ## remove what was built here
	rm -rf bin $(HOST_PROGRAMS:%=internal/hostbinary/%-linux-*)
