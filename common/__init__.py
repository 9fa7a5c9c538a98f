"""The shared library of the five reproductions. It knows no paper."""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("fcntl") is None:  # needed for file locks; Windows also lacks some of the signals
    sys.exit(f"position-pretraining runs on Linux and macOS, not on {sys.platform}; on Windows use WSL 2 (Windows Subsystem for Linux)")


def declare_torchvision_operators() -> torch.library.Library | None:
    """Let `import torchvision` succeed if its compiled operators cannot be loaded.

    The wheel on the package index is built for CUDA. With a CPU-only torch its library does not find those of CUDA, and
    the import fails on two operators that transforms and data sets never call. Declaring their schemas first is enough.
    If the library loads, nothing is done.

    Returns the library object, which must be kept alive, or None if nothing was needed.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for binary in Path(spec.origin).parent.glob("_C*.so"):
            ctypes.CDLL(str(binary))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def keep_freed_memory() -> bool:
    """Let glibc keep freed tensor memory instead of returning it to the system; return whether this was possible.

    This changes the whole process, so programs call it when they start; importing a module does not.
    By default glibc maps new memory for every tensor above 32 MB, and clearing its pages takes longer than many operations on it. Without
    this, a float32 step of Swin-T with batch 8 takes two thirds of the time on two cores, with a sixth more memory. With other C
    libraries nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # malloc.h; the threshold is an int, so glibc trims only if 2 GB are free at the end of the heap
    return mallopt is not None and all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1)])


_torchvision_operators = declare_torchvision_operators()
