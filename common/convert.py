"""Load checkpoints of official codes and of timm into our modules, with a report of loaded and missing tensors.

This project uses timm's names, so timm.create_model can load `encoder.state_dict()` directly. Other checkpoints may
differ in: a container around the tensors, prefixes of all names, the class token, the grid, names of the decoder, queries
separate from keys and values, LayerScale as `gamma_1`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint_file import ConversionError, few, read_mapping
from common.positions import resize_positions
from common.vit import SIZES, ViT

CONTAINERS = ("state_dict", "model", "model_state_dict", "module")  # keys under which official codes save the network
# Prefixes of DDP, torch.compile, FSDP, activation checkpointing and Fabric, at the beginning or inside of a name.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# The name of the patch embedding is used to find an encoder.
ANCHOR = "patch_embed.proj.weight"
# First parts of names that do not belong to an encoder: layers after its blocks, and additions of pre-training.
NO_PART = re.compile(
    r"(\w*_)?(decoder|heads?|predictor|classifier|criterion|loss)(_\w*)?$|mask\w*$|proj(ector|ection)\w*$"
    r"|(fc|fc_norm|pre_logits|attn_pool|logit_scale|logit_bias|n_averaged|queue|queue_ptr|center)$"
)
# First parts of names that belong to an encoder; a tensor with such a name outside the encoder's prefix is an error.
PART = re.compile(r"(blocks|layers|stages|patch_embed|(\w*_)?norm(_\w*)?|\w*_tokens?|\w*pos_embed|rel_pos\w*|rope\w*)$")
LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")
RELATIVE = re.compile(r"blocks\.\d+\.attn\.rel_pos\.relative_position_bias_table$")


class State(dict[str, Tensor]):
    """The tensors of a file by name; `notes` list removed prefixes and ignored parts."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path | str = "FILE.pth", notes: Sequence[str] = ()):
        super().__init__(tensors)
        self.path, self.notes = Path(path), tuple(notes)


@dataclass(frozen=True)
class Coverage:
    """Report of loading: names of loaded, missing (in the file), unexpected (not in the module) and reshaped tensors.

    `notes` list removed prefixes and intentionally ignored tensors. As text it has at most three names of each kind.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} tensors loaded, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        details = [f"{kind}: {few(getattr(self, kind))}" for kind in ("missing", "unexpected", "reshaped") if getattr(self, kind)]
        return "; ".join([counts, *details, *self.notes])


# ---- files


def read_checkpoint(path: Path | str, part: str = "") -> State:
    """Read the tensors of a .safetensors or torch file, from the containers of official codes, without common prefixes of all names.

    If a file has several networks (`encoder`, `predictor` and `target_encoder` of I-JEPA and StoP), names begin with the network's name.
    `part` selects only the tensors below a key or a prefix, such as "teacher". timm's state_dict_ema besides a state_dict is ignored.
    Nothing in the file is executed: objects other than tensors (numpy objects, paths, dates, options) are replaced by placeholders.
    Raises ConversionError for a file that cannot be read in this way, and for one with the same network twice, unless `part` selects one.
    """
    path = Path(path)
    content, arrays = read_mapping(path)
    notes: list[str] = []
    tensors = _unwrap(_flatten(content if part else _open_containers(content, path, notes)), notes)
    if not tensors:
        found = "numpy arrays instead of tensors: convert them by torch.from_numpy" if arrays else "no named tensors"
        raise ConversionError(f"{path} has {found}, at the top level or under {', '.join(map(repr, CONTAINERS[:2]))}")
    if part:
        below = re.compile(rf"(?:(?:{'|'.join(CONTAINERS)})\.)*?{re.escape(part)}\.")
        prefixes = {match[0] for name in tensors if (match := below.match(name))}
        if len(prefixes) != 1:
            tops = prefixes or {name.split(".")[0] for name in tensors}
            raise ConversionError(f"{path} has {len(prefixes)} networks below {part!r}; choose one of {few(tops)}")
        (prefix,) = prefixes
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        notes.append(f"{part!r} read")
    return State(_without_prefix(tensors, notes), path, notes)


def _flatten(content: Mapping) -> dict[str, Tensor]:
    """The tensors of nested mappings, with the outer keys as prefixes of their names; without those of optimizers."""
    found = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            found[key] = value
        elif isinstance(key, str) and isinstance(value, Mapping) and "param_groups" not in value:
            found |= {f"{key}.{name}": tensor for name, tensor in _flatten(value).items()}
    return found


def _open_containers(content: Mapping, path: Path, notes: list[str]) -> Mapping:
    """The content of the innermost container. Raises ConversionError if the same network is also next to a container."""

    def names(held: object) -> set[str]:
        return set(_without_prefix(rename(_flatten(held), {}), [])) if isinstance(held, Mapping) else set()

    while key := next((key for key in CONTAINERS if names(content.get(key))), None):
        own = names(content[key])
        others = [other for other in content if other != key and 2 * len(own & names(content[other])) > len(own)]
        if key == "state_dict" and others == ["state_dict_ema"]:  # from timm's CheckpointSaver; timm's validation also reads state_dict
            notes.append("state_dict read, state_dict_ema ignored")
        elif others:
            raise _which(path, [key, *others])
        content = content[key]
    return content


def _which(path: Path, parts: Sequence[str]) -> ConversionError:
    """The error for a file with several encoders: asks to choose one, with a command that extracts it."""
    named = [repr(part) if part else "one without a prefix" for part in parts]
    part = next(part for part in reversed(parts) if part)
    other = path.with_name(f"{path.stem}-{part.replace('.', '-')}.pth")
    code = f"import torch; from common.convert import read_checkpoint; torch.save(dict(read_checkpoint('{path}', '{part}')), '{other}')"
    listed = f"{', '.join(named[:-1])} and {named[-1]}"
    return ConversionError(f'{path} has {len(parts)} encoders, {listed}: choose one and extract it, for example by python -c "{code}"')


# ---- names


def rename(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Remove `module.`, `_orig_mod.` and the like, then replace the longest matching prefix of each name; other names are kept.

    Raises ConversionError if two tensors get the same name.
    """
    ordered = sorted(prefixes, key=len, reverse=True)
    renamed = {}
    for full, tensor in state.items():
        name = WRAPPERS.sub("", full)
        prefix = next((p for p in ordered if name.startswith(p)), None)
        name = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
        if name in renamed:
            raise ConversionError(f"two tensors would be called {name}, {full} is one of them: remove the network that is not needed")
        renamed[name] = tensor
    return renamed


def _unwrap(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Remove `module.`, `_orig_mod.` and the like from the names, with an entry in `notes`."""
    wrappers = dict.fromkeys(found[0] for name in state for found in WRAPPERS.finditer(name))
    notes += [f"prefix {' and '.join(map(repr, wrappers))} removed"] if wrappers else []
    return rename(state, {})


def _without_prefix(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Remove a prefix that all names have in common, such as `model.backbone.`, with an entry in `notes`."""
    taken, state = "", dict(state)
    while len(state) > 1 and len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        prefix = next(iter(state)).partition(".")[0] + "."
        taken, state = taken + prefix, {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    notes += [f"prefix {taken!r} removed"] if taken else []
    return state


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge `attn.q` (D rows) and `attn.kv` (2 D rows: keys, then values) of MaPeT's official code into one `attn.qkv`.

    For weights and biases; other tensors are kept. Raises ConversionError, with the name, if one of the two is missing.
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
        if q is None or kv is None or kv.shape != (2 * q.shape[0], *q.shape[1:]):
            fault = "is missing" if other is None else f"is {tuple(other.shape)}"
            raise ConversionError(f"{name} {tuple(tensor.shape)} needs {name_of_other}, which {fault}: use a complete checkpoint")
        fused[f"{stem}qkv{kind}"] = torch.cat([q, kv])
    return fused


# ---- modules


def load_encoder(
    encoder: nn.Module,
    state: Mapping[str, Tensor],
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = ("cls_token", "pos_embed"),
) -> Coverage:
    """Load an encoder with the names of timm, MAE, DropPos or MaPeT, or from a method of this project, with any prefix. For I-JEPA and
    StoP, load the target encoder, which their papers evaluate.

    The position embedding is resized to the encoder's grid. Decoders, heads and mask tokens are reported as unexpected.
    allow_missing: tensors of the encoder that may be missing in the file. allow_unused: tensors of the file's encoder that may be ignored
    if this encoder does not have them; by default the class token, with its position, and the position embedding.
    Raises ConversionError, and changes nothing, if a tensor of either encoder has no counterpart, another shape, a type that is not
    floating-point where this is needed, or values that are not finite, and if the file has several encoders.
    """
    notes, wanted = list(getattr(state, "notes", ())), encoder.state_dict()
    inside, outside, beside = _find_encoder(_unwrap(state, notes), getattr(state, "path", Path("FILE.pth")), notes)
    inside = fuse_qkv({re.sub(r"(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", name): tensor for name, tensor in inside.items()})
    found = {name: tensor for name, tensor in inside.items() if name in wanted}
    computed = {name for name, tensor in inside.items() if name not in wanted and _computes(encoder, name, tensor)}
    left = [name for name in inside if name not in wanted and name in allow_unused]
    extra = [name for name in inside if not (name in wanted or name in computed or name in left or NO_PART.match(name.split(".")[0]))]
    missing = [name for name in wanted if name not in found and name not in allow_missing]
    wrong = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    reshaped = ["pos_embed"] if "pos_embed" in wrong and _is_table(found["pos_embed"], encoder) else []
    wrong = [name for name in wrong if name not in reshaped]
    _check_architecture(encoder, inside, wanted, missing, [*extra, *beside], wrong)
    _check_values(found, wanted)
    if reshaped and isinstance(encoder, ViT):
        found["pos_embed"] = _fit_positions(found["pos_embed"].float(), "cls_token" in inside, encoder)
    if "cls_token" in left:
        notes.append("the file's class token is ignored, with its position")
    if "pos_embed" in left:
        notes.append("the file's position embedding is ignored")
    encoder.load_state_dict(found, strict=False)
    unexpected = [*outside, *(name for name in inside if name not in wanted and name not in computed)]
    absent = sorted(name for name in wanted if name not in found)
    return Coverage(tuple(sorted(found)), tuple(absent), tuple(sorted(unexpected)), tuple(reshaped), tuple(notes))


def load_method(method: nn.Module, state: Mapping[str, Tensor], prefixes: Mapping[str, str], unused: Sequence[str] = ()) -> Coverage:
    """Load a whole method from a checkpoint with its official names; tensors in `unused` are known to have no effect and are ignored.

    `prefixes` apply to names after fuse_qkv. Tensors that the method computes itself, such as the masks of Swin's windows, are compared.
    Raises ConversionError, and changes nothing, unless all other tensors have a counterpart, with finite values.
    """
    notes, wanted = list(getattr(state, "notes", ())), method.state_dict()

    def own(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(fuse_qkv({name: tensor for name, tensor in names.items() if name not in unused}), prefixes)

    unwrapped = _unwrap(state, notes)
    ours = own(unwrapped)
    if not any(name in wanted for name in ours):
        ours = own(_without_prefix(unwrapped, notes))
    ours = {name: tensor for name, tensor in ours.items() if name in wanted or not _computes(method, name, tensor)}
    loaded, unexpected = sorted(ours.keys() & wanted.keys()), sorted(ours.keys() - wanted.keys())
    # torch before 0.4.1 did not have these counters, and they are not used here
    missing = sorted(name for name in wanted if name not in ours and not name.endswith("num_batches_tracked"))
    coverage = Coverage(tuple(loaded), tuple(missing), tuple(unexpected), notes=tuple(notes))
    wrong = [name for name in loaded if ours[name].shape != wanted[name].shape]
    if missing or unexpected or wrong:
        causes = [f"{file} {stem} in the file, {here} here" for stem, (file, here) in _depths(ours, wanted).items()]
        if masks := [name for name in unexpected if name.endswith("attn_mask")]:
            causes.append(f"{few(masks)}: not the shift masks of this window and image size")
        shapes = [f"other shapes: {few(wrong)}"] if wrong else []
        raise ConversionError(
            f"the checkpoint is of another method or another configuration ({'; '.join([*causes, str(coverage), *shapes])})"
        )
    _check_values(ours, wanted)
    method.load_state_dict(ours, strict=False)
    return coverage


def _find_encoder(state: Mapping[str, Tensor], path: Path, notes: list[str]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The encoder's tensors without prefix (added to `notes`); other names; and those of them that look like parts of the encoder.

    Raises ConversionError for several encoders, except for I-JEPA and StoP, where the target encoder is taken.
    """
    stems = [name.removesuffix(ANCHOR) for name in state if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    stems = [stem for stem in stems if not any(NO_PART.match(word) for word in stem.split(".") if word)]
    released = any(name.startswith("predictor.predictor_") for name in state)
    if released and "target_encoder." not in stems:
        raise ConversionError("this checkpoint of I-JEPA or StoP has no target_encoder, which is needed for evaluation; use a complete one")
    if released:
        stems = ["target_encoder."]
        state = {name: tensor for name, tensor in state.items() if name.startswith("target_encoder.")}
    if set(stems) == {"context_encoder.", "target_encoder."}:  # this project's StoP
        stems = ["target_encoder."]
    if len(stems) > 1:
        raise _which(path, [stem.removesuffix(".") for stem in stems])
    prefix = stems[0] if stems else "encoder." if any(name.startswith("encoder.") for name in state) else ""
    notes += [f"prefix {prefix!r} removed"] if prefix else []
    outside = [name for name in state if not name.startswith(prefix)]
    parents = [prefix[: match.start()] for match in re.finditer(r"(?<![^.])\w", prefix)][::-1]  # for "a.b.c.": "a.b.", "a.", ""
    words = {name: name.removeprefix(next(p for p in parents if name.startswith(p))).split(".")[0] for name in outside}
    beside = [name for name, word in words.items() if PART.match(word) and not NO_PART.match(word)]
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}, outside, beside


def _computes(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the module has an equal tensor of this name that is not in its state dict, because the architecture determines it."""
    owner, _, leaf = name.rpartition(".")
    try:
        own = getattr(module.get_submodule(owner), leaf, None)
    except AttributeError:
        return False
    return isinstance(own, Tensor) and own.shape == tensor.shape and torch.equal(own.to(tensor), tensor)


def _check_values(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ConversionError for tensors of another kind than in the module, and for values that are not finite in the module's dtype."""
    for name, tensor in found.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        if not dense or tensor.is_complex() or tensor.is_floating_point() != wanted[name].is_floating_point():
            form = kind if dense else "without values (meta)" if tensor.is_meta else f"{kind}, quantised or sparse"
            own = str(wanted[name].dtype).removeprefix("torch.")
            raise ConversionError(f"{name} is {form} in the file and {own} here: use a checkpoint with plain floating-point weights")
    spoiled = [name for name, tensor in found.items() if not tensor.to(wanted[name].dtype).isfinite().all()]
    if spoiled:
        raise ConversionError(f"{len(spoiled)} of {len(found)} tensors are not finite: {few(spoiled)}; use an earlier checkpoint")


def _check_architecture(
    encoder: nn.Module,
    file: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    missing: Sequence[str],
    extra: Sequence[str],
    wrong: Sequence[str],
) -> None:
    """Raise ConversionError if the encoder in the file has another architecture, with the differences and the --set options that fit.

    `missing` names are only in the encoder, `extra` names are only in the file, and `wrong` names have other shapes in the file.
    """
    if missing and not any(name in wanted for name in file):
        raise ConversionError(f"the file has none of the encoder's {len(wanted)} names, but {len(file)} others: {few(file)}")
    causes: list[str] = []
    fits, settings, explained = True, dict[str, Any](), set[str]()

    def differ(cause: str, change: Mapping[str, Any] | None, names: Iterable[str] = ()) -> None:
        nonlocal fits
        causes.append(cause)
        fits = fits and change is not None
        settings.update(change or {})
        explained.update(names)

    if ANCHOR in wrong and file[ANCHOR].ndim == wanted[ANCHOR].ndim == 4:
        (width, channels, *patch), (own_width, own_channels, *own_patch) = file[ANCHOR].shape, wanted[ANCHOR].shape
        if width != own_width:
            size = next((name for name, (known, *_) in SIZES.items() if known == width), None)
            differ(f"width {width} in the file, {own_width} here", {"size": size} if size else None, wrong)
            depth = 1 + max((int(found[1]) for name in file if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
            if size and SIZES[size][1] != depth:
                settings["encoder.depth"] = depth
        if channels != own_channels:
            differ(f"{ANCHOR} for {channels} channels in the file, {own_channels} here", None, [ANCHOR])
        if patch != own_patch:
            sides = {"patch_size": patch[0]}
            if isinstance(encoder, ViT) and any(side % patch[0] for side in encoder.image_size):
                sides["image_size"] = patch[0] * max(1, encoder.image_size[0] // patch[0])
            differ(f"patches of {patch[0]} x {patch[1]} pixels in the file, {own_patch[0]} x {own_patch[1]} here", sides, [ANCHOR])
    for stem, (there, here) in _depths(file, wanted).items():
        change = {} if "size" in settings else {"encoder.depth": there} if stem == "blocks" else None
        block = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
        beyond = [name for name in (*missing, *extra) if (found := block.match(name)) and int(found[1]) >= min(there, here)]
        if beyond:
            differ(f"{there} {stem} in the file, {here} here", change, beyond)
    if names := [name for name in extra if LAYER_SCALE.match(name)]:
        differ("LayerScale in the file, none here", {"encoder.layer_scale": 0.1}, names)
    if names := [name for name in missing if LAYER_SCALE.match(name)]:
        differ("no LayerScale in the file, but here", {"encoder.layer_scale": "null"}, names)
    ratio = [name for name in wrong if name.endswith("mlp.fc1.bias") and name not in explained]
    if ratio:
        there, here = (len(state[ratio[0]]) for state in (file, wanted))
        width = file[ANCHOR].shape[0] if ANCHOR in file else here
        hidden = [name for name in wrong if ".mlp.fc" in name]
        differ(f"MLPs of {there} in the file, {here} here", {"encoder.mlp_ratio": f"{there / width:g}"}, hidden)
    if "cls_token" in missing:
        differ("no class token in the file, one here", {"encoder.class_token": "false"})
    tables = [name for name in file if RELATIVE.match(name)]
    if any(name in extra for name in tables):
        differ("relative positions in the file, none here", {"encoder.position": "relative"}, [*tables, "pos_embed"])
    elif "pos_embed" in file and "pos_embed" not in wanted and ("pos_embed" in extra or any(RELATIVE.match(name) for name in missing)):
        tables = [name for name in missing if RELATIVE.match(name)]
        differ("a position embedding in the file, none here", {"encoder.position": "learned"}, [*tables, "pos_embed"])
    elif "pos_embed" in missing:
        differ("no position embedding in the file, one here", {"encoder.position": "none"})
    if "norm.weight" in missing and "fc_norm.weight" in file:
        differ("the last norm after pooling (fc_norm) in the file, before it here: use the checkpoint before fine-tuning", None)
    missing, extra, wrong = ([name for name in names if name not in explained] for names in (missing, extra, wrong))
    if not (causes or missing or extra or wrong):
        return
    causes += [f"{few([f'{n}: {tuple(file[n].shape)} in the file, {tuple(wanted[n].shape)} here' for n in wrong])}"] if wrong else []
    details = [f"{len(missing)} missing of {len(wanted)}; missing: {few(missing)}"] if missing else []
    details += [f"{len(extra)} in the file but not here: {few(extra)}"] if extra else []
    wholly = fits and settings and not extra and not wrong and isinstance(encoder, ViT)
    hint = [" ".join(f"--set {name}={value}" for name, value in settings.items()) + " would fit"] if wholly else []
    begin = "the checkpoint has another architecture" if causes else "the checkpoint does not cover the encoder"
    raise ConversionError(f"{begin}: {'; '.join([*causes, *hint, *details])}")


def _depths(file: Iterable[str], module: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The number of blocks in the file and in the module, for each sequence where it differs, such as "blocks" or "layers.2.blocks"."""

    def count(names: Iterable[str]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name in names:
            if found := re.match(r"(.*(?<![^.])(?:\w*blocks|layers))\.(\d+)\.(?=\D)", name):
                counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
        return counts

    there, here = count(file), count(module)
    return {stem: (there[stem], here[stem]) for stem in here if stem in there and there[stem] != here[stem]}


def _is_table(embedding: Tensor, encoder: nn.Module) -> bool:
    """Whether this is a position embedding for the encoder with another grid, or with or without a class token."""
    return isinstance(encoder, ViT) and embedding.ndim == 3 and embedding.shape[::2] == (1, encoder.width)


def _fit_positions(embedding_1TD: Tensor, class_token: bool, encoder: ViT) -> Tensor:
    """Adapt a position embedding, with or without the row of a class token, to the encoder's grid and class token."""
    if class_token and embedding_1TD.shape[1] == encoder.grid[0] * encoder.grid[1]:  # a class token without a position, as in DeiT III
        embedding_1TD = torch.cat([torch.zeros_like(embedding_1TD[:, :1]), embedding_1TD], dim=1)
    prefix, patches = embedding_1TD[:, : int(class_token)], embedding_1TD[:, int(class_token) :]
    side = isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ConversionError(f"pos_embed of {patches.shape[1]} patches is not a square grid, so it cannot be resized to {encoder.grid}")
    if (side, side) != encoder.grid:
        patches = resize_positions(patches, (side, side), encoder.grid, prefix_tokens=0)
    if encoder.prefix_tokens and not class_token and encoder.pos_embed is not None:
        prefix = encoder.pos_embed[:, :1].detach().cpu()
    return torch.cat([prefix[:, : encoder.prefix_tokens], patches], dim=1)
