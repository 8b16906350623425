# Two commands for a newcomer: `make demo` and `make test`. Each makes its own environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CKPT := tools/reference/fashion-ddim.ckpt
DEMO := demo

.PHONY: demo test check clean

# torch first and by itself: what comes after must find it installed, or it may fetch another build.
$(VENV)/ready: pyproject.toml
	@$(PYTHON) tools/prerequisites.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq torch==2.13.0
	$(BIN)/pip install -qq --editable '.[dev]'
	@touch $@

demo: $(VENV)/ready
	$(BIN)/accuquant-export $(CKPT) --bits 4/8 --out $(DEMO)/fashion-w4a8
	$(BIN)/accuquant-sample $(DEMO)/fashion-w4a8 -n 64 --seed 0 --out $(DEMO)/int.png
	$(BIN)/accuquant-sample $(DEMO)/fashion-w4a8 -n 64 --seed 0 --fp --out $(DEMO)/fp.png
	$(BIN)/accuquant-bench $(DEMO)/fashion-w4a8 --out $(DEMO)/bench.json
	@echo
	@echo "pictures  $(DEMO)/int.png (integer engine)  $(DEMO)/fp.png (full precision), same seeds"
	@echo "report    $(DEMO)/fashion-w4a8/report/index.html"

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build && ln -sfn .. build/accuquant
	MYPYPATH=build $(BIN)/mypy -p accuquant.calibrate -p accuquant.export -p accuquant.runtime
	$(BIN)/python tools/check_stubs.py

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
