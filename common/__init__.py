"""The shared library of the five reproductions. It knows no paper."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch


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


_torchvision_operators = declare_torchvision_operators()
