"""Setup for all tests: kernels run without a GPU, torchvision can be imported, and parallel workers use one thread each."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, on import; torch may import Triton

import common  # noqa: F401  (declares torchvision's operators; must come before torchvision, timm and lightning)

import torch  # isort: skip

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
