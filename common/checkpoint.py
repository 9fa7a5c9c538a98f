"""Checkpoints: whole or absent, safe to load, exactly resumable; and the encoder, exported under timm's names."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import save_file
from torch import nn

from common.files import partial, replacing
from common.run import RunError


class PlainCheckpointIO(TorchCheckpointIO):
    """Write straight to the given path: Fabric's own way goes through a second copy in memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def save_checkpoint(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, called by every process: a crash at any moment leaves the previous one whole.

    Raises RunError where that fails, as on a full disk, with the previous checkpoint intact.
    """
    try:
        with replacing(path) if fabric.is_global_zero else nullcontext(partial(path)) as temporary:
            fabric.save(temporary, state)
        fabric.barrier()
    except (OSError, RuntimeError) as error:  # torch reports a write that failed as a RuntimeError with no errno
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


def export_encoder(encoder: nn.Module, path: Path) -> None:
    """encoder.safetensors, which timm.create_model(..., num_classes=0) loads as it is (pos_embed="none" where there are no positions)."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
