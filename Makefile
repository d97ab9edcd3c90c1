# Each target sets itself up: `make install` makes .venv once, and again when pyproject.toml changes.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: help install quickstart test test-long test-oldest docs wheel bench gpu-dry-run engines lint easy-vqa
help:
	@echo "make quickstart   install, train the embedded model on sample pictures, compare, caption (4 minutes and the install)"
	@echo "make install      make .venv with vlm-lora in it"
	@echo "make test         install, check style and types, run the tests"
	@echo "make test-long    the tests that take more than a minute each"
	@echo "make test-oldest  the tests with the oldest versions that pyproject.toml allows (25 minutes, 7 GB)"
	@echo "make docs         install, build the documentation into build/docs; a broken link fails"
	@echo "make wheel        install, build wheel and source archive into dist, and try the wheel"
	@echo "make easy-vqa     install, train and score on the whole of easy-VQA (12 minutes)"
	@echo "make bench        install, training speed and memory beside a plain loop and ms-swift (45 minutes, 6 GB)"
	@echo "make gpu-dry-run  what bench.gpu runs on a GPU, on a CPU with torch 2.11 and Python 3.12 (5 minutes, 6 GB)"
	@echo "make engines      install, what vLLM and llama.cpp say of what was trained (2 hours, 12 GB)"
	@echo "make lint         install, check style, types and the limits on size"

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

quickstart: install
	@rm -rf $(RUN)
	$(BIN)/vlm-lora train data/emoji_scenes --model tiny --output $(RUN) --val-split 0.2 \
	  --epochs 8 --batch-size 40 --lr 2e-3
	@echo
	@echo "Captions of pictures it has not seen:"
	$(BIN)/vlm-lora caption data/emoji_scenes/more --adapter $(RUN)
	@echo
	@echo "Look at the report:           $(RUN)/report.html"
	@echo "Try it in the browser:        $(BIN)/vlm-lora demo --adapter $(RUN)"
	@echo "Your own pictures, tiny:      $(BIN)/vlm-lora train ./photos --model tiny --lr 2e-3"
	@echo "Your own pictures, for real:  $(BIN)/vlm-lora train ./photos"
	@echo "Then:                         $(BIN)/vlm-lora caption ./more --adapter runs/photos-..."

# The tests of the web demo drive a Chromium: the system's, or one that playwright can fetch. Without either they are skipped.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# One more than cores: tests of signals, servers and browsers wait most of their time.
WORKERS := $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)")

test: lint
	@$(if $(CHROMIUM),true,PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT=10000 $(BIN)/playwright install chromium) \
	  || echo "No Chromium here, and none to be fetched: the tests of the web demo in a browser are skipped."
	$(BIN)/python -m pytest -rs -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-long: install
	$(BIN)/python -m pytest -rs -m long

# uv's resolver takes the lower bounds as they stand in pyproject.toml. Losses are recorded with another torch, and the
# paged optimizer of earlier bitsandbytes wants a GPU.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e ".[test]"
	.venv-oldest/bin/python -m pytest -rs -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --deselect tests/test_baseline.py --deselect tests/test_words.py --deselect tests/test_docs.py \
	  --deselect tests/training/test_checkpoint.py::test_the_state_of_a_paged_optimizer_is_loaded_into_paged_memory \
	  --deselect tests/model/test_qlora.py::test_the_paged_optimizer_is_for_qlora_on_a_gpu_and_resumes_exactly

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "Open build/docs/index.html"

wheel: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "build>=1.2"
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m bench.wheel dist

easy-vqa: install
	$(BIN)/python -m bench.easy_vqa

bench: install
	$(BIN)/python -m bench.speed

# What bench.gpu meets on a machine with torch 2.11: torch 2.14 hides faults of it, also of compiled gradients.
gpu-dry-run:
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 torchvision==0.26.0 \
	  transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 pillow psutil rapidfuzz jinja2 pyyaml filelock httpx pyarrow pytest
	.venv-gpu/bin/python -m bench.gpu --size small --base bfloat16 --rounds 1 --images 4 --side 112
	.venv-gpu/bin/python -m pytest -o addopts= tests/training/test_compiled.py -k "serves and qwen2_vl or gets_wrong"
	.venv-gpu/bin/python -m pytest -o addopts= tests/training/test_plan.py -k "counted_as_torch or needs_no_weights"

engines: install
	$(BIN)/python -m bench.engines

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python docs/architecture.py --check
