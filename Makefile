# Commands of attnimg. Every target installs its own dependencies, in .venv and build/.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check
DEMO := outputs/demo
# mistral-common and what it needs beside requirements/lock.txt; it asks for an older numpy, and runs without.
MISTRAL := mistral-common==1.13.1 tiktoken==0.14.0 pydantic-extra-types==2.11.1 pycountry==26.2.16 \
  jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 attrs==26.1.0
# Processes for `make test`.
JOBS ?= 2
# One thread per process: more are slower on a shared machine, and losses stay the same bit for bit.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test check docs bench lock render families classes axolotl-examples gpu-kit clean

help: ## Show these targets
	@grep -hE '^[a-z0-9/%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9\/%-]+):.*## /\1\t/' | expand -t 12

setup: .venv/ready ## Install attnimg and the locked packages into .venv

demo: .venv/ready ## Train a small model to define words, with and without packing; 2 minutes on two CPU cores
	@echo "demo: removing the last run in $(DEMO)"
	@rm -rf $(DEMO)/trained $(DEMO)/padded
	@$(BIN)/python examples/demo/prepare.py $(DEMO)
	@echo; echo "  before training, it answers:"
	@$(BIN)/python examples/demo/ask.py $(DEMO)/untrained
	@$(BIN)/attnimg train examples/demo/demo.yaml
	@echo; echo "demo: training with padded rows for 12 steps, to compare the speed"
	@$(BIN)/attnimg train examples/demo/demo.yaml sample_packing=false micro_batch_size=22 max_steps=12 \
	  logging_steps=3 save_steps=12 output_dir=$(DEMO)/padded >$(DEMO)/padded.log 2>&1 || { cat $(DEMO)/padded.log; exit 1; }
	@echo; echo "  after training, it answers:"
	@$(BIN)/python examples/demo/ask.py $(DEMO)/trained
	@echo; $(BIN)/python examples/demo/compare.py $(DEMO)/trained $(DEMO)/padded
	@echo "  files      $(DEMO)/trained/loss.png and $(DEMO)/trained/receipt.json"

test: .venv/ready ## Run the tests that need no Docker and no GPU
	@# Each file runs in one process, because its tests share fixtures; the order is in tests/conftest.py.
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test/packages: .venv/ready build/fa4/ready ## Compare the files of backends with the kernel packages; downloads 17 MB, and build/fa4
	@mkdir -p build/packages
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(BIN)/pip download -q --disable-pip-version-check -d build/packages --no-deps \
	  --no-binary flash-attn --no-build-isolation $$(grep -oh '^kernels==[^ ]*' requirements/lock.txt) \
	  $$(sed -n 's/^source = "\(.*==.*\)"/\1/p' recipes/kernels/*.toml)
	WHEELS=build/packages FA4_PYTHON=build/fa4/bin/python $(BIN)/pytest tests/packages

.PHONY: attack
attack: .venv/ready ## Run attnimg on random wrong configs, files, environments and kernels, and kill runs; 25 minutes; ATTACK_SEED=N
	ATTACK_SECONDS=$(or $(ATTACK_SECONDS),120) ATTACK_KILLS=50 $(BIN)/pytest -n $(JOBS) --timeout 3600 tests/attack

.PHONY: test/data
test/data: .venv/ready ## Test 20 times as many random records and conversations as `make test` does, 15 minutes
	DATA_EXAMPLES=20 $(BIN)/pytest -n $(JOBS) --timeout 3600 tests/unit/data/test_data_properties.py tests/unit/data/test_chat_labels.py

test/templates: .venv/ready ## Compare prompts and labels with axolotl's wheel; downloads 2 MB
	@mkdir -p build/packages
	$(BIN)/pip download -q --disable-pip-version-check -d build/packages --no-deps \
	  axolotl==0.19.0 addict==2.4.0 colorama==0.4.6
	WHEELS=build/packages $(BIN)/pytest tests/packages/test_chat_templates.py \
	  tests/packages/test_prompts.py tests/packages/test_chat_options.py \
	  tests/packages/test_named_templates.py

test/mistral: .venv/ready ## Read Mistral's tokenizers with mistral-common, and test the schema; downloads 9 MB into build/mistral
	@mkdir -p build/mistral
	@$(BIN)/pip install -q --disable-pip-version-check --upgrade --no-deps --target build/mistral $(MISTRAL)
	PYTHONPATH=build/mistral $(BIN)/pytest tests/unit/data/test_chat_mistral.py \
	  tests/unit/config/test_json_schema.py

test/qat: .venv/ready build/qat/ready ## Train with qat, and compare with models that torchao quantizes; downloads 8 MB into build/qat; 2 minutes
	PYTHONPATH=build/qat/packages $(BIN)/pytest tests/qat

axolotl-examples: .venv/ready build/qat/ready ## Check axolotl's examples, and train 20 of them on tiny models; downloads 4 MB; 3 minutes
	@mkdir -p build/axolotl-source
	$(BIN)/pip download -q --disable-pip-version-check -d build/axolotl-source --no-deps --no-binary axolotl \
	  --no-build-isolation axolotl==0.19.0
	tar xzf build/axolotl-source/axolotl-0.19.0.tar.gz -C build/axolotl-source --strip-components 1
	PYTHONPATH=.:tests/fixtures:tests/train:build/qat/packages $(BIN)/python tests/train/axolotl_examples.py build/axolotl-source/examples

test/axolotl: build/axolotl/ready ## Train with axolotl and attnimg's plugin, and run the API on axolotl's transformers, 10 minutes
	PYTHONPATH=. build/axolotl/bin/pytest -p no:anyio --ignore tests/unit/api/test_types.py \
	  tests/unit/api tests/unit/test_apply.py tests/unit/test_local_kernel.py
	AXOLOTL_RECORD=1 PYTHONPATH=. build/axolotl/bin/pytest -p no:anyio --timeout 900 tests/axolotl

check: .venv/ready ## Format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m recipes check
	$(BIN)/hadolint -c docker/hadolint.yaml docker/Dockerfile
	$(BIN)/shellcheck docker/*.sh docker/added/*.sh docker/install/*.sh .github/*.sh .ci/run
	$(BIN)/actionlint .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github

docs: build/docs/ready ## Build the site of docs/ into build/site; a broken link is refused
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict
	@! grep -rlE '<(script|link|img)[^>]*(src|href)="?https?:' build/site --include='*.html' || { printf 'docs: %s\n  why: %s\n  do:  %s\n' \
	  "a page loads something from another site" "the pages are above" "remove it, or copy it into docs/" >&2; exit 1; }
	@echo "docs: open build/site/index.html; with search: python3 -m http.server -d build/site"

.PHONY: gpu-rehearsal
gpu-rehearsal: .venv/ready ## Run tests/gpu/suite.py, the script for GPU machines, on a CPU; 1 minute
	@rm -f build/gpu-rehearsal.jsonl
	$(BIN)/python tests/gpu/suite.py --rehearsal --budget 900 --out build/gpu-rehearsal.jsonl
	@$(BIN)/python -m recipes gpu-run build/gpu-rehearsal.jsonl --all-right >build/gpu-rehearsal.md
	@echo "gpu-rehearsal: the records are complete; report: build/gpu-rehearsal.md"

gpu-rehearsal/old: build/gpu-old/ready ## The same with transformers 5.17, as on a machine with older packages
	@$(MAKE) gpu-rehearsal BIN=build/gpu-old/bin --assume-old=.venv/ready

bench: .venv/ready ## Measure the figures in the README
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/router.py

bench/proof-noise: .venv/ready ## Count wrong proofs of kernels with the numerical noise of a GPU; an hour
	$(BIN)/python benchmarks/proof_noise.py

bench/checkpoints: .venv/ready ## Measure the time of hashing in saving and resuming checkpoints; 10 minutes
	@mkdir -p build
	$(BIN)/python benchmarks/checkpoints.py

bench/proof-cost: .venv/ready ## Compare the CPU time of a proof with that at commit 5a8433e; 5 minutes
	$(BIN)/python benchmarks/proof_cost.py

.PHONY: bench/cpu-limits
bench/cpu-limits: .venv/ready ## Compare attnimg:cpu with OLD=IMAGE under CPU limits: proof time, tokens/s; 15 minutes
	@[ -n "$(OLD)" ] || { printf 'bench: %s\n  why: %s\n  do:  %s\n' "no image to compare with is given" \
	  "found no OLD" "make $@ OLD=attnimg-old:cpu, an image that an earlier commit built" >&2; exit 2; }
	PYTHONPATH=. $(BIN)/python benchmarks/cpu_limits.py "$(OLD)"

.PHONY: bench/spins
bench/spins: .venv/ready ## Compare how long OpenMP's threads wait for one another: tokens/s, alone and with neighbours; 10 minutes
	PYTHONPATH=. $(BIN)/python benchmarks/spins.py

bench/own-loss: .venv/ready ## Count false alarms and misses of the loss comparison; 15 minutes
	$(BIN)/python benchmarks/own_loss.py

bench/peers: .venv/ready build/axolotl/ready ## Compare with a TRL script and axolotl: start, speed, memory, loss; 15 minutes
	PYTHONPATH=. $(BIN)/python benchmarks/peers.py

bench/running-check: .venv/ready ## Count false alarms and misses of the running check, and measure its cost; 10 minutes
	$(BIN)/python benchmarks/running_check.py

bench/memory: .venv/ready ## Compare the forecast of memory with the peaks of runs on the CPU; an hour
	@mkdir -p build
	$(BIN)/python benchmarks/memory.py

# UPGRADE=PACKAGE takes the newest version of one package.
LOCK_UPGRADE = $(addprefix --upgrade-package ,$(UPGRADE))

lock: .venv/ready ## Resolve requirements/ again, from pyproject.toml and recipes/
	$(BIN)/uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	  $(addprefix --find-links ,$(PIP_FIND_LINKS)) `# pip's CPU build of torch: the index's needs CUDA` \
	  --no-emit-package torch -c requirements/torch.txt --extra train --group dev $(LOCK_UPGRADE) \
	  --custom-compile-command "make lock" -o requirements/lock.txt pyproject.toml
	$(BIN)/uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --custom-compile-command "make lock" -o requirements/docs.txt requirements/docs.in
	$(BIN)/uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url $(LOCK_UPGRADE) \
	  --custom-compile-command "make lock" -o requirements/audit.txt requirements/audit.in
	$(BIN)/uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	  $(addprefix --find-links ,$(PIP_FIND_LINKS)) --no-emit-package torch -c requirements/torch.txt \
	  --excludes requirements/axolotl-excluded.txt --custom-compile-command "make lock" $(LOCK_UPGRADE) \
	  -o requirements/axolotl.txt requirements/axolotl.in
	$(BIN)/python -m recipes lock
	$(BIN)/python -m recipes render

render: .venv/ready ## Write every file that is generated from recipes/
	$(BIN)/python -m recipes render

families: .venv/ready ## Train a tiny model of every causal type of transformers, packed and not; 20 minutes
	PYTHONPATH=.:tests/fixtures $(BIN)/python tests/train/families.py
	@$(BIN)/python -m recipes render

classes: .venv/ready ## List the model classes of the pinned transformers, and what they don't support
	$(BIN)/python -m recipes classes

engine: ## Start a Docker engine if none is running; needs root
	@docker/engine.sh

.PHONY: podman
podman: ## Install Podman for `make test/%`, from Debian's packages, if there is none; needs root
	@command -v podman >/dev/null || { echo "podman: installing the packages podman and catatonit"; \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends podman catatonit; }

base: engine ## Pull the base image by its digest, or make a stand-in of Debian's packages
	@docker/base_image.py

# Refuse a name without a recipe, with the names that have one; and a KERNEL that is not built for it.
KNOWN = docker/build.py $* --check $(if $(KERNEL),--kernel "$$KERNEL")

# PLATFORM=linux/arm64 is for all targets of images; the default is this machine's (docker/platforms.py). File names have
# no suffix for linux/amd64, and tags in the engine none for this machine's platform.
OWN_PLATFORM := linux/$(subst aarch64,arm64,$(subst x86_64,amd64,$(shell uname -m)))
OF_FILES = $(if $(filter-out linux/amd64,$(or $(PLATFORM),$(OWN_PLATFORM))),-$(notdir $(or $(PLATFORM),$(OWN_PLATFORM))))
OF_TAG = $(if $(filter-out $(OWN_PLATFORM),$(PLATFORM)),-$(notdir $(PLATFORM)))

# The wheels of an image; small builds have a folder of their own.
HOUSE = dist/$*$(OF_FILES)$(if $(TRIM),-trim)

# Start the engine, unless there is no recipe of the image.
NEEDS_ENGINE = @$(KNOWN) && $(MAKE) engine

NEEDS_MACHINE = @[ -n "$(MACHINE)" ] || { printf '$(@D): %s\n  why: %s\n  do:  %s\n' "no build machine is given" \
  "found no MACHINE" "make $@ MACHINE='2 cores, no GPU', in general words" >&2; exit 2; }

# $(call NEEDS_SET,FILE,WHAT): refuse an image whose recipe has nothing to compile ahead of time.
NEEDS_SET = @[ -e docker/images/$*/$(1) ] || { printf '$@: %s\n  why: %s\n  do:  %s\n' "attnimg:$* has no $(2)" \
	  "found no docker/images/$*/$(1)" "name one of: $$(cd docker/images && ls */$(1) | cut -d/ -f1 | paste -sd ' ')" >&2; exit 2; }

# The image that a target tests or checks: attnimg:NAME in this engine; with DIGEST, that one, pulled from REGISTRY.
SUBJECT = $(if $(DIGEST),$$($(BIN)/python -m recipes pull $* "$$DIGEST"),attnimg:$*$(OF_TAG))

# Refuse an unknown image, and one that is not in the engine: docker run would ask docker.io for attnimg:NAME.
NEEDS_IMAGE = $(if $(DIGEST),$(KNOWN),docker/build.py $* --built "$(or $(CHILD),attnimg:$*$(OF_TAG))")

build/%: ## Build the image attnimg:%, for example build/cpu; WHEELS=dist/% uses existing wheels, PLATFORM=linux/arm64 builds for arm64
	$(NEEDS_ENGINE)
	@docker/build.py $*

toolchain/%: ## Build the stage that compiles the kernels of attnimg:%
	$(NEEDS_ENGINE)
	@docker/build.py $* --stage toolchain

sources/%: .venv/ready ## Fetch the git trees of attnimg:%'s kernels; FROM=DIR reads them from clones
	@$(BIN)/python -m recipes sources $* $(if $(FROM),--from "$$FROM")

wheels/%: ## Compile the kernels of attnimg:% that dist/% lacks, or KERNEL=one of them; hours; TRIM=1: small builds, into dist/%-trim
	$(NEEDS_ENGINE)
	@PROGRESS=plain docker/build.py $* --wheels-to $(HOUSE) $(if $(KERNEL),--kernel "$$KERNEL")

kernels/%: ## Compile the kernels of attnimg:% that the registry CACHE=host/namespace does not have, and push them; KERNEL=one of them
	$(NEEDS_ENGINE)
	@CACHE="$(CACHE)" PROGRESS=plain docker/build.py $* --to-cache $(if $(KERNEL),--kernel "$$KERNEL")

layers/%: ## Build the layers of torch and the stack, which images share, and push them to the registry CACHE=host/namespace
	$(NEEDS_ENGINE)
	@CACHE="$(CACHE)" docker/build.py $* --stage stack --to-cache

built/%: .venv/ready ## Record the wheels of dist/%, all or some, in docs/built; MACHINE="the build machine"
	@$(KNOWN)
	$(NEEDS_MACHINE)
	@$(BIN)/python -m recipes built $* --wheels $(HOUSE) --machine "$$MACHINE"

image-record/%: .venv/ready ## Run the selftest of attnimg:%, and record its result and the image's compressed sizes in docs/built; 1 to 6 minutes
	@$(NEEDS_IMAGE)
	@mkdir -p build; base=build/record-$*$(OF_FILES); trap "rm -f $$base.tar $$base.txt" EXIT; \
	docker run --rm attnimg:$*$(OF_TAG) selftest | tee $$base.txt; \
	docker save attnimg:$*$(OF_TAG) -o $$base.tar; \
	$(BIN)/python -m recipes image-record $* --archive $$base.tar --selftest $$base.txt

# COMPILED is empty for an image without kernels to compile; AGAIN runs make without installing .venv again.
COMPILED = $(wildcard docker/images/$*/kernels)
AGAIN = $(MAKE) -o .venv/ready

whole/%: .venv/ready ## Compile what dist/% lacks, record it, build, gate, test and record attnimg:%; continues after an interruption; MACHINE="the build machine"
	@$(KNOWN)
	$(if $(COMPILED),$(NEEDS_MACHINE))
	@$(if $(COMPILED),$(AGAIN) wheels/$* && $(AGAIN) built/$*)
	@$(AGAIN) build/$* $(if $(COMPILED),WHEELS=$(HOUSE))
	@$(AGAIN) gate/$* && $(AGAIN) test/$* && $(AGAIN) image-record/$*

unit/%: ## Compile one source file of flash-attn for attnimg:%; 5 minutes
	$(NEEDS_ENGINE)
	@PROGRESS=plain docker/build.py $* --kernel flash-attn --stage unit

fa4-kernels/%: .venv/ready ## Compile FlashAttention-4's kernels for attnimg:% into dist/; 10 minutes per architecture
	@$(KNOWN)
	$(call NEEDS_SET,fa4_kernels.json,kernels of FlashAttention-4)
	$(NEEDS_ENGINE)
	@PROGRESS=plain docker/build.py $* --stage fa4-kernels
	@rm -rf dist/fa4-kernels-$*$(OF_FILES) && mkdir -p dist docs/built
	@id=$$(docker create attnimg-fa4-kernels:$*$(OF_TAG) none) && \
	  docker cp -q "$$id:/opt/attnimg/fa4" dist/fa4-kernels-$*$(OF_FILES) && docker rm "$$id" >/dev/null
	@$(BIN)/python -B docker/precompiled/record.py dist/fa4-kernels-$*$(OF_FILES)/manifest.json >dist/record.json
	@mv dist/record.json docs/built/fa4-cache-$*$(OF_FILES).json
	@release=$$(sed -n 's/.*"python release": "\([^"]*\)".*/\1/p' docs/built/fa4-cache-$*$(OF_FILES).json); \
	  echo "test them with Python $$release, as in the image; another looks up other kernels:"; \
	  echo "  rm -rf build/fa4; FA4_KERNELS=dist/fa4-kernels-$*$(OF_FILES) make test/fa4-cache PYTHON=PATH"; \
	  echo "  PATH is that of Python $$release; Debian bookworm's /usr/bin/python3.11 is 3.11.2"

triton-kernels/%: .venv/ready ## Compile SageAttention's Triton kernels for attnimg:% into dist/; 1 to 3 minutes per architecture
	@$(KNOWN)
	$(call NEEDS_SET,triton_kernels.json,Triton kernels)
	$(NEEDS_ENGINE)
	@PROGRESS=plain docker/build.py $* --stage triton-kernels
	@rm -rf dist/triton-kernels-$*$(OF_FILES) && mkdir -p dist docs/built
	@id=$$(docker create attnimg-triton-kernels:$*$(OF_TAG) none) && \
	  docker cp -q "$$id:/opt/attnimg/triton" dist/triton-kernels-$*$(OF_FILES) && docker rm "$$id" >/dev/null
	@$(BIN)/python -B docker/precompiled/record.py dist/triton-kernels-$*$(OF_FILES)/manifest.json >dist/record.json
	@mv dist/record.json docs/built/triton-cache-$*$(OF_FILES).json

test/fa4-cache: .venv/ready build/fa4/ready ## Compile kernels of FlashAttention-4 and Triton without a GPU, and look them up
	TRITON_PYTHON=build/fa4/bin/python $(BIN)/pytest tests/precompiled/triton
	FA4_PYTHON=build/fa4/bin/python $(BIN)/pytest tests/precompiled/fa4

test/contexts: .venv/ready ## Train with every combination of rows, precision, weights, checkpointing, compilation; 242 runs
	CONTEXTS=all $(BIN)/pytest -v tests/train/test_contexts.py

test/proofs: .venv/ready ## Prove all wrong kernels, also those that `make test` leaves out, 6 minutes
	PROOFS=all $(BIN)/pytest -v tests/unit/verification/test_wrong_kernels.py tests/unit/verification/test_wrong_kernels_combined.py \
	  tests/unit/verification/test_verify_command.py

test/reload: .venv/ready ## Train 110 model types, save and reload them: full and LoRA, float32 and bfloat16; 15 minutes
	RELOAD=all $(BIN)/pytest -v tests/train/test_reload.py

release-tools: ## Install skopeo and cosign, which move and sign images, from Debian; needs root
	@docker/release_tools.sh skopeo cosign

test/release: .venv/ready ## Release attnimg:cpu to a registry on this machine; refuse tampered images; 2 minutes
	@docker/release_tools.sh skopeo cosign docker-registry
	$(BIN)/pytest -v tests/release tests/unit/recipes/test_base_digests.py

test/gates: .venv/ready build/nvcc/ready ## Test the gates on small images with real machine code; 1 minute
	$(BIN)/pytest tests/gates

test/public-base: .venv/ready engine ## Build attnimg:cpu on a base made as the public python:3.11-slim-bookworm, run gates and tests; 15 minutes
	@[ -x "$$(command -v docker-registry)" ] || apt-get install -qy --no-install-recommends docker-registry
	@$(BIN)/python tests/public_base/run.py

test/arm64: .venv/ready engine ## Build attnimg:cpu for linux/arm64 under qemu-user, without torch where no index has it, and run it; 20 minutes; installs qemu-user as root
	@PYTHONPATH=.:docker $(BIN)/python tests/arm64/image.py

test/arm64-kernel: .venv/ready engine ## Build xFormers for linux/arm64 and amd64, check and compare both wheels; 20 minutes
	@PYTHONPATH=.:docker $(BIN)/python tests/arm64/kernel.py

bench/arm64-units: .venv/ready engine ## Compile two source files for arm64 with a cross compiler and under qemu-user; downloads 1 GB; 10 minutes
	@PYTHONPATH=.:docker:tests/arm64 $(BIN)/python tests/arm64/units.py

test/reproducible: .venv/ready engine ## Build attnimg:cpu twice without a cache and list what differs; 15 minutes
	@mkdir -p build
	@$(BIN)/python tests/reproducible/run.py

test/shared-layers: ## Show that the built images with the same torch share its layer; needs two, such as cpu and cpu-devel
	@docker/shared_layers.py

test/children: .venv/ready build/cpu build/cpu-devel ## Build examples/child-images on attnimg:cpu: JupyterLab, axolotl, an extension; 10 minutes
	CHILDREN_RECORD=1 IMAGE=attnimg:cpu $(BIN)/pytest --timeout 3600 tests/children

test/%: .venv/ready ## Test the image attnimg:%, or DIGEST=sha256:... pulled from REGISTRY; TESTS="tests/image/test_running.py"
	@$(NEEDS_IMAGE)
	@image=$(SUBJECT); IMAGE=$$image $(BIN)/pytest $(or $(TESTS),tests/image)

gate/%: .venv/ready ## Check attnimg:% by all gates, or DIGEST=sha256:... from REGISTRY, ARCHIVE=file or folder, WHEELS=dist/%, CHILD=an image built FROM it; no GPU
	@$(if $(ARCHIVE)$(WHEELS),$(KNOWN),$(NEEDS_IMAGE))
	@if [ -z "$${ARCHIVE-}$${WHEELS-}" ]; then image=$(or $(CHILD),$(SUBJECT)); \
	  mkdir -p build; trap 'rm -f build/$*$(OF_FILES).tar' EXIT; \
	  echo "gate: saving $$image to build/$*$(OF_FILES).tar"; docker save "$$image" -o build/$*$(OF_FILES).tar; fi; \
	$(BIN)/python -m recipes gate $* $(if $(WHEELS),--wheels "$$WHEELS") $(if $(CHILD),--child) $(GATE_ARGS) \
	  $(if $(or $(ARCHIVE),$(if $(WHEELS),,1)),--archive "$${ARCHIVE:-build/$*$(OF_FILES).tar}") \
	  $(if $(or $(ARCHIVE),$(WHEELS),$(DIGEST),$(CHILD)),,--layout build/release/$*$(OF_FILES).oci)

scan/%: .venv/ready build/audit/ready ## Scan the Python packages of attnimg:% for known vulnerabilities
	@$(BIN)/python -m recipes scan $* --pip-audit build/audit/bin/pip-audit

scan-config: .venv/ready ## Write recipes/cves.toml as the configuration of grype, build/grype.yaml
	@mkdir -p build
	@$(BIN)/python -m recipes grype-config >build/grype.yaml

test/scan: .venv/ready build/audit/ready ## Test the scan against a server on this machine; 20 seconds
	PIP_AUDIT=build/audit/bin/pip-audit $(BIN)/pytest tests/scan

.PHONY: bump scan-config
bump: .venv/ready ## Commit each newer release of a pin, one commit a pin; DRY_RUN=1 only lists them; PIN=PACKAGE
	@$(BIN)/python -m recipes bump $(PIN) $(if $(DRY_RUN),--dry-run)

index/%: .venv/ready ## Write the wheels of dist/% as a package index into dist/index/%; BASE_URL=where the files will be
	@$(BIN)/python -m recipes index $* --wheels dist/$*$(OF_FILES) --to dist/index/$*$(OF_FILES) $(if $(BASE_URL),--base-url "$(BASE_URL)")

run/%: ## Run attnimg:% on this folder, as this user: make run/cpu ARGS="train config.yaml"
	@docker/build.py $* --built attnimg:$*$(OF_TAG)
	@docker run --rm --user "$$(id -u):$$(id -g)" -v "$$PWD:/workspace" -e ATTNIMG_IMAGE_DIGEST="$$(docker image inspect \
	  --format '{{range .RepoDigests}}{{println .}}{{end}}' attnimg:$*$(OF_TAG) 2>/dev/null | head -n 1)" attnimg:$*$(OF_TAG) $(ARGS)

gpu/%: $(if $(DIGEST),.venv/ready) ## Run the GPU tests inside attnimg:%, or DIGEST=sha256:... pulled from REGISTRY, on a machine with the GPU
	@$(NEEDS_IMAGE)
	@image=$(SUBJECT); docker run --rm --gpus all -v "$$PWD/tests:/tests:ro" --workdir /tests --entrypoint python \
	  "$$image" -m pytest gpu

gpu-kit: .venv/ready ## Pack the files for a GPU machine without network; COMPILE=python3.12 builds wheels too
	@$(BIN)/python tests/gpu/make_kit.py $(if $(COMPILE),--compile "$$COMPILE")

matrix/%: ## Print the jobs of CI: matrix/images, matrix/gpu, matrix/skipped...; IMAGE=one of them
	@python3 .github/matrix.py $* $(IMAGE)

release/%: .venv/ready ## Build, gate, push, test, sign, verify and tag attnimg:%; REGISTRY=host/name, REHEARSAL=1
	@$(BIN)/python -m recipes release $*

push/%: .venv/ready ## Push attnimg:%, which the gates have checked, by its digest, without a tag
	@$(BIN)/python -m recipes release $* --step push

tested/%: .venv/ready ## Test the pushed attnimg:% as pulled from REGISTRY, and record that it passed; promote needs it
	@$(BIN)/python -m recipes release $* --step test

attest/%: .venv/ready ## Sign the tested attnimg:%; attach SBOMs, provenance, machine code, VEX
	@$(BIN)/python -m recipes release $* --step attest

verify/%: .venv/ready ## Verify the attested attnimg:%, or DIGEST=sha256:... or TAG=% of REGISTRY, in a second, empty Docker engine
	@$(BIN)/python -m recipes $(if $(or $(DIGEST),$(TAG)),verify $* $(if $(DIGEST),--digest "$$DIGEST",--tag "$$TAG"),release $* --step verify)

promote/%: .venv/ready ## Give the verified attnimg:% its tags
	@$(BIN)/python -m recipes release $* --step promote

clean: ## Remove all build outputs, and .venv
	rm -rf .venv outputs build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

# FlashAttention-4 in the versions of the images, with the CPU build of torch.
build/fa4/ready: requirements/torch.txt docker/constraints/hopper.txt docker/precompiled/fa4/requirements.txt
	@echo "fa4-cache: installing FlashAttention-4 into build/fa4, 1 minute"
	@$(PYTHON) -m venv build/fa4
	@build/fa4/bin/pip install -qq --disable-pip-version-check -r requirements/torch.txt
	@build/fa4/bin/pip install -qq --disable-pip-version-check --no-deps -r docker/precompiled/fa4/requirements.txt
	@build/fa4/bin/pip install -qq --disable-pip-version-check --no-deps -c docker/constraints/hopper.txt \
	  flash-attn-4 nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core \
	  nvidia-cutlass-dsl-libs-cu13 apache-tvm-ffi quack-kernels torch-c-dlpack-ext cuda-bindings \
	  cuda-pathfinder triton einops protobuf numpy packaging platformdirs
	@touch $@

.venv/ready: requirements/torch.txt requirements/lock.txt pyproject.toml
	@echo "setup: installing into .venv, 1 to 3 minutes; 1 of 3: torch"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements/torch.txt
	@echo "setup: 2 of 3: $$(grep -c '==' requirements/lock.txt) locked packages"
	@$(PIP) --require-hashes --no-deps -r requirements/lock.txt
	@echo "setup: 3 of 3: attnimg itself"
	@# compat: a path in site-packages, which type checkers follow; they can't follow an import hook.
	@$(PIP) --no-deps --no-build-isolation -e . --config-settings editable_mode=compat
	@touch $@

# MkDocs, and pip-audit.
build/docs/ready build/audit/ready: build/%/ready: requirements/%.txt
	@echo "$*: installing the packages of $< into build/$*, 10 seconds"
	@$(PYTHON) -m venv build/$*
	@build/$*/bin/pip install -qq --disable-pip-version-check --require-hashes --no-deps -r $<
	@touch $@

# Packages that a machine with a GPU is likely to have: no attnimg, older libraries; trl and datasets for `train`.
build/gpu-old/ready: requirements/torch.txt Makefile
	@echo "gpu-rehearsal: installing transformers 5.17 into build/gpu-old, 1 to 3 minutes"
	@$(PYTHON) -m venv build/gpu-old
	@build/gpu-old/bin/pip install -qq --disable-pip-version-check -r requirements/torch.txt \
	  transformers==5.17.0 accelerate==1.15.0 trl==1.16.0 kernels==0.17.2 'datasets>=5.2,<6' 'peft>=0.21,<0.22' \
	  matplotlib psutil pyyaml rich 'pydantic>=2.11' 'platformdirs>=4' packaging pytest pytest-timeout
	@touch $@

# axolotl on the CPU build of torch, without what its run on a CPU does not import; attnimg without its trainer.
build/axolotl/ready: requirements/torch.txt requirements/axolotl.txt pyproject.toml
	@echo "axolotl: making build/axolotl with $$(grep -c '==' requirements/axolotl.txt) locked packages, 3 GB, 2 to 5 minutes"
	@$(PYTHON) -m venv build/axolotl
	@build/axolotl/bin/pip install -qq --disable-pip-version-check -r requirements/torch.txt
	@build/axolotl/bin/pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements/axolotl.txt
	@build/axolotl/bin/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@echo "axolotl: installed $$(grep -oE '^(axolotl|transformers|trl|peft|kernels|datasets|accelerate)==[^ ]*' requirements/axolotl.txt | paste -sd ' '), $$(du -sh build/axolotl | cut -f1)"
	@touch $@

# The torchao of the images, beside .venv.
build/qat/ready: recipes/kernels/torchao.toml
	@echo "qat: installing torchao into build/qat, 10 seconds"
	@mkdir -p build/qat
	@sed -n 's/^source = "\(.*\)"/\1 \\/p; s/^sha256 = "\(.*\)".*/  --hash=sha256:\1/p' $< >build/qat/torchao.txt
	@$(BIN)/pip install -q --disable-pip-version-check --upgrade --no-deps --require-hashes --target build/qat/packages \
	  -r build/qat/torchao.txt
	@touch $@

build/nvcc/ready: tests/gates/compiler.py requirements/images/toolchain-2.14.1-cu130.txt
	@echo "gates: installing CUDA's compiler from PyPI into build/nvcc, 150 MB"
	@PYTHONPATH=. $(BIN)/python tests/gates/compiler.py build/nvcc
	@touch $@
