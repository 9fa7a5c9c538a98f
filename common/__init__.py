"""The shared library of the five reproductions. It knows no paper."""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("fcntl") is None:  # the locks of runs, and signals that Windows does not have
    sys.exit(f"position-pretraining runs on Linux and macOS, not on {sys.platform}; on Windows use WSL 2, the Linux that Windows contains")


def declare_torchvision_operators() -> torch.library.Library | None:
    """Let `import torchvision` succeed where its compiled operators cannot be loaded.

    The wheel on the package index is built for CUDA. Beside a CPU-only torch its library misses CUDA's and the
    import dies on two operators that transforms and data sets never call. Declaring their schemas first is enough.
    Where the library loads, nothing is done.

    Returns the library object, which must be kept alive, or None where nothing was needed.
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
    """Let glibc keep what tensors free instead of giving it back to the system; returns whether that was possible.

    It changes the whole process, so programs call it at their start, and importing a module does not.
    By default every tensor above 32 MB is mapped anew, and clearing its pages takes longer than many an operation on it: without that, a
    float32 step of Swin-T with batch 8 takes two thirds of the time on two cores, and a sixth more memory. On other C libraries
    nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # malloc.h; the threshold is an int, so this is never before 2 GB are free at the end of the heap
    return mallopt is not None and all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1)])


_torchvision_operators = declare_torchvision_operators()
