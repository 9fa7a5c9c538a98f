"""Read a checkpoint file without executing anything in it, or explain why it cannot be read."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class ConversionError(ValueError):
    """A checkpoint that cannot be read, or does not fit the module."""


def few(names: Iterable[str]) -> str:
    """At most three names, from different parts of the model if possible, and the number of the others."""
    names = sorted(names)
    if len(names) <= 3:
        return ", ".join(names)
    first: dict[str, str] = {}
    for kind in (lambda name: re.split(r"[._]", name)[0], lambda name: re.sub(r"\d+", "", name.rpartition(".")[0]), lambda name: name):
        for name in names:
            first.setdefault(f"{kind(name)}", name)
    shown = list(dict.fromkeys(first.values()))[:3]
    return f"{', '.join(shown)} and {len(names) - 3} more"


def read_mapping(path: Path) -> tuple[Mapping, bool]:
    """The content of a file, and whether it has numpy arrays. Raises ConversionError, with the reason, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise ConversionError(f"there is no checkpoint at {path}") from None
    except IsADirectoryError:
        raise ConversionError(f"{path} is a folder: give the checkpoint in it") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read as a checkpoint: {error}") from error
    if kind := _other_kind(path, head):
        raise ConversionError(f"{path} is {kind}")
    names: list[str] = []
    try:
        content = load_file(path) if head[8:9] == b"{" else _load_plain(path, names)
    except Exception as error:  # truncated, damaged and other files raise many kinds of errors
        raise ConversionError(_unreadable(path, head, names, error)) from error
    arrays = any(name.endswith(("._reconstruct", ".ndarray")) for name in names)
    return content if isinstance(content, Mapping) else {}, arrays


def _other_kind(path: Path, head: bytes) -> str:
    """The kind of a file that is not a checkpoint, by its first bytes, and what to do; "" if it may be a checkpoint."""
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (OSError, zipfile.BadZipFile):
            return ""
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript program, not a checkpoint: save its state_dict()"
        if any(name.endswith("data.pkl") for name in names):
            return ""
        arrays = "an archive of numpy arrays (.npz), as JAX writes: use the weights for PyTorch"
        return arrays if names and all(name.endswith(".npy") for name in names) else f"a zip archive ({few(names)}): unpack it first"
    kinds = {
        b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
        b"\x89HDF": "an HDF5 file, as Keras writes: use the weights for PyTorch",
        b"\x93NUMPY": "a numpy array: use the weights for PyTorch",
        b"\x1f\x8b": "compressed by gzip: unpack it first",
        b"BZh": "compressed by bzip2: unpack it first",
        b"\xfd7zXZ": "compressed by xz: unpack it first",
        b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
        b"<": "a web page, not a checkpoint: download the file itself",
        b"{": "JSON, not a checkpoint: give the file with the tensors",
    }
    return next((kind for start, kind in kinds.items() if head.startswith(start) or head.lstrip().startswith(start)), "")


class _Plain:
    """Placeholder for an object in a file that is not a tensor. Nothing is executed to create it."""

    def __init__(self, *_: object):
        pass

    def __new__(cls, *_: object) -> "_Plain":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class _PlainMapping:
    """Placeholder for a mapping or a namespace; weights_only can fill it only if it is an OrderedDict."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


MAPPINGS = ("argparse", "types", "collections", "omegaconf", "yacs", "easydict", "addict", "ml_collections", "mmengine", "mmcv", "munch")
VALUES = ("numpy", "pathlib", "datetime", "decimal", "fractions", "uuid", "zoneinfo", "typing")
BUILTINS = ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "frozenset", "slice", "range", "object")


def _stand_in(name: str) -> type | None:
    """The placeholder for a name in a pickle; None if the name may be code."""
    module, _, rest = name.partition(".")
    if module in MAPPINGS:
        return _PlainMapping
    return _Plain if module in VALUES or (module == "builtins" and rest in BUILTINS) or name == "copyreg._reconstructor" else None


def _load_plain(path: Path, names: list[str]) -> Any:
    """torch.load with weights_only, and placeholders for data other than tensors. Adds the types of these data to `names`."""
    try:
        names += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or not a checkpoint: names are found one by one below
        pass
    while True:
        with torch.serialization.safe_globals([(found, name) for name in names if (found := _stand_in(name))]):
            try:
                with open(path, "rb") as file:  # with a path, torch would depend on its suffix
                    return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                refused = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
                name = refused and (refused[1] if "." in refused[1] else f"builtins.{refused[1]}")
                if name is None or name in names:
                    raise
                names.append(name)


def _unreadable(path: Path, head: bytes, names: Sequence[str], error: Exception) -> str:
    """Why a file cannot be read, and how to fix it."""
    reason = " ".join(str(error).split())
    code = sorted(name for name in names if _stand_in(name) is None)
    protocol = "Unsupported operand" in reason and head.startswith((b"PK", b"\x80"))
    if isinstance(error, pickle.UnpicklingError) and (code or protocol):
        what = f"contains {few(code)} besides plain tensors" if code else "has another pickle protocol than torch's"
        kept = "(dict, torch.Tensor, torch.nn.Module)"
        keep = (
            "keep = lambda x: x if isinstance(x, torch.Tensor) else {k: keep(v) for k, v in "
            f"(x.state_dict() if isinstance(x, torch.nn.Module) else x).items() if isinstance(v, {kept})}}"
        )
        load, other = f"torch.load('{path}', map_location='cpu', weights_only=False)", path.with_name(f"{path.stem}-tensors.pth")
        command = f"python -c \"import torch; {keep}; torch.save(keep({load}), '{other}')\""
        return f"{path} {what}, and reading this could run code; if you trust the source of the file, extract its tensors: {command}"
    reason = reason.split(". ")[0][:120] if " " in reason else "it is empty" if not head else f"{type(error).__name__} {reason}".strip()
    return f"{path} cannot be read as a checkpoint (truncated, or not one): {reason}"
