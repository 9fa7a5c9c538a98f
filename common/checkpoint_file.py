"""The content of a checkpoint file, read without running anything in it, or what is wrong with it."""

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
    """At most three names, of as many parts as there are, and how many more there are."""
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
    """What a file holds, and whether it holds numpy arrays. Raises ConversionError with what is wrong with it."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise ConversionError(f"there is no checkpoint at {path}") from None
    except IsADirectoryError:
        raise ConversionError(f"{path} is a folder: name the checkpoint in it") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read as a checkpoint: {error}") from error
    if kind := _other_kind(path, head):
        raise ConversionError(f"{path} is {kind}")
    names: list[str] = []
    try:
        content = load_file(path) if head[8:9] == b"{" else _load_plain(path, names)
    except Exception as error:  # whatever a file ends in that is cut off, damaged or none
        raise ConversionError(_unreadable(path, head, names, error)) from error
    arrays = any(name.endswith(("._reconstruct", ".ndarray")) for name in names)
    return content if isinstance(content, Mapping) else {}, arrays


def _other_kind(path: Path, head: bytes) -> str:
    """What a file is that is no checkpoint, and what to do about it, by its first bytes; "" where they may be a checkpoint's."""
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (OSError, zipfile.BadZipFile):
            return ""
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript program, not a checkpoint: save its state_dict()"
        if any(name.endswith("data.pkl") for name in names):
            return ""
        arrays = "an archive of numpy arrays (.npz), as JAX writes: take the weights for PyTorch"
        return arrays if names and all(name.endswith(".npy") for name in names) else f"a zip archive ({few(names)}): unpack it first"
    kinds = {
        b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
        b"\x89HDF": "an HDF5 file, as Keras writes: take the weights for PyTorch",
        b"\x93NUMPY": "a numpy array: take the weights for PyTorch",
        b"\x1f\x8b": "compressed by gzip: unpack it first",
        b"BZh": "compressed by bzip2: unpack it first",
        b"\xfd7zXZ": "compressed by xz: unpack it first",
        b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
        b"<": "a web page, not a checkpoint: download the file itself",
        b"{": "JSON, not a checkpoint: name the file with the tensors",
    }
    return next((kind for start, kind in kinds.items() if head.startswith(start) or head.lstrip().startswith(start)), "")


class _Plain:
    """Stands in for an object of a file that is no tensor. Whatever it is made of, nothing is executed."""

    def __init__(self, *_: object):
        pass

    def __new__(cls, *_: object) -> "_Plain":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class _PlainMapping:
    """The same for a mapping or a namespace, which weights_only fills only where it is an OrderedDict."""

    def __new__(cls, *_: object) -> OrderedDict:
        return OrderedDict()


MAPPINGS = ("argparse", "types", "collections", "omegaconf", "yacs", "easydict", "addict", "ml_collections", "mmengine", "mmcv", "munch")
VALUES = ("numpy", "pathlib", "datetime", "decimal", "fractions", "uuid", "zoneinfo", "typing")
BUILTINS = ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "frozenset", "slice", "range", "object")


def _stand_in(name: str) -> type | None:
    """What a name in a pickle is read as; None for what may be code."""
    module, _, rest = name.partition(".")
    if module in MAPPINGS:
        return _PlainMapping
    return _Plain if module in VALUES or (module == "builtins" and rest in BUILTINS) or name == "copyreg._reconstructor" else None


def _load_plain(path: Path, names: list[str]) -> Any:
    """torch.load by weights_only, with stand-ins for data that are no tensors. `names` is given what stood in the file beside tensors."""
    try:
        names += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or no checkpoint: names are found one after the other below
        pass
    while True:
        with torch.serialization.safe_globals([(found, name) for name in names if (found := _stand_in(name))]):
            try:
                with open(path, "rb") as file:  # by a path, torch goes by its suffix
                    return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
                name = found and (found[1] if "." in found[1] else f"builtins.{found[1]}")
                if name is None or name in names:
                    raise
                names.append(name)


def _unreadable(path: Path, head: bytes, names: Sequence[str], error: Exception) -> str:
    """Why a file cannot be read, and what to do about it."""
    reason = " ".join(str(error).split())
    code = sorted(name for name in names if _stand_in(name) is None)
    protocol = "Unsupported operand" in reason and head.startswith((b"PK", b"\x80"))
    if isinstance(error, pickle.UnpicklingError) and (code or protocol):
        what = f"holds {few(code)} beside plain tensors" if code else "is pickled by another protocol than torch's"
        kept = "(dict, torch.Tensor, torch.nn.Module)"
        keep = (
            "keep = lambda x: x if isinstance(x, torch.Tensor) else {k: keep(v) for k, v in "
            f"(x.state_dict() if isinstance(x, torch.nn.Module) else x).items() if isinstance(v, {kept})}}"
        )
        load, other = f"torch.load('{path}', map_location='cpu', weights_only=False)", path.with_name(f"{path.stem}-tensors.pth")
        command = f"python -c \"import torch; {keep}; torch.save(keep({load}), '{other}')\""
        return f"{path} {what}, and reading that could run code; if you trust who made the file, keep its tensors alone: {command}"
    reason = reason.split(". ")[0][:120] if " " in reason else "it is empty" if not head else f"{type(error).__name__} {reason}".strip()
    return f"{path} cannot be read as a checkpoint (truncated, or not one): {reason}"
