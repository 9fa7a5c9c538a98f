"""Checkpoints: whole or absent, safe to load, exactly resumable; and the encoder, exported under timm's names."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import save_file

from common.run import RunError
from common.vit import ViT


class PlainCheckpointIO(TorchCheckpointIO):
    """Write straight to the given path: Fabric's own way goes through a second copy in memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def save_checkpoint(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write to a temporary file, force it to disk, rename: a crash at any moment leaves the previous checkpoint whole.

    Raises RunError where that fails, as on a full disk, with the previous checkpoint intact.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        fabric.save(temporary, state)
        if fabric.is_global_zero:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_directory(path.parent)
        fabric.barrier()
    except (OSError, RuntimeError) as error:  # torch reports a write that failed as a RuntimeError with no errno
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        kept = "the previous one is intact" if path.exists() else "there was none before"
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{path} could not be written ({reason}; {free:.0f} MiB free): {kept}. Make room and start again") from error


def load_checkpoint(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Fill `state`, whose modules and optimizers are loaded in place. Nothing in the file is executed.

    Raises RunError for a file that is truncated or belongs to another model.
    """
    try:
        fabric.load(path, state, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{path} ({path.stat().st_size} bytes) cannot be resumed from: {reason}. Delete it to start over") from error


def export_encoder(encoder: ViT, path: Path) -> None:
    """encoder.safetensors, which timm.create_model(..., num_classes=0) loads as it is."""
    temporary = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
    temporary.replace(path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
