"""Export the encoder of a run as a model of timm or of transformers, with a model card: `python -m common.export RUN --to timm DIR`.

RUN is the folder of a run, such as runs/droppos/digits-200ep-seed0. DIR gets model.safetensors, config.json, recipe.json (all settings) and
README.md (see common/card.py). The files are loaded again and must give the tokens of our encoder. A run that is not finished is exported
as of its last checkpoint, and the card says so.

timm holds every encoder of this project, except a backbone that a method has changed. transformers holds a ViT with a class token and
positions that are added to the tokens as ViTModel; the others are in timm's format, which its TimmWrapperModel reads.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.card import model_card
from common.convert import ConversionError, State, load_encoder, load_method, read_checkpoint
from common.evaluate import as_encoder
from common.files import partial, replacing
from common.recipe import Recipe, RecipeError, TrainConfig
from common.vit import ViT

TOLERANCE = 1e-5  # largest difference between tokens of the exported model and ours, in units of the largest (or of 1)
# A recipe may name a class of timm, for a model of another size. timm loads models by name, and these take any size; NesT's do not.
ARCHITECTURES = {"VisionTransformer": "vit_base_patch16_224", "SwinTransformer": "swin_base_patch4_window7_224"}
INSTALL = "pip install -e '.[export]'"


class ExportError(ValueError):
    """A folder that is no run, or an encoder that the target cannot hold. The message says what to do instead."""


@dataclass(frozen=True)
class Trained:
    """The encoder of a run, as a module of this project, with the settings and the card.json of its pre-training."""

    run: Path
    settings: dict[str, Any]
    card: dict[str, Any]
    state: State
    encoder: Any  # a ViT, or a timm backbone without classifier

    @property
    def pool(self) -> str:
        """How the evaluations read a ViT: "class" (the class token) or "mean" (of the patch tokens), both after the final norm."""
        return self.card["pool"] if self.encoder.cls_token is not None else "mean"


def export(run: Path, target: str, out: Path) -> str:
    """Export the encoder of a run to the new folder `out`; return the name of the class that loads it.

    target: "timm" or "transformers". Raises ExportError for a folder that is no run, an encoder that the target cannot hold, a target that
    is not installed, and an `out` that is not empty. Then nothing is written.
    """
    if target == "transformers" and find_spec("transformers") is None:
        raise ExportError(f"transformers is not installed: {INSTALL}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is not an empty folder: name a new one")
    trained = open_run(run)
    config, state, kind, load = _transformers(trained) if target == "transformers" else _timm(trained)
    draft = partial(out)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (draft / "recipe.json").write_text(json.dumps(trained.settings, indent=1) + "\n")
        (draft / "README.md").write_text(model_card(run, trained.settings, trained.card, kind, reading(trained)), encoding="utf-8")
        with replacing(draft / "model.safetensors") as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        _compare(trained, load(draft), kind)
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return kind


def open_run(run: Path) -> Trained:
    """Read a run and load its encoder.

    Raises ExportError for a folder that is no run, a backbone that the method has changed, and a class that timm has no name for.
    """
    folder = run / "pretrain"
    fixes = {
        "recipe.json": "give the folder of a run, such as runs/droppos/digits-200ep-seed0",
        "encoder.safetensors": "wait for the first checkpoint of the run",
        "card.json": "repeat the command that made the run; it writes this file, and a finished training is not run again",
    }
    for name, fix in fixes.items():
        if not (folder / name).exists():
            raise ExportError(f"{folder / name} does not exist: {fix}")
    settings, card = (json.loads((folder / name).read_text()) for name in ("recipe.json", "card.json"))
    sizes = {name: settings["recipe"][name] for name in ("size", "image_size", "patch_size", "encoder")}
    recipe = Recipe(pretrain=TrainConfig(epochs=1, batch_size=1, base_lr=0.0), protocols=(), **sizes)
    state = read_checkpoint(folder / "encoder.safetensors")
    encoder = recipe.build_encoder(card["channels"])
    if isinstance(encoder, ViT):
        load_encoder(encoder, state, allow_unused=())
        return Trained(run, settings, card, state, encoder.eval())
    try:
        load_method(encoder, state, {}, unused=[name for name in state if _in_classifier(name, sizes["size"])])
    except ConversionError as error:
        raise ExportError(
            f"neither timm nor transformers has this encoder, because the method has changed timm's {sizes['size']} ({error}): "
            f"use {folder / 'encoder.safetensors'} with the code of {settings['paper']}, as its README shows"
        ) from error
    return Trained(run, settings, card, state, encoder.eval())


def reading(trained: Trained) -> str:
    """Sentences for the card: how the evaluations get one feature per image from the tokens, and what the encoder lacks."""
    encoder = trained.encoder
    if not isinstance(encoder, ViT):
        return "The method's own accuracy is that of the classifier, which `timm.create_model` loads too."
    patches = "the mean of the patch tokens" + ", without the class token," * encoder.prefix_tokens
    text = f"The evaluations read {'the class token' if trained.pool == 'class' else patches} after the final norm."
    none = encoder.pos_embed is None and not encoder.relative
    return text + " The encoder has no position embedding (ViTModel gets a table of zeros)." * none


def _compare(trained: Trained, exported: nn.Module, kind: str) -> None:
    """Raise ExportError unless the exported model, loaded from its files, gives the tokens of our encoder for two random images."""
    size = trained.encoder.image_size
    images = torch.randn(2, trained.card["channels"], *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (as_encoder(module, images.shape[1], size).eval()(images) for module in (trained.encoder, exported))
    error = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1) if ours.shape == theirs.shape else torch.inf
    if not error <= TOLERANCE:
        raise ExportError(
            f"{kind} does not give the tokens of the encoder (difference {error:.2g}), so nothing was written: please report this"
        )


# ---- timm

Target = tuple[dict[str, Any], dict[str, Tensor], str, Callable[[Path], nn.Module]]  # config.json, tensors, class, how to load


def _timm(trained: Trained) -> Target:
    return timm_config(trained), dict(trained.state), "timm.create_model", _load_timm


def _load_timm(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def timm_config(trained: Trained) -> dict[str, Any]:
    """The config.json of a folder that timm loads: `architecture`, `model_args` and, for the images, `pretrained_cfg`.

    Raises ExportError for a class of timm that is not in ARCHITECTURES.
    """
    recipe, card, encoder = trained.settings["recipe"], trained.card, trained.encoder
    height, width = encoder.image_size
    classes = 0
    if isinstance(encoder, ViT):
        architecture, arguments = _vit_arguments(encoder)
        # the final norm comes before the pooling, as in our evaluations
        arguments |= {"global_pool": "token" if trained.pool == "class" else "avg", "fc_norm": False}
    else:
        architecture = _architecture(recipe["size"])[0]
        classes = next((len(tensor) for name, tensor in trained.state.items() if _in_classifier(name, recipe["size"])), 0)
        arguments = {"patch_size": recipe["patch_size"]} if recipe["patch_size"] else {}
        arguments |= {name: value for name, value in recipe["encoder"].items() if name != "drop_path_rate"}  # drops nothing when it is used
    known = _architecture(architecture)[1]
    arguments |= {"in_chans": card["channels"]} | ({"img_size": [height, width]} if known.fixed_input_size else {})
    view = {"input_size": [card["channels"], height, width], "mean": card["mean"], "std": card["std"], "crop_mode": "center"}
    view |= {"interpolation": card["interpolation"], "crop_pct": height / card["resize"][0], "fixed_input_size": known.fixed_input_size}
    view |= {"num_classes": classes, "first_conv": known.first_conv, "classifier": known.classifier}
    return {"architecture": architecture, "num_classes": classes, "model_args": arguments, "pretrained_cfg": view}


def _architecture(size: str) -> tuple[str, Any]:
    """The name by which timm builds a model of a recipe's size, and timm's default settings of that name."""
    name = ARCHITECTURES.get(size, size)
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        raise ExportError(f"timm has no name for models of the class {size}: train with --set size= and a name of timm")
    return name, known


def _in_classifier(name: str, size: str) -> bool:
    """Whether a tensor belongs to the classifier of a timm model; a distilled one has two."""
    parts = _architecture(size)[1].classifier or ()
    return name.startswith(tuple(f"{part}." for part in ((parts,) if isinstance(parts, str) else parts)))


def _vit_arguments(encoder: ViT) -> tuple[str, dict[str, Any]]:
    """The architecture and the arguments by which timm builds one of our ViTs."""
    block: Any = encoder.blocks[0]
    arguments = {
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.width,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.width,
        "class_token": encoder.cls_token is not None,
        "init_values": 1.0 if _layer_scale(encoder) else 0.0,  # of LayerScale, replaced by the trained values; 0: none
    }
    if encoder.relative:
        return "vit_relpos_base_patch16_224", arguments | {"rel_pos_type": "bias", "qkv_bias": True}
    return "vit_base_patch16_224", arguments | ({"pos_embed": "none"} if encoder.pos_embed is None else {})


def _layer_scale(encoder: ViT) -> bool:
    return "ls1.gamma" in encoder.blocks[0].state_dict()


# ---- transformers


def _transformers(trained: Trained) -> Target:
    encoder = trained.encoder
    if not isinstance(encoder, ViT) or encoder.cls_token is None or encoder.relative or _layer_scale(encoder):
        return timm_config(trained), dict(trained.state), "transformers.TimmWrapperModel", _load_wrapper
    block: Any = encoder.blocks[0]
    config: dict[str, Any] = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": encoder.image_size[0],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": encoder.norm.eps,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return config, vit_state(encoder), "transformers.ViTModel", _load_vit


# Names of a block, ours and those in the files of ViTModel, which all versions of transformers read.
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def vit_state(encoder: ViT) -> dict[str, Tensor]:
    """The tensors of a ViT with a class token, under the names of ViTModel. Without position embedding, the table is zero."""
    state = encoder.state_dict()
    tokens = 1 + encoder.grid[0] * encoder.grid[1]
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state.get("pos_embed", torch.zeros(1, tokens, encoder.width)),
    }
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        found[f"layernorm.{kind}"] = state[f"norm.{kind}"]
        for number in range(len(encoder.blocks)):
            ours, theirs = f"blocks.{number}.", f"encoder.layer.{number}."
            found |= {f"{theirs}{name}.{kind}": state[f"{ours}{part}.{kind}"] for part, name in BLOCK.items()}
            parts = zip(("query", "key", "value"), state[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True)
            found |= {f"{theirs}attention.attention.{name}.{kind}": part.contiguous() for name, part in parts}
    return found


class _Tokens(nn.Module):
    """A model of transformers as a module from images (B, C, H, W) to its last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).last_hidden_state


def _load_vit(folder: Path) -> nn.Module:
    from transformers import ViTModel  # imported here, because it is an optional dependency

    return _Tokens(ViTModel.from_pretrained(folder, add_pooling_layer=False))


def _load_wrapper(folder: Path) -> nn.Module:
    from transformers import TimmWrapperModel

    return TimmWrapperModel.from_pretrained(folder).timm_model


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m common.export", description="Export the encoder of a run with a model card.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/droppos/digits-200ep-seed0")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--to", required=True, choices=("timm", "transformers"), help="library that loads the encoder")
    options = parser.parse_args(arguments)
    try:
        kind = export(options.run, options.to, options.out)
    except (ExportError, ConversionError, RecipeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out} holds the encoder for {kind}; README.md there shows how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
