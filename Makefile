# Everything here makes what it needs: a virtual environment in .venv with the package built from this tree.
# Needs Python >= 3.11 with venv, a C++20 compiler and a package index.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# onnxruntime and onnxruntime-gpu overwrite each other: exactly one of them is installed.
EXTRA  ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
# Test files at a time (0: all in one process, for --pdb). What compares times closely runs alone, after the others.
JOBS   ?= 2
NATIVE := CMakeLists.txt pyproject.toml $(wildcard allocators/*.cpp allocators/*.hpp)

.PHONY: demo test soak check bench clean

demo: $(VENV)/.installed   ## four models of one trunk, together on one pool, beside plain ONNX Runtime
	$(BIN)/glake-infer demo

test: $(VENV)/.installed   ## what CI runs
	$(BIN)/python -m pytest -m "not soak and not gpu and not clock" -n $(JOBS) --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -m "clock and not soak and not gpu" $(ARGS) || [ $$? -eq 5 ] # 5: none is among ARGS

soak: $(VENV)/.installed   ## what takes longer than CI should
	$(BIN)/python -m pytest -m "soak and not gpu" $(ARGS)

bench: $(VENV)/.installed  ## every benchmark, with its twins, as JSON lines
	$(BIN)/python -m benchmarks $(ARGS)

check: $(VENV)/.checked    ## ruff, mypy, clang-format, compiler warnings as errors
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"glake-infer needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRA),test,tensorrt-rtx]' || { \
	  echo 'without TensorRT-RTX, which this index does not have for this machine: its tests are skipped'; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRA),test]'; }
	@touch $@

$(VENV)/.checked: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"])') \
	  nanobind nvidia-cuda-runtime scikit-build-core cmake ninja
	@touch $@

clean:
	rm -rf $(VENV) build dist
