"""For every test: torchvision can be imported, and parallel workers do not fight over the cores."""

import os

import common  # noqa: F401  (declares torchvision's operators; must come before torchvision, timm and lightning)

import torch  # isort: skip

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
