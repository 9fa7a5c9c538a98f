# Position-based pre-training of Vision Transformers. `make help` lists the targets.
PAPER ?= droppos
PYTHON ?= python3
python := .venv/bin/python
options = $(if $(EPOCHS),--epochs '$(EPOCHS)') $(if $(DATA),--data '$(DATA)') $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(ARMS),--arms $(ARMS)) \
          $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(DEVICE),--device '$(DEVICE)') $(if $(GPUS),--gpus '$(GPUS)') $(if $(OUT),--out '$(OUT)') $(if $(RECORD),--record) $(ARGS)

.PHONY: help setup tokens reproduce test test-all lint table speed

help:  ## show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@printf '\nVariables of make reproduce:\n'
	@sed -n 's/^#: //p' Makefile

#:   PAPER=droppos   the paper, by its folder, or a baseline: deit, ijepa, mae
#:   EPOCHS=800      epochs of pre-training, instead of the recipe's
#:   DATA=digits     digits, cifar10, cifar100, tiny-imagenet, mini-imagenet, or a folder with train/ and val/ in ImageFolder layout
#:   RECIPE=digits   name of a recipe of the paper; default: the recipe for the data
#:   ARMS="vit swin" the arms to run, of a recipe with several variants; default: all
#:   SEEDS=3         number of seeds; the table shows mean and standard deviation
#:   DEVICE=cuda     auto, cpu or cuda
#:   GPUS=8          number of GPUs of this machine, one process each
#:   OUT=runs        where runs are stored; a second call resumes them
#:   RECORD=1        add the numbers to <paper>/results.csv and the log to <paper>/logs
#:   ARGS="--help"   any other option of python -m benchmarks.reproduce
#:
#: For every target: PYTHON=python3.11 makes .venv with that Python (3.10 to 3.12).

setup: .venv/installed  ## make .venv; the other targets do this automatically

.venv/installed: pyproject.toml constraints.txt
	@echo 'making .venv: a minute or more, 2 GB (several GB with a CUDA build of torch)'
	@$(PYTHON) -m venv .venv
	@$(python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

reproduce: .venv/installed  ## pre-train, evaluate, and show the results beside the published numbers
	@$(python) -m benchmarks.reproduce '$(PAPER)' $(options)

tokens: .venv/installed  ## make the tokens of PAPER=mapet, without training; make reproduce also makes them if they are missing
	@$(python) -m benchmarks.reproduce '$(PAPER)' --prepare $(options)

test: .venv/installed  ## the quick tests
	$(python) -m pytest -n auto -m 'not slow' $(ARGS)

test-all: .venv/installed  ## all tests, as CI runs them
	$(python) -m pytest -n auto $(ARGS)

lint: .venv/installed  ## ruff and mypy: rules, format, types
	$(python) -m ruff check . && $(python) -m ruff format --check .
	$(python) -m mypy

table: .venv/installed  ## write the tables of RESULTS.md and the READMEs from the results
	$(python) -m benchmarks.ledger $(ARGS)

speed: .venv/installed  ## time training steps and attention; with PAPER=, only that paper and the baselines
	$(python) -m benchmarks.speed $(if $(filter file,$(origin PAPER)),,--paper '$(PAPER)') $(ARGS)
