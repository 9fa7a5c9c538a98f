# Position-based pre-training of Vision Transformers. `make help` lists the targets.
PAPER ?= droppos
PYTHON ?= python3
python := .venv/bin/python
settings = $(if $(EPOCHS),--epochs '$(EPOCHS)') $(if $(EVERY),--every '$(EVERY)') $(if $(DATA),--data '$(DATA)') $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(ARMS),--arms $(ARMS)) \
          $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(DEVICE),--device '$(DEVICE)') $(if $(OUT),--out '$(OUT)') $(if $(CACHE),--cache '$(CACHE)') $(if $(RECORD),--record) $(ARGS)
resources = $(if $(PARTITION),--partition '$(PARTITION)') $(if $(ACCOUNT),--account '$(ACCOUNT)') $(if $(HOURS),--hours '$(HOURS)') $(if $(NODES),--nodes '$(NODES)') \
            $(if $(GPUS),--gpus '$(GPUS)') $(if $(CPUS),--cpus '$(CPUS)') $(if $(PARALLEL),--parallel '$(PARALLEL)') $(if $(CHAIN),--chain '$(CHAIN)') $(SLURM)

.PHONY: help setup tokens reproduce compare segment detect pictures propagate report submit status cancel test test-all test-slurm lint table verify-results speed

help:  ## show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@printf '\nVariables of make reproduce:\n'
	@sed -n 's/^#: //p' Makefile

#:   PAPER=droppos   the paper, by its folder, or a baseline: deit, drloc, ijepa, jigsaw, mae
#:   EPOCHS=800      epochs of pre-training, instead of the recipe's
#:   EVERY=100       also evaluate the encoder after each 100 epochs, into OUT/<paper>/epochs.csv
#:   DATA=digits     digits, cifar10, cifar100, tiny-imagenet, mini-imagenet, or a folder with train/ and val/ in ImageFolder layout
#:   RECIPE=digits   name of a recipe of the paper; default: the recipe for the data
#:   ARMS="vit swin" the arms to run, of a recipe with several variants; default: all
#:   SEEDS=3         number of seeds; the table shows mean and standard deviation
#:   DEVICE=cuda     auto, cpu or cuda
#:   GPUS=8          number of GPUs of this machine, one process each
#:   OUT=runs        where runs are stored; a second call resumes them
#:   CACHE=256       read a copy of the images of a folder whose short side has 256 pixels; it is made first, below data/cache
#:   RECORD=1        add the numbers to <paper>/results.csv and the log to <paper>/logs
#:   ARGS="--help"   any other option of python -m benchmarks.reproduce
#:
#: Variables of make compare: DATA, SEEDS, DEVICE, OUT as above, and
#:   PAPERS="mae stop"          methods besides the references; default: all
#:   BUDGET=images:500000       of each pre-training: images seen, flops:1e15, or minutes:8
#:   EVALUATIONS="knn location" default: all
#:   SCENES=/datasets/streets   images with masks, as of make segment: one more evaluation, segmentation with the frozen encoder
#:   ENCODER=file.safetensors   an encoder of your own, which takes part without pre-training
#:   TABLE=1                    only print the table and draw the intervals, of the scores in OUT or else of the recorded ones
#:   RECORD=1                   copy scores, logs and report to benchmarks/compare/<arena>
#:
#: Variables of make detect: PAPER, RECIPE, DEVICE, OUT, RECORD, ARGS as above, and
#:   CKPT=runs/droppos/...      a run (PAPER is not needed then), or a file with an encoder; default: random weights
#:   DATA=/datasets/coco        a folder in COCO's format
#:   ENGINE=detectron2          torchvision or detectron2
#:   IMAGE_SIZE=1024            side of the square input in pixels
#:   EPOCHS=100 BATCH=64        of the training
#:   SEED=0                     of heads and images
#:
#: Variables of make report:
#:   RUN=runs/droppos/digits-200ep-seed0   a run, or a comparison such as runs/compare/digits
#:   DATA=/datasets/photographs            the images of the run, if they are in a folder
#:
#: Variables of make segment: PAPER, RECIPE, DEVICE, OUT as above, and
#:   CKPT=runs/droppos/...      the folder of a run, which needs no PAPER, or a file with an encoder; default: random weights
#:   DATA=/datasets/ade20k      ADE20K, Pascal VOC, or a folder with images/{train,val}, masks/{train,val} and classes.json
#:   ENGINE=linear              linear, or knn: without training
#:   FROZEN=1                   train only the linear layer
#:   SIZE="512 512"             height and width of the crops in pixels
#:   EPOCHS=32 BATCH=16 SEED=0  of the training
#:   RECORD=1                   add the results to benchmarks/segmentation/results.csv
#:
#: Variables of make propagate: PAPER, RECIPE, CKPT, DEVICE as above, and
#:   DATA=/datasets/DAVIS       DAVIS 2017, or a folder with frames/ and masks/
#:   OUT=found                  folder for the masks; default: none are written
#:
#: Variables of make pictures: PAPER, RECIPE, CKPT, SIZE as above, and
#:   IMAGES=photographs         a folder of images, or one image
#:   OUT=pictures.png           the file that is written
#:
#: make submit takes the variables of make reproduce and, for the jobs:
#:   PAPER="droppos mp3"        one or several papers
#:   PARTITION=gpu              partition of the cluster
#:   ACCOUNT=vision             account that pays
#:   HOURS=24                   time limit of a job; a longer training is requeued and resumes
#:   NODES=4                    nodes of a training, with GPUS=8 on each
#:   CPUS=8                     CPU cores for each GPU
#:   PARALLEL=4                 trainings that run at the same time
#:   CHAIN=4                    jobs one after the other for each training, on a cluster without requeueing
#:   SLURM="--sbatch mem=64G"  any other option of python -m benchmarks.slurm submit
#:
#: For every target: PYTHON=python3.11 makes .venv with that Python (3.10 to 3.12).

setup: .venv/installed  ## make .venv; the other targets do this automatically

.venv/installed: pyproject.toml constraints.txt
	@echo 'making .venv: a minute or more, 2 GB (several GB with a CUDA build of torch)'
	@$(PYTHON) -m venv .venv
	@$(python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

reproduce: .venv/installed  ## pre-train, evaluate, and show the results beside the published numbers
	@$(python) -m benchmarks.reproduce '$(PAPER)' $(settings) $(if $(GPUS),--gpus '$(GPUS)')

tokens: .venv/installed  ## make the tokens of PAPER=mapet, and the copy of CACHE, without training; make reproduce also makes them if they are missing
	@$(python) -m benchmarks.reproduce '$(PAPER)' --prepare $(settings)

compare: .venv/installed  ## all methods with one encoder, budget and set of evaluations: benchmarks/compare/README.md
	@$(python) -m benchmarks.compare $(if $(DATA),--data '$(DATA)') $(if $(PAPERS),--papers $(PAPERS)) $(if $(SEEDS),--seeds '$(SEEDS)') \
	  $(if $(BUDGET),--budget '$(BUDGET)') $(if $(EVALUATIONS),--evaluations $(EVALUATIONS)) $(if $(SCENES),--scenes '$(SCENES)') $(if $(ENCODER),--encoder '$(ENCODER)') \
	  $(if $(DEVICE),--device '$(DEVICE)') $(if $(OUT),--out '$(OUT)') $(if $(TABLE),--table) $(if $(RECORD),--record) $(ARGS)

segment: .venv/installed  ## judge an encoder by semantic segmentation: benchmarks/segmentation/README.md
	@$(python) -m benchmarks.segmentation $(if $(DATA),--data '$(DATA)') $(if $(filter file,$(origin PAPER)),,--paper '$(PAPER)') $(if $(CKPT),--checkpoint '$(CKPT)') \
	  $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(ENGINE),--engine '$(ENGINE)') $(if $(FROZEN),--frozen) $(if $(SIZE),--size $(SIZE)) \
	  $(if $(EPOCHS),--epochs '$(EPOCHS)') $(if $(BATCH),--batch '$(BATCH)') $(if $(SEED),--seed '$(SEED)') $(if $(DEVICE),--device '$(DEVICE)') \
	  $(if $(OUT),--out '$(OUT)') $(if $(RECORD),--record) $(ARGS)

detect: .venv/installed  ## judge an encoder by object detection with ViTDet: benchmarks/detection/README.md
	@$(python) -m benchmarks.detection $(if $(DATA),--data '$(DATA)') $(if $(filter file,$(origin PAPER)),,--paper '$(PAPER)') $(if $(CKPT),--checkpoint '$(CKPT)') $(if $(RECIPE),--recipe '$(RECIPE)') \
	  $(if $(ENGINE),--engine '$(ENGINE)') $(if $(IMAGE_SIZE),--image-size '$(IMAGE_SIZE)') $(if $(EPOCHS),--epochs '$(EPOCHS)') $(if $(BATCH),--batch '$(BATCH)') \
	  $(if $(SEED),--seed '$(SEED)') $(if $(DEVICE),--device '$(DEVICE)') $(if $(OUT),--out '$(OUT)') $(if $(RECORD),--record) $(ARGS)

pictures: .venv/installed  ## draw the attention and the features of an encoder on a few images
	@$(python) -m benchmarks.pictures $(if $(IMAGES),--images '$(IMAGES)') $(if $(filter file,$(origin PAPER)),,--paper '$(PAPER)') $(if $(CKPT),--checkpoint '$(CKPT)') \
	  $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(SIZE),--size $(SIZE)) $(if $(OUT),--out '$(OUT)') $(ARGS)

propagate: .venv/installed  ## follow the objects of a first frame through a video, with frozen features: benchmarks/segmentation/README.md
	@$(python) -m benchmarks.propagation $(if $(DATA),--data '$(DATA)') $(if $(filter file,$(origin PAPER)),,--paper '$(PAPER)') $(if $(CKPT),--checkpoint '$(CKPT)') \
	  $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(DEVICE),--device '$(DEVICE)') $(if $(OUT),--out '$(OUT)') $(ARGS)

report: .venv/installed  ## write RUN/report.html, one page with the figures of a run or a comparison
	@$(python) -m benchmarks.report '$(RUN)' $(if $(DATA),--data '$(DATA)') $(ARGS)

submit: .venv/installed  ## submit the same to a Slurm cluster, as jobs: benchmarks/slurm/README.md
	@$(python) -m benchmarks.slurm submit $(PAPER) $(resources) -- $(settings)

status: .venv/installed  ## show the jobs of OUT
	@$(python) -m benchmarks.slurm status '$(or $(OUT),runs)'

cancel: .venv/installed  ## cancel the jobs of OUT
	@$(python) -m benchmarks.slurm cancel '$(or $(OUT),runs)'

test: .venv/installed  ## the quick tests
	$(python) -m pytest -n auto --dist loadgroup -m 'not slow and not faults' $(ARGS)

test-all: .venv/installed  ## all tests, as CI runs them
	$(python) -m pytest -n auto --dist loadgroup -m 'not faults' $(ARGS)

test-slurm: .venv/installed  ## jobs and their faults on a real Slurm of two nodes on this machine; needs root and Slurm's packages
	$(python) -m pytest -s tests/slurm $(ARGS)

lint: .venv/installed  ## ruff and mypy: rules, format, types
	$(python) -m ruff check . && $(python) -m ruff format --check .
	$(python) -m mypy

table: .venv/installed  ## write the tables of RESULTS.md and the READMEs from the results
	$(python) -m benchmarks.ledger $(ARGS)

verify-results: .venv/installed  ## find every number of results.csv again in the log of its run
	$(python) -m benchmarks.ledger.verify

speed: .venv/installed  ## time training steps and attention; with PAPER=, only that paper and the baselines
	$(python) -m benchmarks.speed $(if $(filter file,$(origin PAPER)),,--paper '$(PAPER)') $(ARGS)
