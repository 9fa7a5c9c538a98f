"""Checkpoints of official codes and of timm to modules here, with a report of what was covered.

timm's names are this project's names, so `encoder.state_dict()` goes into timm.create_model as it is. What differs
elsewhere: a container around the tensors, prefixes before every name, a class token or none, another grid, a decoder's names, queries
apart from keys and values, LayerScale as `gamma_1`.
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
# What DDP, torch.compile, FSDP, activation checkpointing and Fabric put before a name, at its beginning or within.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# An encoder stands where its patch embedding does.
ANCHOR = "patch_embed.proj.weight"
# What is known to be no part of an encoder, by the first part of a name: what follows its blocks, and what pre-training adds.
NO_PART = re.compile(
    r"(\w*_)?(decoder|heads?|predictor|classifier|criterion|loss)(_\w*)?$|mask\w*$|proj(ector|ection)\w*$"
    r"|(fc|fc_norm|pre_logits|attn_pool|logit_scale|logit_bias|n_averaged|queue|queue_ptr|center)$"
)
# What is known to be a part of one, where it stands beside the encoder's own prefix.
PART = re.compile(r"(blocks|layers|stages|patch_embed|(\w*_)?norm(_\w*)?|\w*_tokens?|\w*pos_embed|rel_pos\w*|rope\w*)$")
LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")
RELATIVE = re.compile(r"blocks\.\d+\.attn\.rel_pos\.relative_position_bias_table$")


class State(dict[str, Tensor]):
    """The tensors of a file by name; `notes` say what reading it took off or left out."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path | str = "FILE.pth", notes: Sequence[str] = ()):
        super().__init__(tensors)
        self.path, self.notes = Path(path), tuple(notes)


@dataclass(frozen=True)
class Coverage:
    """What loading did: names of tensors loaded, missing (of the module), unexpected (of the file), reshaped on the way.

    `notes` say which prefixes were taken off, and what was left out on purpose. As text it names at most three of a kind.
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
    """The tensors of a .safetensors or torch file, out of the containers that official codes use, without prefixes of every name.

    Where a file holds several networks (`encoder`, `predictor` and `target_encoder`, of I-JEPA and StoP) their names come first.
    `part` takes those below a key or a prefix alone, such as "teacher". Beside a state_dict timm's state_dict_ema is left out.
    Nothing in the file is executed: of objects that are no tensors (numpy's, paths, dates, options) only that they are there is read.
    Raises ConversionError for a file that cannot be read so, and for one that holds the same network twice, unless `part` says which.
    """
    path = Path(path)
    content, arrays = read_mapping(path)
    notes: list[str] = []
    tensors = _unwrap(_flatten(content if part else _open_containers(content, path, notes)), notes)
    if not tensors:
        found = "numpy arrays in the place of tensors: save them by torch.from_numpy" if arrays else "no tensors by name"
        raise ConversionError(f"{path} holds {found}, at its top or under {', '.join(map(repr, CONTAINERS[:2]))}")
    if part:
        below = re.compile(rf"(?:(?:{'|'.join(CONTAINERS)})\.)*?{re.escape(part)}\.")
        prefixes = {found[0] for name in tensors if (found := below.match(name))}
        if len(prefixes) != 1:
            tops = prefixes or {name.split(".")[0] for name in tensors}
            raise ConversionError(f"{path} holds {len(prefixes)} networks below {part!r}; choose among {few(tops)}")
        (prefix,) = prefixes
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        notes.append(f"{part!r} read")
    return State(_without_prefix(tensors, notes), path, notes)


def _flatten(content: Mapping) -> dict[str, Tensor]:
    """The tensors of nested mappings by their names behind the keys that lead to them; not those of optimizers."""
    found = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            found[key] = value
        elif isinstance(key, str) and isinstance(value, Mapping) and "param_groups" not in value:
            found |= {f"{key}.{name}": tensor for name, tensor in _flatten(value).items()}
    return found


def _open_containers(content: Mapping, path: Path, notes: list[str]) -> Mapping:
    """What is in the innermost container. Raises ConversionError where the same network stands beside one on the way."""

    def names(held: object) -> set[str]:
        return set(_without_prefix(rename(_flatten(held), {}), [])) if isinstance(held, Mapping) else set()

    while key := next((key for key in CONTAINERS if names(content.get(key))), None):
        own = names(content[key])
        others = [other for other in content if other != key and 2 * len(own & names(content[other])) > len(own)]
        if key == "state_dict" and others == ["state_dict_ema"]:  # of timm's CheckpointSaver, whose own validation reads state_dict
            notes.append("state_dict read, state_dict_ema not")
        elif others:
            raise _which(path, [key, *others])
        content = content[key]
    return content


def _which(path: Path, parts: Sequence[str]) -> ConversionError:
    """For a file with several encoders: the question which, and how to take one out."""
    named = [repr(part) if part else "one without a prefix" for part in parts]
    part = next(part for part in reversed(parts) if part)
    other = path.with_name(f"{path.stem}-{part.replace('.', '-')}.pth")
    code = f"import torch; from common.convert import read_checkpoint; torch.save(dict(read_checkpoint('{path}', '{part}')), '{other}')"
    listed = f"{', '.join(named[:-1])} and {named[-1]}"
    return ConversionError(f'{path} holds {len(parts)} encoders, {listed}: which of them? Take one out, such as by python -c "{code}"')


# ---- names


def rename(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the longest matching prefix of each name, after `module.`, `_orig_mod.` and the like are taken off; others stay.

    Raises ConversionError where two tensors come to the same name.
    """
    ordered = sorted(prefixes, key=len, reverse=True)
    renamed = {}
    for full, tensor in state.items():
        name = WRAPPERS.sub("", full)
        prefix = next((p for p in ordered if name.startswith(p)), None)
        name = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
        if name in renamed:
            raise ConversionError(f"two tensors would be called {name}, {full} is one of them: take the network that is not meant out")
        renamed[name] = tensor
    return renamed


def _unwrap(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors without `module.`, `_orig_mod.` and the like in their names, which is noted."""
    wrappers = dict.fromkeys(found[0] for name in state for found in WRAPPERS.finditer(name))
    notes += [f"prefix {' and '.join(map(repr, wrappers))} taken off"] if wrappers else []
    return rename(state, {})


def _without_prefix(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors without what stands before every name, such as `model.backbone.`, which is noted."""
    taken, state = "", dict(state)
    while len(state) > 1 and len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        prefix = next(iter(state)).partition(".")[0] + "."
        taken, state = taken + prefix, {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    notes += [f"prefix {taken!r} taken off"] if taken else []
    return state


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


# ---- modules


def load_encoder(
    encoder: ViT,
    state: Mapping[str, Tensor],
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = ("cls_token", "pos_embed"),
) -> Coverage:
    """Load an encoder from names of timm, MAE, DropPos or MaPeT, or from a method of this project, whatever prefix they have. Of I-JEPA
    and StoP it is the target encoder, which their papers evaluate.

    The position embedding is resized to the encoder's grid. Decoders, heads and mask tokens are reported as unexpected.
    allow_missing: tensors of the encoder that the file need not have. allow_unused: tensors of the file's encoder that are left out where
    this one has no place for them; by default a class token, with its position, and the position embedding of an encoder without one.
    Raises ConversionError, and changes nothing, where a tensor of either encoder has no counterpart, another shape, a type that is no
    floating-point number where one is wanted, or values that are not finite, and where the file holds several encoders.
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
    if reshaped:
        found["pos_embed"] = _fit_positions(found["pos_embed"].float(), "cls_token" in inside, encoder)
    if "cls_token" in left:
        notes.append("the file's class token is left out, with its position")
    if "pos_embed" in left:
        notes.append("the file's position embedding is left out")
    encoder.load_state_dict(found, strict=False)
    unexpected = [*outside, *(name for name in inside if name not in wanted and name not in computed)]
    absent = sorted(name for name in wanted if name not in found)
    return Coverage(tuple(sorted(found)), tuple(absent), tuple(sorted(unexpected)), tuple(reshaped), tuple(notes))


def load_method(method: nn.Module, state: Mapping[str, Tensor], prefixes: Mapping[str, str], unused: Sequence[str] = ()) -> Coverage:
    """Load a whole method from its official names, of which those in `unused` are known to mean nothing.

    `prefixes` are of names after fuse_qkv. Tensors that the method computes itself, such as the masks of Swin's windows, are compared.
    Raises ConversionError, and changes nothing, unless every other tensor finds its place, with finite values.
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
    # torch before 0.4.1 had no such counters, and nothing here reads them
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
    """The encoder's tensors without prefix, which is noted; names of other networks; and those of them that look like the encoder's.

    Raises ConversionError for several encoders, but for those of I-JEPA and StoP, of which it is the target encoder.
    """
    stems = [name.removesuffix(ANCHOR) for name in state if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    stems = [stem for stem in stems if not any(NO_PART.match(word) for word in stem.split(".") if word)]
    released = any(name.startswith("predictor.predictor_") for name in state)
    if released and "target_encoder." not in stems:
        raise ConversionError("this is a checkpoint of I-JEPA or StoP without a target_encoder, by which they are judged; take a whole one")
    if released:
        stems = ["target_encoder."]
        state = {name: tensor for name, tensor in state.items() if name.startswith("target_encoder.")}
    if set(stems) == {"context_encoder.", "target_encoder."}:  # this project's StoP
        stems = ["target_encoder."]
    if len(stems) > 1:
        raise _which(path, [stem.removesuffix(".") for stem in stems])
    prefix = stems[0] if stems else "encoder." if any(name.startswith("encoder.") for name in state) else ""
    notes += [f"prefix {prefix!r} taken off"] if prefix else []
    outside = [name for name in state if not name.startswith(prefix)]
    parents = [prefix[: match.start()] for match in re.finditer(r"(?<![^.])\w", prefix)][::-1]  # of "a.b.c.": "a.b.", "a.", ""
    words = {name: name.removeprefix(next(p for p in parents if name.startswith(p))).split(".")[0] for name in outside}
    beside = [name for name, word in words.items() if PART.match(word) and not NO_PART.match(word)]
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}, outside, beside


def _computes(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the module has the same tensor of that name without keeping it in its state: a function of its architecture."""
    owner, _, leaf = name.rpartition(".")
    try:
        own = getattr(module.get_submodule(owner), leaf, None)
    except AttributeError:
        return False
    return isinstance(own, Tensor) and own.shape == tensor.shape and torch.equal(own.to(tensor), tensor)


def _check_values(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ConversionError for tensors of another kind than the module's, and for values that are not finite in the module's type."""
    for name, tensor in found.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        if not dense or tensor.is_complex() or tensor.is_floating_point() != wanted[name].is_floating_point():
            form = kind if dense else "without values (meta)" if tensor.is_meta else f"{kind}, quantised or sparse"
            own = str(wanted[name].dtype).removeprefix("torch.")
            raise ConversionError(f"{name} is {form} in the file and {own} here: take a checkpoint with plain floating-point weights")
    spoiled = [name for name, tensor in found.items() if not tensor.to(wanted[name].dtype).isfinite().all()]
    if spoiled:
        raise ConversionError(f"{len(spoiled)} of {len(found)} tensors are not finite: {few(spoiled)}; take an earlier checkpoint")


def _check_architecture(
    encoder: nn.Module,
    file: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    missing: Sequence[str],
    extra: Sequence[str],
    wrong: Sequence[str],
) -> None:
    """Raise ConversionError where the encoder in the file is another one: how it differs, and the --set by which it would fit.

    Of the encoder's names `missing` are not in the file, `extra` are in the file alone, and `wrong` have other shapes there.
    """
    if missing and not any(name in wanted for name in file):
        raise ConversionError(f"the file has none of the encoder's {len(wanted)} names, but {len(file)} others: {few(file)}")
    causes: list[str] = []
    fits, settings, explained = True, {}, set()

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
        differ("the last norm after pooling (fc_norm) in the file, before it here: take the checkpoint before fine-tuning", None)
    missing, extra, wrong = ([name for name in names if name not in explained] for names in (missing, extra, wrong))
    if not (causes or missing or extra or wrong):
        return
    causes += [f"{few([f'{n}: {tuple(file[n].shape)} in the file, {tuple(wanted[n].shape)} here' for n in wrong])}"] if wrong else []
    details = [f"{len(missing)} missing of {len(wanted)}; missing: {few(missing)}"] if missing else []
    details += [f"{len(extra)} in the file without a place here: {few(extra)}"] if extra else []
    wholly = fits and settings and not extra and not wrong and isinstance(encoder, ViT)
    hint = [" ".join(f"--set {name}={value}" for name, value in settings.items()) + " would fit"] if wholly else []
    begin = "the checkpoint is of another architecture" if causes else "the checkpoint does not cover the encoder"
    raise ConversionError(f"{begin}: {'; '.join([*causes, *hint, *details])}")


def _depths(file: Iterable[str], module: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of each row of blocks whose number differs, such as "blocks" or "layers.2.blocks", how many the file and the module have."""

    def count(names: Iterable[str]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name in names:
            if found := re.match(r"(.*(?<![^.])(?:\w*blocks|layers))\.(\d+)\.(?=\D)", name):
                counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
        return counts

    there, here = count(file), count(module)
    return {stem: (there[stem], here[stem]) for stem in here if stem in there and there[stem] != here[stem]}


def _is_table(embedding: Tensor, encoder: nn.Module) -> bool:
    """Whether this is a position embedding for the encoder on another grid, or with a class token more or less."""
    return isinstance(encoder, ViT) and embedding.ndim == 3 and embedding.shape[::2] == (1, encoder.width)


def _fit_positions(embedding_1TD: Tensor, class_token: bool, encoder: ViT) -> Tensor:
    """A position embedding with or without a class token's row, for the encoder's grid and class token."""
    if class_token and embedding_1TD.shape[1] == encoder.grid[0] * encoder.grid[1]:  # a class token without a position, as DeiT III's
        embedding_1TD = torch.cat([torch.zeros_like(embedding_1TD[:, :1]), embedding_1TD], dim=1)
    prefix, patches = embedding_1TD[:, : int(class_token)], embedding_1TD[:, int(class_token) :]
    side = isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ConversionError(f"pos_embed of {patches.shape[1]} patches is no square grid, so it cannot be resized to {encoder.grid}")
    if (side, side) != encoder.grid:
        patches = resize_positions(patches, (side, side), encoder.grid, prefix_tokens=0)
    if encoder.prefix_tokens and not class_token:
        prefix = encoder.pos_embed[:, :1].detach().cpu()
    return torch.cat([prefix[:, : encoder.prefix_tokens], patches], dim=1)
