# make run    the whole path on this machine: environment, corpus, a comparison with intervals, a report; on a GPU a
#             larger one, where torch sees a GPU
# make test   environment and tests
# make quick  the same without the slow tests, in under 90 seconds
# make gpu-check  thirteen checks on this machine's GPU, in at most eight minutes; installs nothing. With a Python of your
#             own: make gpu-check PYTHON=/path/to/python; some of them: ONLY=1,6; another file than gpu-check.json: FILE=...
# make gpu-dry-run  whether pip finds what a GPU environment needs; needs the network, installs nothing
# make slurm  what the tests of SLURM jobs need; without it they are skipped (Debian or Ubuntu, as root)
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The build with CUDA where there is an NVIDIA GPU, else the one without. To choose: make run TORCH=torch==2.13.0+cpu
GPU := $(shell { command -v nvidia-smi || ls -d /proc/driver/nvidia; } 2>/dev/null)
TORCH ?= torch==2.13.0$(if $(GPU),,+cpu)
CPU_BUILD := $(findstring +cpu,$(TORCH))
TORCH_INDEX ?= $(if $(CPU_BUILD),https://download.pytorch.org/whl/cpu)
TORCH_STAMP := $(VENV)/.torch-$(subst :,-,$(subst /,-,$(subst =,-,$(TORCH))))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

HAS_TORCH := $(BIN)/python -c 'import torch'
HAS_CUDA := $(BIN)/python -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))'
SEES_GPU := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
# The Python that was asked for, else that of the environment if there is one.
CHECKED := $(if $(filter file default undefined,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
FILE ?= gpu-check.json

.PHONY: run run-on-cpu run-on-gpu test quick gpu-check gpu-dry-run lint types slurm clean

run: $(VENV)/.ready
	@if $(SEES_GPU); then $(MAKE) --no-print-directory run-on-gpu; else $(MAKE) --no-print-directory run-on-cpu; fi

run-on-cpu: $(VENV)/.ready
	$(BIN)/thriftlab prepare tokenizer=bpe:1024
	$(BIN)/thriftlab compare adamw signsgd frugal --config launch/studies/first_light.yaml

run-on-gpu: $(VENV)/.ready
	$(BIN)/thriftlab prepare tokenizer=bpe:8192 out=prepared/embedded-8192
	$(BIN)/thriftlab compare adamw signsgd frugal --config launch/studies/first_light_gpu.yaml

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

quick: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

gpu-check: .typecheck/thriftlab
	PYTHONPATH=.typecheck $(CHECKED) -m thriftlab.launch check gpu --out $(FILE) $(addprefix --only ,$(ONLY))

gpu-dry-run:
	$(CHECKED) -m tests.measure.gpu_dry_run

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .

types: $(VENV)/.ready-dev .typecheck/thriftlab
	$(BIN)/mypy -p thriftlab.data -p thriftlab.optim -p thriftlab.train -p thriftlab.launch

slurm:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client iproute2

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "thriftlab needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

# torch first and by itself, from wherever pip looks. Without CUDA: from PyTorch's own index where that has no such build.
# With CUDA: what pip calls torch==2.13.0 may be a build without, from another index or from before, so it is looked at.
$(TORCH_STAMP): constraints.txt | $(BIN)/python
	@echo "installing $(TORCH) into $(VENV) (the first time takes minutes) ..."
ifneq ($(CPU_BUILD),)
	@$(PIP) "$(TORCH)" -c constraints.txt 2>/dev/null || $(PIP) "$(TORCH)" -c constraints.txt --extra-index-url $(TORCH_INDEX)
else
	@! $(HAS_TORCH) 2>/dev/null || $(HAS_CUDA) || $(BIN)/python -m pip uninstall --quiet --yes torch
	@$(PIP) "$(TORCH)" -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX))
	@$(HAS_CUDA) || { echo "error: pip has no build of $(TORCH) with CUDA, which this machine's GPU needs; name an index that has \
	one: make run TORCH_INDEX=https://download.pytorch.org/whl/cuNNN; or take the CPU: make run TORCH=torch==2.13.0+cpu"; exit 1; }
endif
	@rm -f $(VENV)/.torch*
	@touch $@

$(VENV)/.ready: pyproject.toml $(TORCH_STAMP)
	@echo "installing thriftlab into $(VENV) ..."
	@$(PIP) -e ".[train]" -c constraints.txt
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) -e ".[dev]" -c constraints.txt
	@touch $@

# Type checkers do not see the mapping of an editable install; they see these links.
.typecheck/thriftlab:
	mkdir -p $@
	for folder in kernels data optim train launch; do ln -sfn ../../$$folder $@/$$folder; done

clean:
	rm -rf .typecheck build *.egg-info .pytest_cache .mypy_cache .ruff_cache
