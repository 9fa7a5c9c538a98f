"""Checkpoints of official codes and of timm to modules here, with a report of what was covered.

timm's names are this project's names, so `encoder.state_dict()` goes into timm.create_model as it is. What differs
elsewhere: a container around the tensors, a `module.` prefix, a class token or none, another grid, a decoder's names, queries apart
from keys and values.
"""

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.positions import resize_positions
from common.vit import ViT

State = dict[str, Tensor]


class ConversionError(ValueError):
    """A checkpoint that cannot be read, or does not cover the module."""


@dataclass(frozen=True)
class Coverage:
    """What loading did: names of tensors loaded, missing (of the module), unexpected (of the file), reshaped on the way."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} tensors loaded, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        details = [f"{kind}: {', '.join(getattr(self, kind))}" for kind in ("missing", "unexpected", "reshaped") if getattr(self, kind)]
        return "; ".join([counts, *details])


def read_checkpoint(path: Path | str) -> State:
    """The tensors of a .safetensors or torch file, out of the containers that official codes use, without `module.`.

    Where a file holds several networks (`encoder`, `predictor` and `target_encoder`, of I-JEPA and StoP) their names come first.
    Nothing in the file is executed (weights_only). Raises ConversionError for a file that cannot be read so.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # MAE's files carry their argparse options; a Namespace holds values and runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConversionError(f"there is no checkpoint at {path}") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be read as a checkpoint (truncated, or not one): {error}") from error
    content = content if isinstance(content, Mapping) else {}
    for container in ("state_dict", "model"):
        if isinstance(content.get(container), Mapping):
            content = content[container]
    tensors = rename({name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}, {})
    for part, network in content.items():
        if isinstance(network, Mapping) and network and all(isinstance(tensor, Tensor) for tensor in network.values()):
            tensors |= {f"{part}.{name}": tensor for name, tensor in rename(network, {}).items()}
    if not tensors:
        raise ConversionError(f"{path} holds no tensors under 'state_dict', 'model' or at its top")
    return tensors


def rename(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> State:
    """Replace the longest matching prefix of each name, after `module.` is taken off; names that match none stay."""
    ordered = sorted(prefixes, key=len, reverse=True)

    def renamed(name: str) -> str:
        prefix = next((p for p in ordered if name.startswith(p)), None)
        return name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)

    return {renamed(name.removeprefix("module.")): tensor for name, tensor in state.items()}


def fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """The tensors, with `attn.q` (D rows) and `attn.kv` (2 D rows: keys, then values) of MaPeT's official code as one `attn.qkv`.

    Weights and biases alike; all else stays. Raises ConversionError for one of the two without the other, by name.
    """
    fused = {}
    for name, tensor in state.items():
        apart = re.fullmatch(r"((?:.*\.)?attn\.)(q|kv)(\.\w+)", name)
        if apart is None:
            fused[name] = tensor
            continue
        stem, part, kind = apart.groups()
        other = state.get(name_of_other := f"{stem}{'kv' if part == 'q' else 'q'}{kind}")
        q, kv = (tensor, other) if part == "q" else (other, tensor)
        if other is None or kv.shape != (2 * q.shape[0], *q.shape[1:]):
            fault = "is missing" if other is None else f"is {tuple(other.shape)}"
            raise ConversionError(f"{name} {tuple(tensor.shape)} goes with {name_of_other}, which {fault}: take a whole checkpoint")
        fused[f"{stem}qkv{kind}"] = torch.cat([q, kv])
    return fused


def load_encoder(encoder: ViT, state: Mapping[str, Tensor], allow_missing: Sequence[str] = ()) -> Coverage:
    """Load an encoder from names of timm, MAE, DropPos or MaPeT, or from a method of this project (`encoder.` prefix). Of I-JEPA and StoP
    it is the target encoder, which their papers evaluate.

    The position embedding is resized to the encoder's grid, and a class token that the encoder lacks is left out with its
    position. Decoders, heads and mask tokens are reported as unexpected.
    Raises ConversionError, and changes nothing, where a tensor of the encoder is missing (unless named in `allow_missing`)
    or has another shape.
    """
    if any(name.startswith("predictor.predictor_") for name in state):
        state = {name.removeprefix("target_"): tensor for name, tensor in state.items() if name.startswith("target_encoder.")}
        if not state:
            raise ConversionError(
                "this is a checkpoint of I-JEPA or StoP without a target_encoder, by which they are judged; take a whole one"
            )
    state = fuse_qkv(rename(state, {"encoder.": ""}))
    wanted = encoder.state_dict()
    found = {name: tensor for name, tensor in state.items() if name in wanted}
    reshaped = []
    same_width = "pos_embed" in found and found["pos_embed"].shape[-1] == encoder.width
    if same_width and found["pos_embed"].shape != wanted["pos_embed"].shape:
        found["pos_embed"] = _fit_positions(found["pos_embed"], "cls_token" in state, encoder)
        reshaped.append("pos_embed")
    wrong = [f"{n}: {tuple(t.shape)} in the file, {tuple(wanted[n].shape)} here" for n, t in found.items() if t.shape != wanted[n].shape]
    if wrong:
        raise ConversionError(f"the checkpoint is of another architecture: {'; '.join(wrong[:5])}")
    coverage = _coverage(state, wanted, reshaped)
    refused = [name for name in coverage.missing if name not in allow_missing]
    if refused:
        raise ConversionError(f"the checkpoint does not cover the encoder ({coverage}); to go on all the same, name what may be missing")
    encoder.load_state_dict(found, strict=False)
    return coverage


def load_method(method: nn.Module, state: Mapping[str, Tensor], prefixes: Mapping[str, str], unused: Sequence[str] = ()) -> Coverage:
    """Load a whole method from its official names, of which those in `unused` are known to mean nothing.

    `prefixes` are of names after fuse_qkv. A file may hold what the method computes itself and does not save, such as the shift masks of
    a Swin, and must then hold the same. Raises ConversionError unless every other tensor finds its place.
    """
    state = {name: tensor for name, tensor in state.items() if name.removeprefix("module.") not in unused}
    state, wanted = without_constants(rename(fuse_qkv(state), prefixes), method), method.state_dict()
    coverage = _coverage(state, wanted)
    wrong = [name for name in coverage.loaded if state[name].shape != wanted[name].shape]
    if coverage.missing or coverage.unexpected or wrong:
        shapes = f"; other shapes: {', '.join(wrong)}" if wrong else ""
        raise ConversionError(f"the checkpoint is of another method or another configuration ({coverage}{shapes})")
    method.load_state_dict(state)
    return coverage


def without_constants(state: Mapping[str, Tensor], module: nn.Module) -> State:
    """The tensors without the module's constants: buffers that it computes itself and does not save, under the same names.

    Raises ConversionError, by name, where the file's differ: the weights were then trained with another window or image size.
    """
    saved, kept = module.state_dict().keys(), dict(state)
    for name, here in module.named_buffers():
        if name in saved or name not in kept:
            continue
        there = kept.pop(name)
        if there.shape != here.shape or not torch.equal(there.to(here), here):
            shapes = f"is {tuple(there.shape)} in the file and {tuple(here.shape)} here"
            fault = shapes if there.shape != here.shape else "has other values in the file than here"
            raise ConversionError(f"{name} {fault}: the checkpoint is of another window or image size; build the encoder with its own")
    return kept


def _coverage(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], reshaped: Sequence[str] = ()) -> Coverage:
    file, module = set(state), set(wanted)
    return Coverage(tuple(sorted(file & module)), tuple(sorted(module - file)), tuple(sorted(file - module)), tuple(reshaped))


def _fit_positions(embedding_1TD: Tensor, class_token: bool, encoder: ViT) -> Tensor:
    """A position embedding with or without a class token's row, for the encoder's grid and class token."""
    prefix, patches = embedding_1TD[:, : int(class_token)], embedding_1TD[:, int(class_token) :]
    side = isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ConversionError(f"pos_embed of {patches.shape[1]} patches is no square grid, so it cannot be resized to {encoder.grid}")
    if (side, side) != encoder.grid:
        patches = resize_positions(patches, (side, side), encoder.grid, prefix_tokens=0)
    if encoder.prefix_tokens and not class_token:
        prefix = encoder.pos_embed[:, :1].detach().cpu()
    return torch.cat([prefix[:, : encoder.prefix_tokens], patches], dim=1)
