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

# The prebuilt libllama to test with, and the digest that its registry publishes for it. yzma, which Go decodes with, fits it.
LLAMA_LIB := build/llama
LLAMA_BUILD := b10361
LLAMA_VERSION := 3.20.0
LLAMA_SHA512 := cc24937799b8303acb5b3814bcebee186cc79bd0e210e359b7eb2b8076215783e9bbf4f94cbde410d8fb94763572641c70a3607a90018b26fd29c8a08d96ef49

# An earlier one, for what was made for one build of llama.cpp and no other: llama-cpp-python, whose structs are those of
# this build, and C programs that are compiled with the llama.h of its source distribution.
BINDINGS_LIB := build/llama-bindings
BINDINGS_BUILD := b10068
BINDINGS_VERSION := 3.19.1
BINDINGS_SHA512 := 9ed9d5f062debae1b0a79792e5a0b1985d28a383a38c3a3a2d358918986e89e2c5e92c0c95f6eac42621df2a3595c7a978d7f6b821e75ccc9dc82567a8b58971

# Stamp files: each says that its step is done for the pins above.
VENV := .venv/.created
TOOLS := .venv/.tools
LLAMA := $(LLAMA_LIB)/.$(LLAMA_BUILD)
BINDINGS_LLAMA := $(BINDINGS_LIB)/.$(BINDINGS_BUILD)
BINDINGS_HEADERS := $(BINDINGS_LIB)/include/llama.h
BINDINGS := .venv/.llama-$(BINDINGS_BUILD)
PACKAGE := .venv/.kvferry

.PHONY: help
help:
	@echo "make demo      save, load and decode beside each other on a real libllama; prints a table, draws a timeline"
	@echo "make test      all tests: test-c, test-asan, test-tsan, test-go, test-python, test-install, test-examples"
	@echo "make test-gpu  the CUDA tests and the Python tests on a real GPU"
	@echo "make sanitize  the C tests under ASan with UBSan, and under TSan"
	@echo "make go-kvcache  what the Go program needs; then: cd examples/go && go run ./cmd/kvcache"
	@echo "make bench     the figures that the documentation quotes"
	@echo "make lint      formatting, linters, types: checks only"
	@echo "make format    formats all sources"
	@echo "make tidy      clang-tidy (slow)"
	@echo "make setup     only the set-up: .venv, libllama, llama-cpp-python"
	@echo "make clean     removes what was built; make distclean also what was fetched"
	@echo "ARGS=...       more arguments for the program behind a target: make test-python ARGS='-k cancel'"

# ---- Set-up ----------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(TOOLS) $(LLAMA) $(BINDINGS)

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

# $(call fetch_llama,FOLDER,BUILD,VERSION,SHA512)
define fetch_llama
rm -rf $(1) && mkdir -p $(1)
npm pack @node-llama-cpp/linux-x64@$(3) --silent --pack-destination $(1) >/dev/null
echo "$(4)  $(1)/node-llama-cpp-linux-x64-$(3).tgz" | sha512sum --check --quiet
tar -xzf $(1)/node-llama-cpp-linux-x64-$(3).tgz -C $(1) --strip-components=3 --wildcards 'package/bins/linux-x64/*.so'
rm $(1)/node-llama-cpp-linux-x64-$(3).tgz
ln -s libllama.$(2).so $(1)/libllama.so
ln -s libggml.$(2).so $(1)/libggml.so
touch $@
endef

$(LLAMA):
	$(call fetch_llama,$(LLAMA_LIB),$(LLAMA_BUILD),$(LLAMA_VERSION),$(LLAMA_SHA512))

$(BINDINGS_LLAMA):
	$(call fetch_llama,$(BINDINGS_LIB),$(BINDINGS_BUILD),$(BINDINGS_VERSION),$(BINDINGS_SHA512))

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

# ---- Demo and figures ------------------------------------------------------------------------------------------------

# Whoever names no libllama gets the newer of the two.
demo bench test-c test-asan test-tsan test-go test-python test-gpu: export KVFERRY_LLAMA_LIB ?= $(CURDIR)/$(LLAMA_LIB)

.PHONY: demo
demo: $(PACKAGE) $(BINDINGS)
	kvferry demo $(ARGS)

.PHONY: bench
bench: $(PACKAGE) $(BINDINGS)
	python bench/run.py $(ARGS)

.PHONY: bench-scheduling
bench-scheduling: build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target kvferry cuda_simulated
	python bench/scheduling.py $(ARGS)

# ---- Tests -----------------------------------------------------------------------------------------------------------

.PHONY: test
test: test-c test-asan test-tsan test-go test-python test-install test-examples

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

$(EXAMPLE_MODEL): pyshim/kvferry/synthetic.py | $(TOOLS)
	mkdir -p $(@D)
	PYTHONPATH=pyshim/kvferry python -c 'from synthetic import write_model; write_model("llama", "$@")'

.PHONY: test-c
test-c: build/native/build.ninja $(LLAMA) $(BINDINGS_HEADERS) $(EXAMPLE_MODEL)
	cmake --build build/native --parallel $(JOBS)
	$(CTEST) --test-dir build/native $(ARGS)

.PHONY: test-asan
test-asan: build/asan/build.ninja $(LLAMA)
	cmake --build build/asan --parallel $(JOBS)
	$(CTEST) --test-dir build/asan $(ARGS)

.PHONY: test-tsan
test-tsan: build/tsan/build.ninja $(LLAMA)
	cmake --build build/tsan --parallel $(JOBS)
	$(FIXED_LAYOUT) $(CTEST) --test-dir build/tsan $(ARGS)

# The package by pip, as a newcomer installs it, and the programs of examples/ from there. (By CMake: test-c.)
.PHONY: test-install
test-install: $(TOOLS) $(BINDINGS_HEADERS) $(EXAMPLE_MODEL)
	tests/install/by_pip.sh $(CURDIR) $(PYTHON) cmake $(CC)

.PHONY: test-examples
test-examples: $(TOOLS) $(BINDINGS_HEADERS)
	$(MAKE) -C examples/c run

# Three processes, because one opens the CUDA driver once, and holds one libllama: what runs on the simulated driver; what
# llama-cpp-python's own class is needed for, on the libllama that it fits; and the rest, which uses the bindings' functions
# alone, on the newer one.
define run_python_tests
export LLAMA_CPP_LIB_PATH="$$KVFERRY_LLAMA_LIB"; python -m pytest tests/python/test_cuda.py
python -m pytest tests/python/test_llama_cpp_python.py
export LLAMA_CPP_LIB_PATH="$$KVFERRY_LLAMA_LIB"; \
    python -m pytest tests/python --ignore tests/python/test_cuda.py --ignore tests/python/test_llama_cpp_python.py $(ARGS)
endef

.PHONY: test-python
test-python: export KVFERRY_SIMULATED_CUDA := $(CURDIR)/build/native/tests/simulated_cuda/libcuda_simulated.so
test-python: $(PACKAGE) $(BINDINGS) $(LLAMA) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	$(run_python_tests)

# Only a libllama built for CUDA (KVFERRY_LLAMA_LIB is its folder) has its caches in the memory of the GPU.
.PHONY: test-gpu
test-gpu: export KVFERRY_TEST_GPU := 1
test-gpu: $(PACKAGE) $(BINDINGS) $(LLAMA) build/native/build.ninja
	cmake --build build/native --parallel $(JOBS)
	$(CTEST) --test-dir build/native --label-regex cuda --parallel 1
	$(run_python_tests)

# The Go examples link a library of their own build, so that they are as fast as an installed one, and find it without
# any setting: examples/go/kvferry/kvferry-go.pc says how. After this, `cd examples/go && go run ./cmd/kvcache` works.
GO_LIBRARY := examples/go/kvferry/kvferry.pc
GO_MODEL := build/models/kvcache.gguf

.PHONY: go-kvcache
go-kvcache: $(GO_LIBRARY) $(GO_MODEL) $(LLAMA)
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

$(GO_MODEL): pyshim/kvferry/synthetic.py | $(TOOLS)
	mkdir -p $(@D)
	PYTHONPATH=pyshim/kvferry python -c 'from synthetic import write_model; write_model("llama", "$@", \
	    layers=12, embedding=512, heads=8, kv_heads=4, head_dim=64, feed_forward=1024, context=8192)'

# Go's race detector watches the C code's callers, GOGC=1 collects whatever is not held, checkptr checks unsafe pointers.
.PHONY: test-go
ifeq ($(shell command -v go),)
test-go:
	@echo "Go tests skipped: no Go installed"
else
test-go: export KVFERRY_SIMULATED_CUDA := $(CURDIR)/build/native/tests/simulated_cuda/libcuda_simulated.so
test-go: go-kvcache build/native/build.ninja
	cmake --build build/native --parallel $(JOBS) --target cuda_simulated
	cd examples/go && go vet ./... && go test ./...
	cd examples/go/kvferry && go vet ./... && go test ./... && go test -race ./... && \
	    GOGC=1 go test -count=1 ./... && go test -gcflags=all=-d=checkptr ./...
	cd examples/go && GOGC=1 go test -race -run Sequences ./...
endif

# ---- Formatting, linters, types --------------------------------------------------------------------------------------

C_SOURCES := $(shell find include cabi tests bench examples \
    -name '*.[ch]' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' 2>/dev/null)
GO_SOURCES := $(shell find examples/go tests/install -name '*.go' 2>/dev/null)

.PHONY: lint
lint: lint-python lint-c lint-go

.PHONY: lint-python
lint-python: $(TOOLS)
	ruff format --check
	ruff check
	$(if $(wildcard pyshim/kvferry/*.py),mypy)

.PHONY: lint-c
lint-c: $(TOOLS)
	$(if $(C_SOURCES),clang-format --dry-run -Werror $(C_SOURCES))

.PHONY: lint-go
ifneq ($(and $(GO_SOURCES),$(shell command -v go)),)
lint-go: $(GO_LIBRARY)
	unformatted=$$(gofmt -l $(GO_SOURCES)); test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }
	cd examples/go && go vet ./... && cd kvferry && go vet ./...
endif

.PHONY: format
format: $(TOOLS)
	ruff format
	ruff check --fix
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
	rm -rf build/native build/asan build/tsan build/python dist $(PACKAGE)

.PHONY: distclean
distclean:
	rm -rf build dist .venv
