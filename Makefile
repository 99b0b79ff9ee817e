# Two commands do everything on a machine with Python, a C++ compiler, CMake, npm and Go:
#   make demo    sets up, builds, runs the main job
#   make test    sets up, builds, runs every test
# The first run fetches and builds; later runs start in seconds. All of it stays in .venv and build.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= $(shell nproc)
# More arguments for the program behind a target, for instance: make demo ARGS="--json demo.json"
ARGS ?=

# Tools come from .venv, so that every machine formats, checks and builds with the pinned versions.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The prebuilt libllama to test with, each in a folder of its name. Most are of npm's @node-llama-cpp/linux-x64: the version
# there, and the digest that the registry publishes for it.
BUILDS := build/libllama
NPM_BUILDS := b8179 b8390 b9842 b10068 b10361 v0.4.0 v0.5.0
VERSION_b8179 := 3.17.1
SHA512_b8179 := fe8fd4a2a01db2583813174a63260fa9bc3edb50ebe1c436260a2e5e0f098b7a2944aa1332b95435faccc08b1865f6c30c9f25ef1167c1f188c1d950e513f026
VERSION_b8390 := 3.18.1
SHA512_b8390 := b5199672ccaf01ca891d01d71ec68e931ea6b866dc8ab03d9d174d807ea7edb8c6530e15ba8043ddd0a1c8d177fcab6dee8841f64cfe5e18726636c31e95f230
VERSION_b9842 := 3.19.0
SHA512_b9842 := 7059d78f2466149fa556ad10405a9f9460dd17952730fcc72c84388b65e0e79dba42958ec37202d003e2665b8abf2a970ad53e838e191f860f40d50aaac646e8
VERSION_b10068 := 3.19.1
SHA512_b10068 := 9ed9d5f062debae1b0a79792e5a0b1985d28a383a38c3a3a2d358918986e89e2c5e92c0c95f6eac42621df2a3595c7a978d7f6b821e75ccc9dc82567a8b58971
VERSION_b10361 := 3.20.0
SHA512_b10361 := cc24937799b8303acb5b3814bcebee186cc79bd0e210e359b7eb2b8076215783e9bbf4f94cbde410d8fb94763572641c70a3607a90018b26fd29c8a08d96ef49
VERSION_v0.4.0 := 3.21.1
SHA512_v0.4.0 := 4e8b63e914c3306a371682b6c8d51acffa069990f4a2502a4eb465b855169aed245b68bd4cecc7496d0e5820221a4cd10955f45ac5360b2510a3f5b6358b5d3c
VERSION_v0.5.0 := 3.22.1
SHA512_v0.5.0 := e6e0820cda9608d7da026f1a47f533c5ba381c1a4a80d17dd640873dea4a86032057638099ab6879f6ce94c8a1b2a0a21f639ddf913f7941d00856df44126e3a

# The newest is of PyPI's xllamacpp: one library with all of llama.cpp and ggml in it. It is an extension module, so that only
# a Python process can load it.
WHEEL_BUILD := 0.6.0-dev
WHEEL_VERSION := 2026.10.11549
WHEEL_SHA256 := c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261

# Which is for what. Python: the demo, the figures and the whole of the Python tests. Other: programs that are not Python, and
# the whole of the Python tests on libllama once more; yzma, which Go decodes with, fits this one. Bindings: what was made for
# one build of llama.cpp and no other: llama-cpp-python, whose structs are those of this build, and C programs that are
# compiled with the llama.h of its source distribution.
PYTHON_BUILD := $(WHEEL_BUILD)
OTHER_BUILD := b10361
BINDINGS_BUILD := b10068
PYTHON_LIB := $(BUILDS)/$(PYTHON_BUILD)
# Links to the folders of these two builds, so that examples need not know which they are.
OTHER_LIB := build/llama
BINDINGS_LIB := build/llama-bindings

# Stamp files: each says that its step is done for the pins above.
VENV := .venv/.created
TOOLS := .venv/.tools
stamp_of = $(BUILDS)/$(1)/.$(1)
PYTHON_LLAMA := $(call stamp_of,$(PYTHON_BUILD))
OTHER_LLAMA := $(OTHER_LIB)/.$(OTHER_BUILD)
BINDINGS_LLAMA := $(BINDINGS_LIB)/.$(BINDINGS_BUILD)
BINDINGS_HEADERS := $(BINDINGS_LIB)/include/llama.h
BINDINGS := .venv/.llama-$(BINDINGS_BUILD)
PACKAGE := .venv/.kvferry
# A server that speaks S3, for the tests and figures of the store's remote tier. Without Go the tests that need it are skipped.
VERSITYGW_VERSION := v1.8.0
ifneq ($(shell command -v go),)
S3_SERVER := build/tools/.versitygw-$(VERSITYGW_VERSION)
endif

.PHONY: help
help:
	@echo "make demo      save, load and decode beside each other on a real libllama; prints a table, draws a timeline"
	@echo "make test      all tests: test-c, test-asan, test-tsan, test-go, test-python, test-builds-quick, test-install,"
	@echo "               test-examples"
	@echo "make test-builds  all tests that use libllama, on each of $(words $(TESTED_BUILDS)) builds; make builds-table: what is seen there"
	@echo "make test-gpu  the CUDA tests and the Python tests on a real GPU"
	@echo "make soak      random operations beside transfers, and damaged blocks, against llama.cpp; as long as ARGS says"
	@echo "make soak-disk killed writers and mutated files in the store's folder, mutated objects, the store's budgets"
	@echo "make sanitize  the C tests under ASan with UBSan, and under TSan"
	@echo "make go-kvcache  what the Go program needs; then: cd examples/go && go run ./cmd/kvcache"
	@echo "make bench     the figures that the documentation quotes"
	@echo "make bench-prompt-cache  the cache for llama-cpp-python beside its own"
	@echo "make bench-store-find  a search in a store of a million blocks; make bench-store-disk: reads of its files"
	@echo "make docs      the documentation as a site: build/docs/index.html"
	@echo "make lint      formatting, linters, types, prose: checks only"
	@echo "make format    formats all sources"
	@echo "make tidy      clang-tidy (slow): make lint runs it on what has changed since the last commit,"
	@echo "               or since TIDY_SINCE"
	@echo "make dist      the files of a release, checked, in dist/"
	@echo "make setup     only the set-up: .venv, libllama, llama-cpp-python"
	@echo "make clean     removes what was built; make distclean also what was fetched"
	@echo "ARGS=...       more arguments for the program behind a target: make test-python ARGS='-k cancel'"

# ---- Set-up ----------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(TOOLS) $(PYTHON_LLAMA) $(OTHER_LLAMA) $(BINDINGS) $(S3_SERVER)

$(VENV):
	@for tool in $(PYTHON) c++ npm; do \
	    command -v $$tool >/dev/null || { echo "kvferry's set-up needs $$tool, which is not installed"; exit 1; }; \
	done
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "kvferry builds on Linux x86_64 only, for now"; exit 1; }
	$(PYTHON) -m venv .venv
	python -m pip install --quiet pip==26.3
	touch $@

$(TOOLS): requirements-dev.txt $(VENV)
	python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(foreach build,$(NPM_BUILDS),$(call stamp_of,$(build))): build = $(@F:.%=%)
$(foreach build,$(NPM_BUILDS),$(call stamp_of,$(build))): package = $(@D)/node-llama-cpp-linux-x64-$(VERSION_$(build)).tgz
$(foreach build,$(NPM_BUILDS),$(call stamp_of,$(build))):
	rm -rf $(@D) && mkdir -p $(@D)
	npm pack @node-llama-cpp/linux-x64@$(VERSION_$(build)) --silent --pack-destination $(@D) >/dev/null
	echo "$(SHA512_$(build))  $(package)" | sha512sum --check --quiet
	tar -xzf $(package) -C $(@D) --strip-components=3 --wildcards 'package/bins/linux-x64/*.so'
	rm $(package)
	ln -s libllama.$(build).so $(@D)/libllama.so
	ln -s libggml.$(build).so $(@D)/libggml.so
	touch $@

# The links are names under which programs look for libllama and its parts.
$(call stamp_of,$(WHEEL_BUILD)): | $(VENV)
	rm -rf $(@D) && mkdir -p $(@D)
	python -m pip download --quiet --no-deps --only-binary :all: --dest $(@D) xllamacpp==$(WHEEL_VERSION)
	echo "$(WHEEL_SHA256)  $$(echo $(@D)/*.whl)" | sha256sum --check --quiet
	python -m zipfile --extract $(@D)/*.whl $(@D)/wheel
	mv $(@D)/wheel/xllamacpp/xllamacpp.abi3.so $(@D)
	rm -r $(@D)/wheel $(@D)/*.whl
	for name in libllama libggml libggml-base; do \
	    ln -s xllamacpp.abi3.so $(@D)/$$name.so; \
	    ln -s xllamacpp.abi3.so $(@D)/$$name.so.0; \
	done
	touch $@

$(OTHER_LLAMA): $(call stamp_of,$(OTHER_BUILD))
$(BINDINGS_LLAMA): $(call stamp_of,$(BINDINGS_BUILD))
$(OTHER_LLAMA) $(BINDINGS_LLAMA):
	rm -rf $(@D) && ln -s $(BUILDS:build/%=%)/$(@F:.%=%) $(@D)

# Only the headers; the whole distribution is large.
$(BINDINGS_HEADERS): $(TOOLS) $(BINDINGS_LLAMA)
	rm -rf $(@D) $(BINDINGS_LIB)/sdist && mkdir -p $(@D)
	python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest $(BINDINGS_LIB)/sdist \
	    "$$(sed -n 's/^\(llama-cpp-python==[^ ]*\).*/\1/p' requirements-dev.txt)"
	tar -xzf $(BINDINGS_LIB)/sdist/*.tar.gz -C $(@D) --transform 's|.*/||' \
	    --wildcards '*/vendor/llama.cpp/ggml/include/*.h' '*/vendor/llama.cpp/include/llama.h'
	rm -r $(BINDINGS_LIB)/sdist
	touch $@

# Links, not copies: whichever folder a program loads libllama from, the process then holds it once.
$(BINDINGS): $(TOOLS) $(BINDINGS_LLAMA)
	lib=$$(python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("llama_cpp").origin))')/lib; \
	mkdir -p "$$lib" && rm -f "$$lib"/*.so && ln -s $(CURDIR)/$(BINDINGS_LIB)/*.so "$$lib"
	python -c 'import llama_cpp'
	touch $@

# The name of its file carries no version; the stamp does.
build/tools/.versitygw-$(VERSITYGW_VERSION):
	mkdir -p $(@D) && rm -f $(@D)/.versitygw-*
	GOBIN=$(CURDIR)/$(@D) go install github.com/versity/versitygw/cmd/versitygw@$(VERSITYGW_VERSION)
	touch $@

# ---- The package in .venv --------------------------------------------------------------------------------------------

ifneq ($(shell command -v ccache),)
export CMAKE_C_COMPILER_LAUNCHER ?= ccache
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif

PACKAGE_SOURCES := $(shell find CMakeLists.txt pyproject.toml README.md LICENSE include cabi pyshim \
    -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: install
install: $(PACKAGE)

$(PACKAGE): $(TOOLS) $(PACKAGE_SOURCES)
	python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
	    --config-settings=build-dir=build/python .
	touch $@

# ---- The files of a release ------------------------------------------------------------------------------------------

# The oldest systems that the wheel has to run on (CMakeLists.txt says how). auditwheel refuses a wheel that does not, and
# otherwise only renames it; it may find that the wheel runs on older ones yet.
PLATFORM := manylinux_2_28_x86_64
DIST := dist/.checked

.PHONY: dist
dist: $(DIST)

# The wheel is built from the source distribution, which so shows that it is complete.
$(DIST): $(TOOLS) $(PACKAGE_SOURCES)
	rm -rf dist
	python -m build --no-isolation --sdist --outdir dist >/dev/null
	python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist/built dist/kvferry-*.tar.gz
	auditwheel repair --plat $(PLATFORM) --wheel-dir dist dist/built/kvferry-*.whl
	rm -r dist/built
	python -m twine check --strict dist/kvferry-*
	touch $@

# ---- Demo and figures ------------------------------------------------------------------------------------------------

# For whoever names no libllama.
demo bench bench-store-find test-examples test-python test-gpu soak soak-disk: export KVFERRY_LLAMA_LIB ?= $(CURDIR)/$(PYTHON_LIB)
test-go: export KVFERRY_LLAMA_LIB ?= $(CURDIR)/$(OTHER_LIB)

.PHONY: demo
demo: $(PACKAGE) $(PYTHON_LLAMA)
	kvferry demo $(ARGS)

.PHONY: bench
bench: $(PACKAGE) $(PYTHON_LLAMA)
	python bench/run.py $(ARGS)

# tests/python has the model with a tokenizer.
.PHONY: bench-prompt-cache
bench-prompt-cache: $(PACKAGE) $(BINDINGS)
	PYTHONPATH=tests/python python bench/prompt_cache.py $(ARGS)

.PHONY: bench-scheduling
bench-scheduling: build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target kvferry cuda_simulated
	python bench/scheduling.py $(ARGS)

.PHONY: bench-store-remote
bench-store-remote: $(PACKAGE) $(S3_SERVER)
	python bench/store_remote.py $(ARGS)

# tests/python has the model and its context.
.PHONY: bench-store-find
bench-store-find: $(PACKAGE) $(PYTHON_LLAMA)
	PYTHONPATH=tests/python python bench/store_find.py $(ARGS)

.PHONY: bench-store-disk
bench-store-disk: $(PACKAGE)
	python bench/store_disk.py $(ARGS)

# ---- Tests -----------------------------------------------------------------------------------------------------------

.PHONY: test
test: test-c test-asan test-tsan test-go test-python test-builds-quick test-install test-examples

.PHONY: sanitize
sanitize: test-asan test-tsan

build/native/build.ninja: CONFIGURE := -DCMAKE_BUILD_TYPE=RelWithDebInfo
build/asan/build.ninja: CONFIGURE := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVFERRY_SANITIZE=address,undefined
build/tsan/build.ninja: CONFIGURE := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVFERRY_SANITIZE=thread

# Configured once; from then on ninja itself notices what changed, CMakeLists.txt included.
build/%/build.ninja: | $(TOOLS)
	cmake -S . -B build/$* -G Ninja -DKVFERRY_BUILD_TESTS=ON $(CONFIGURE)

# TSan needs the address layout of its time; kernels that randomise more of it make its programs stop at their start.
FIXED_LAYOUT := $(shell setarch --addr-no-randomize true 2>/dev/null && echo setarch --addr-no-randomize)

export ASAN_OPTIONS ?= detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS ?= halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS ?= halt_on_error=1:second_deadlock_stack=1

# Two at a time: the tests run threads of their own, and some race them on purpose.
CTEST := ctest --output-on-failure --no-tests=error --parallel 2

# What the tests of an installed tree build examples/c with.
EXAMPLE_MODEL := build/models/small.gguf
test-c test-install: export KVFERRY_LLAMA_DEV ?= $(CURDIR)/$(BINDINGS_LIB)
test-c test-install: export KVFERRY_LLAMA_MODEL ?= $(CURDIR)/$(EXAMPLE_MODEL)

$(EXAMPLE_MODEL): $(wildcard pyshim/kvferry/tools/synthetic/*.py) | $(TOOLS)
	mkdir -p $(@D)
	PYTHONPATH=pyshim/kvferry/tools python -c 'from synthetic import write_model; write_model("llama", "$@")'

.PHONY: test-c
test-c: build/native/build.ninja $(BINDINGS_HEADERS) $(EXAMPLE_MODEL)
	cmake --build build/native --parallel $(JOBS)
	$(CTEST) --test-dir build/native $(ARGS)

.PHONY: test-asan
test-asan: build/asan/build.ninja
	cmake --build build/asan --parallel $(JOBS)
	$(CTEST) --test-dir build/asan $(ARGS)

.PHONY: test-tsan
test-tsan: build/tsan/build.ninja
	cmake --build build/tsan --parallel $(JOBS)
	$(FIXED_LAYOUT) $(CTEST) --test-dir build/tsan $(ARGS)

# The package by pip, as a newcomer installs it, and the programs of examples/ from there. (By CMake: test-c.) And the files
# of a release, on every Python that they are for.
.PHONY: test-install
test-install: $(TOOLS) $(BINDINGS_HEADERS) $(EXAMPLE_MODEL) $(DIST)
	tests/install/by_pip.sh $(CURDIR) $(PYTHON) cmake $(CC) dist/kvferry-*.whl
	tests/install/release.sh dist $(CURDIR) $(PYTHON)

# The programs of examples/ from the source tree. (Those in Go: test-go.)
.PHONY: test-examples
test-examples: export LLAMA_CPP_LIB_PATH = $(KVFERRY_LLAMA_LIB)
test-examples: $(PACKAGE) $(BINDINGS_HEADERS) $(PYTHON_LLAMA)
	$(MAKE) -C examples/c run
	python -m pytest tests/python/test_examples.py

SIMULATED_CUDA := $(CURDIR)/build/native/tests/simulated_cuda/libcuda_simulated.so

# Three processes, because one opens the CUDA driver once, and holds one libllama: what runs on the simulated driver; what
# llama-cpp-python's own class is needed for, on the libllama that it fits; and the rest, which uses the bindings' functions
# alone, on the newer one.
LLAMA_TESTS_ON_CUDA := $(addprefix tests/python/llama/,test_llama_in_flight.py test_llama_random.py test_llama_blocks_in_flight.py)
PYTHON_TESTS_ON_CUDA := tests/python/cuda $(LLAMA_TESTS_ON_CUDA)

BINDINGS_TESTS := $(addprefix tests/python/,llama/test_llama_cpp_python.py llama/test_prompt_cache.py \
    llama/test_prompt_cache_server.py store/test_store_llama_cpp_python.py \
    store/test_store_warm_llama_cpp_python.py)

define run_python_tests
export LLAMA_CPP_LIB_PATH="$$KVFERRY_LLAMA_LIB"; python -m pytest $(PYTHON_TESTS_ON_CUDA)
python -m pytest $(BINDINGS_TESTS)
export LLAMA_CPP_LIB_PATH="$$KVFERRY_LLAMA_LIB"; \
    python -m pytest tests/python $(addprefix --ignore ,$(BINDINGS_TESTS) $(PYTHON_TESTS_ON_CUDA)) $(ARGS)
endef

.PHONY: test-python
test-python: export KVFERRY_SIMULATED_CUDA := $(SIMULATED_CUDA)
test-python: $(PACKAGE) $(BINDINGS) $(PYTHON_LLAMA) $(S3_SERVER) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	$(run_python_tests)

# ---- Every libllama

TESTED_BUILDS := $(NPM_BUILDS) $(WHEEL_BUILD)
TESTED_STAMPS := $(foreach build,$(TESTED_BUILDS),$(call stamp_of,$(build)))
# What uses a libllama and fits any of them.
LLAMA_TESTS := $(filter-out $(LLAMA_TESTS_ON_CUDA) $(BINDINGS_TESTS),$(wildcard tests/python/llama/test_*.py)) \
    $(addprefix tests/python/,test_snapshot.py $(addprefix tools/,test_cli.py test_config.py test_demo.py test_doctor.py \
    test_libllama.py test_synthetic_models.py))
QUICK_LLAMA_TESTS := $(addprefix tests/python/,tools/test_libllama.py llama/test_llama_basic.py \
    llama/test_llama_kinds.py llama/test_llama_block_damage.py)

# $(call on_builds,BUILD...,TEST...)
define on_builds
@failed=; \
for build in $(1); do \
    echo "-- llama.cpp $$build"; \
    export KVFERRY_LLAMA_LIB=$(CURDIR)/$(BUILDS)/$$build LLAMA_CPP_LIB_PATH=$(CURDIR)/$(BUILDS)/$$build; \
    python -m pytest --quiet $(2) $(ARGS) || failed+=" $$build"; \
done; \
test -z "$$failed" || { echo "failed on:$$failed"; exit 1; }
endef
BUILDS_TABLE = python tests/python/builds_table.py $(TESTED_BUILDS:%=$(BUILDS)/%)

.PHONY: test-builds
test-builds: export KVFERRY_SIMULATED_CUDA := $(SIMULATED_CUDA)
test-builds: $(PACKAGE) $(TESTED_STAMPS) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	$(call on_builds,$(TESTED_BUILDS),$(LLAMA_TESTS))
	$(call on_builds,$(TESTED_BUILDS),$(LLAMA_TESTS_ON_CUDA))
	$(BUILDS_TABLE) --check

# The whole on one build, and once more on another with test-python; a part of it on the others.
.PHONY: test-builds-quick
test-builds-quick: export KVFERRY_SIMULATED_CUDA := $(SIMULATED_CUDA)
test-builds-quick: $(PACKAGE) $(TESTED_STAMPS) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	$(call on_builds,$(filter-out $(PYTHON_BUILD) $(OTHER_BUILD),$(TESTED_BUILDS)),$(QUICK_LLAMA_TESTS))
	$(call on_builds,$(OTHER_BUILD),$(LLAMA_TESTS))
	$(call on_builds,$(OTHER_BUILD),$(LLAMA_TESTS_ON_CUDA))
	$(BUILDS_TABLE) --check

# Into docs/builds.md.
.PHONY: builds-table
builds-table: $(PACKAGE) $(TESTED_STAMPS)
	$(BUILDS_TABLE) --write

# What test-python does with fixed seeds for some seconds, for as long as wanted: ARGS="--hours 2", ARGS="--steps 10000".
.PHONY: soak
soak: export KVFERRY_SIMULATED_CUDA := $(SIMULATED_CUDA)
soak: $(PACKAGE) $(BINDINGS) $(PYTHON_LLAMA) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	LLAMA_CPP_LIB_PATH="$$KVFERRY_LLAMA_LIB" python tests/python/soak.py $(ARGS)

# The store: writers that are killed 1,000 times; 100,000 mutated files, and as many objects; restores while a folder's files
# are changed; and budgets at 100,000 random operations.
.PHONY: soak-disk
soak-disk: export PYTHONPATH = tests/python
soak-disk: $(PACKAGE) $(PYTHON_LLAMA)
	python tests/python/store/disk_killed.py 1000
	python tests/python/store/disk_hostile.py 100000
	python tests/python/store/remote_hostile.py 100000
	python tests/python/store/store_hostile.py 10000
	python tests/python/store/store_budgets.py 100000

# Only a libllama built for CUDA (KVFERRY_LLAMA_LIB is its folder) has its caches in the memory of the GPU. What its build cannot
# do is known by its name, such as KVFERRY_LLAMA_BUILD=b10361.
.PHONY: test-gpu
test-gpu: export KVFERRY_TEST_GPU := 1
test-gpu: $(PACKAGE) $(BINDINGS) $(PYTHON_LLAMA) $(S3_SERVER) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS)
	$(CTEST) --test-dir build/native --label-regex cuda --parallel 1
	$(run_python_tests)

# The Go examples link a library of their own build, so that they are as fast as an installed one, and find it without
# any setting: examples/go/kvferry/kvferry-go.pc says how. After this, `cd examples/go && go run ./cmd/kvcache` works.
GO_LIBRARY := examples/go/kvferry/kvferry.pc
GO_MODEL := build/models/kvcache.gguf
# Their caches need checkpoints: the Go tests of blocks use them.
GO_TEST_MODELS := $(patsubst %,build/models/go-%.gguf,gemma3 hybrid mamba)

.PHONY: go-kvcache
go-kvcache: $(GO_LIBRARY) $(GO_MODEL) $(GO_TEST_MODELS) $(OTHER_LLAMA)
	@echo 'now: cd examples/go && go run ./cmd/kvcache'

$(GO_LIBRARY): $(TOOLS) $(shell find CMakeLists.txt include cabi -type f)
	cmake -S . -B build/go -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_INSTALL_LIBDIR=lib
	cmake --build build/go --parallel $(JOBS)
	cmake --install build/go --prefix build/go/prefix
	sed -e 's|^prefix=.*|prefix=$(CURDIR)/build/go/prefix|' -e 's|^Libs:|Libs: -Wl,-rpath,$${libdir}|' \
	    build/go/prefix/lib/pkgconfig/kvferry.pc > $@
	@# Go caches what it has compiled and looks neither at pkg-config's answer nor at headers outside of the package: a
	@# header inside, that nobody includes, tells it when they have changed.
	for package in kvferry kvferry/internal/baseline; do \
	    (echo "// $(CURDIR)"; sha256sum build/go/prefix/include/kvferry.h | sed 's|^|// |') > examples/go/$$package/tree.hxx; \
	done

$(GO_MODEL): $(wildcard pyshim/kvferry/tools/synthetic/*.py) | $(TOOLS)
	mkdir -p $(@D)
	PYTHONPATH=pyshim/kvferry/tools python -c 'from synthetic import write_model; write_model("llama", "$@", \
	    layers=12, embedding=512, heads=8, kv_heads=4, head_dim=64, feed_forward=1024, context=8192)'

build/models/go-%.gguf: $(wildcard pyshim/kvferry/tools/synthetic/*.py) | $(TOOLS)
	mkdir -p $(@D)
	PYTHONPATH=pyshim/kvferry/tools python -c 'from synthetic import write_model; write_model("$*", "$@")'

# Go's race detector watches the C code's callers, GOGC=1 collects whatever is not held, checkptr checks unsafe pointers.
.PHONY: test-go
ifeq ($(shell command -v go),)
test-go:
	@echo "Go tests skipped: no Go installed"
else
test-go: export KVFERRY_SIMULATED_CUDA := $(SIMULATED_CUDA)
test-go: go-kvcache build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	cd examples/go && go vet ./... && go test ./...
	cd examples/go/kvferry && go vet ./... && go test ./... && go test -race ./... && \
	    GOGC=1 go test -count=1 ./... && go test -gcflags=all=-d=checkptr ./...
	cd examples/go && GOGC=1 go test -race -run Sequences ./...
endif

# ---- Documentation ---------------------------------------------------------------------------------------------------

SITE_TOOLS := .venv/.site

$(SITE_TOOLS): requirements-docs.txt $(TOOLS)
	python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

# Strict: a broken link, a missing page or a missing snippet is an error.
.PHONY: docs
docs: $(SITE_TOOLS)
	python tools/check_pages.py
	python tools/draw.py --check
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
	@echo "the documentation: build/docs/index.html"

# ---- Formatting, linters, types --------------------------------------------------------------------------------------

C_SOURCES := $(shell find include cabi tests bench examples \
    -name '*.[ch]' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' 2>/dev/null)
GO_SOURCES := $(shell find examples/go tests/install -name '*.go' 2>/dev/null)
STATICCHECK_VERSION := v0.8.2
STATICCHECK := .venv/.staticcheck-$(STATICCHECK_VERSION)

MARKDOWN := $(shell git ls-files '*.md' 2>/dev/null)

.PHONY: lint
lint: lint-python lint-c lint-go lint-prose

.PHONY: lint-python
lint-python: $(TOOLS)
	ruff format --check
	ruff check
	$(if $(wildcard pyshim/kvferry/*.py),mypy)

# All files take about a quarter of an hour of one core. So only those that have changed are read again, a few seconds each.
TIDY_SINCE ?= HEAD
TIDY_CHANGED = $(filter %.c %.cpp,$(sort $(shell git diff --name-only --diff-filter=d $(TIDY_SINCE) -- cabi tests 2>/dev/null; \
    git ls-files --others --exclude-standard cabi tests 2>/dev/null)))

.PHONY: lint-c
lint-c: $(TOOLS) $(if $(TIDY_CHANGED),build/native/build.ninja)
	$(if $(C_SOURCES),clang-format --dry-run -Werror $(C_SOURCES))
	python tools/header_table.py --check
	$(if $(TIDY_CHANGED),run-clang-tidy.py -quiet -p build/native -j $(JOBS) $(TIDY_CHANGED:%=/%$$))

.PHONY: lint-go
ifneq ($(and $(GO_SOURCES),$(shell command -v go)),)
lint-go: $(GO_LIBRARY) $(STATICCHECK)
	unformatted=$$(gofmt -l $(GO_SOURCES)); test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }
	for module in examples/go examples/go/kvferry; do (cd $$module && go vet ./... && staticcheck ./...) || exit 1; done
endif

# Staticcheck refuses code that wants a newer Go than the one that has built it. So it is built by the Go that builds
# examples/go, which an older `go` fetches.
$(STATICCHECK): examples/go/go.mod $(VENV)
	rm -f .venv/.staticcheck-*
	cd examples/go && GOTOOLCHAIN=$$(go env GOVERSION) GOBIN=$(CURDIR)/.venv/bin \
	    go install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION)
	touch $@

# Plain words, as tools/prose.toml has them; and Markdown's lines of one width.
.PHONY: lint-prose
lint-prose: $(TOOLS)
	python tools/prose.py
	$(if $(MARKDOWN),mdformat --check $(MARKDOWN))

.PHONY: format
format: $(TOOLS)
	ruff format
	ruff check --fix
	$(if $(MARKDOWN),mdformat $(MARKDOWN))
	$(if $(C_SOURCES),clang-format -i $(C_SOURCES))
ifneq ($(and $(GO_SOURCES),$(shell command -v gofmt)),)
	gofmt -w $(GO_SOURCES)
endif

.PHONY: tidy
tidy: build/native/build.ninja
	run-clang-tidy.py -quiet -p build/native -j $(JOBS) '/(cabi|tests)/'

# ---- Clean -----------------------------------------------------------------------------------------------------------

.PHONY: clean
clean:
	rm -rf build/native build/asan build/tsan build/python build/docs dist $(PACKAGE)

.PHONY: distclean
distclean:
	rm -rf build dist .venv
