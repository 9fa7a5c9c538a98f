"""Checkpoints: written atomically, safe to load, exactly resumable; and export of the encoder with timm's names."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common.files import partial, replacing
from common.run import RunError


class PlainCheckpointIO(TorchCheckpointIO):
    """Write directly to the given path: Fabric's default makes a second copy in memory and uses the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def save_checkpoint(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; call it on every process. A crash at any moment leaves the previous checkpoint intact.

    Raises RunError if writing fails, for example on a full disk; the previous checkpoint is kept.
    """
    with _explained(path):
        with replacing(path) if fabric.is_global_zero else nullcontext(partial(path)) as temporary:
            fabric.save(temporary, state)
        fabric.barrier()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file into a RunError that says what is kept and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as a RuntimeError without errno
        free = shutil.disk_usage(path.parent).free / 2**20
        kept = "the previous one is intact" if path.exists() else "there was none before"
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{path} could not be written ({reason}; {free:.0f} MiB free): {kept}. Free some space and start again") from error


def load_checkpoint(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Load a checkpoint into `state`; its modules and optimizers are loaded in place. Nothing in the file is executed.

    Raises RunError for a file that is truncated or belongs to another model.
    """
    try:
        fabric.load(path, state, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{path} ({path.stat().st_size} bytes) cannot be resumed from: {reason}. Delete it to start over") from error


def export_encoder(encoder: nn.Module, path: Path) -> None:
    """Write encoder.safetensors, which timm.create_model(..., num_classes=0) can load (pos_embed="none" if there are no positions).

    The file is replaced in one step, so it can be read while a run goes on. Raises RunError if writing fails; the old file is kept.
    """
    with _explained(path), replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
