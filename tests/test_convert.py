"""Tests of checkpoints: which are read, what must be covered, what is refused, and the export for timm."""

import argparse
import collections
import datetime
import os
import pathlib
import re
import shlex
import subprocess
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from common import checkpoint
from common.checkpoint import export_encoder
from common.convert import ConversionError, Coverage, fuse_qkv, load_encoder, load_method, read_checkpoint, rename
from common.recipe import Recipe, TrainConfig, override
from common.run import RunError
from common.vit import ViT, vit
from droppos.method import OFFICIAL_NAMES, DropPos
from positional_label.backbones import release_swin
from positional_label.method import OFFICIAL_SWIN_NAMES

TO_OFFICIAL = {ours: official for official, ours in OFFICIAL_NAMES.items()}


def encoder(seed: int = 0, **options) -> ViT:
    torch.manual_seed(seed)
    return ViT(**{"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "position": "learned", **options})


def droppos(seed: int = 0, **options) -> DropPos:
    return DropPos(encoder(seed, position="sincos"), **{"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, **options})


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Harmful:
    """An object whose pickle creates a folder when it is loaded without restrictions."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


# ---- files that are read


def test_an_official_droppos_file_fills_the_encoder_and_leaves_only_its_decoder(tmp_path):
    source = droppos(seed=1)
    official = rename(source.state_dict(), TO_OFFICIAL)
    content = {
        "epoch": 800,
        "state_dict": {f"module.{name}": tensor for name, tensor in official.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "model": "DropPos_mae_vit_base_patch16",
    }
    torch.save(content, tmp_path / "droppos.pth")
    ours = encoder(position="sincos")
    coverage = load_encoder(ours, read_checkpoint(tmp_path / "droppos.pth"))
    assert same(ours.state_dict(), source.encoder.state_dict())
    assert set(coverage.loaded) == set(ours.state_dict()) and coverage.missing == coverage.reshaped == ()
    assert set(coverage.unexpected) == {name for name in official if name.startswith("decoder_")} | {"mask_pos_token"}
    assert {"decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_norm.bias", "decoder_pred.bias"} <= set(
        coverage.unexpected
    )


def test_the_official_names_of_base_have_the_listed_shapes():
    with torch.device("meta"):
        state = rename(DropPos(vit("base")).state_dict(), TO_OFFICIAL)
    assert len(state) == 181
    shapes = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 197, 768),
        "mask_pos_token": (1, 1, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.0.mlp.fc1.bias": (3072,),
        "norm.weight": (768,),
        "decoder_embed.weight": (512, 768),
        "decoder_blocks.1.attn.qkv.weight": (1536, 512),
        "decoder_blocks.1.mlp.fc2.weight": (512, 2048),
        "decoder_norm.bias": (512,),
        "decoder_pred.weight": (196, 512),
        "decoder_pred.bias": (196,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("options", [{}, {"position_weight": 0.05}, {"position_token": "zeros"}])
def test_a_whole_method_converts_to_official_names_and_back(options):
    source, ours = droppos(seed=1, **options), droppos(seed=2, **options)
    official = rename(source.state_dict(), TO_OFFICIAL)
    assert any(name.startswith("aux_decoder_") for name in official) == ("position_weight" in options)
    coverage = load_method(ours, {f"module.{name}": tensor for name, tensor in official.items()}, OFFICIAL_NAMES)
    assert same(ours.state_dict(), source.state_dict()) and set(coverage.loaded) == set(ours.state_dict())


def test_an_mae_file_with_its_argparse_options_is_read(tmp_path):
    source = encoder(seed=1)
    options = argparse.Namespace(model="mae_vit_base_patch16", lr=1.5e-4, betas=(0.9, 0.95))
    torch.save({"model": source.state_dict() | {"mask_token": torch.zeros(1, 1, 8)}, "args": options, "epoch": 799}, tmp_path / "mae.pth")
    ours = encoder()
    coverage = load_encoder(ours, read_checkpoint(str(tmp_path / "mae.pth")))
    assert same(ours.state_dict(), source.state_dict()) and coverage.unexpected == ("mask_token",)
    with pytest.raises(Exception, match="argparse.Namespace"):  # reading one does not allow Namespace permanently
        torch.load(tmp_path / "mae.pth", weights_only=True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timms_names_are_read_unchanged_in_both_file_formats(suffix, tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=4, depth=2)
    path = tmp_path / f"timm.{suffix}"
    save_file(theirs.state_dict(), path) if suffix == "safetensors" else torch.save(theirs.state_dict(), path)
    ours = encoder(width=192, heads=3)
    coverage = load_encoder(ours, read_checkpoint(path))
    assert coverage.unexpected == ("head.bias", "head.weight") and coverage.missing == ()
    assert same(ours.state_dict(), {name: t for name, t in theirs.state_dict().items() if not name.startswith("head")})


def test_a_method_checkpoint_of_this_project_fills_an_encoder():
    source, ours = droppos(seed=1), encoder(position="sincos")
    coverage = load_encoder(ours, source.state_dict())
    assert same(ours.state_dict(), source.encoder.state_dict())
    assert all(name.startswith(("decoder.", "dropped_position")) for name in coverage.unexpected)


# ---- separate q and kv


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split each qkv as in MaPeT's official code: the first third is q, the rest is kv."""
    found = {}
    for name, tensor in state.items():
        q, k, v = tensor.chunk(3) if ".attn.qkv." in name else (None, None, None)
        found |= {name: tensor} if q is None else {name.replace("qkv", "q"): q, name.replace("qkv", "kv"): torch.cat([k, v])}
    return found


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_an_encoder_with_separate_q_and_kv_is_loaded_completely(prefix):
    source, ours = encoder(seed=1), encoder()
    official = {f"{prefix}{name}": tensor for name, tensor in split_qkv(source.state_dict()).items()}
    assert len(official) == len(ours.state_dict()) + 2 * 2  # blocks, weights and biases
    coverage = load_encoder(ours, official)
    assert same(ours.state_dict(), source.state_dict())
    assert set(coverage.loaded) == set(ours.state_dict()) and coverage.missing == coverage.unexpected == coverage.reshaped == ()


def test_a_method_with_separate_q_and_kv_is_loaded_completely():
    source, ours = droppos(seed=1), droppos(seed=2)
    official = split_qkv(rename(source.state_dict(), TO_OFFICIAL))
    assert "decoder_blocks.0.attn.kv.weight" in official
    coverage = load_method(ours, official, OFFICIAL_NAMES)
    assert same(ours.state_dict(), source.state_dict()) and set(coverage.loaded) == set(ours.state_dict())


def test_fused_rows_are_in_the_order_q_k_v_for_any_order_in_the_file():
    q, kv = torch.zeros(2, 2), torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]])
    for state in ({"attn.q.weight": q, "attn.kv.weight": kv}, {"attn.kv.weight": kv, "attn.q.weight": q}):
        assert fuse_qkv(state)["attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_fuse_qkv_leaves_other_tensors_unchanged():
    names = ["blocks.0.attn.qkv.weight", "attn_pool.q.weight", "attn_pool.kv.weight", "cross_attn.q.bias", "attn.q_norm.weight", "q.weight"]
    state = {name: torch.zeros(1) for name in names}
    fused = fuse_qkv(state)
    assert list(fused) == names and all(fused[name] is state[name] for name in names)


@pytest.mark.parametrize(("lost", "left"), [("q", "kv"), ("kv", "q")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_q_without_kv_or_kv_without_q_is_refused_and_named(lost, left, kind):
    state, ours = split_qkv(copied(encoder(seed=1))), encoder()
    before, lost, left = copied(ours), f"blocks.1.attn.{lost}.{kind}", f"blocks.1.attn.{left}.{kind}"
    whole = state.pop(lost)
    with pytest.raises(ConversionError, match=rf"^{left} .* needs {lost}, which is missing"):
        load_encoder(ours, state)
    with pytest.raises(ConversionError, match=rf"{lost}.* is \((15|31)"):
        load_encoder(ours, {left: state.pop(left), lost: whole[1:], **state})
    assert same(ours.state_dict(), before)


# ---- class token and grid


def test_a_class_token_that_the_encoder_lacks_is_ignored_with_its_position():
    source, ours = encoder(seed=1), encoder(class_token=False)
    coverage = load_encoder(ours, source.state_dict())
    assert torch.equal(ours.pos_embed, source.pos_embed[:, 1:])
    assert coverage.unexpected == ("cls_token",) and coverage.reshaped == ("pos_embed",)


def test_a_missing_class_token_is_refused_unless_it_is_allowed():
    source, ours = encoder(seed=1, class_token=False), encoder()
    before = copied(ours)
    with pytest.raises(ConversionError, match="missing: cls_token"):
        load_encoder(ours, source.state_dict())
    assert same(ours.state_dict(), before)
    coverage = load_encoder(ours, source.state_dict(), allow_missing=["cls_token"])
    assert coverage.missing == ("cls_token",)
    assert torch.equal(ours.cls_token, before["cls_token"])
    assert torch.equal(ours.pos_embed, torch.cat([before["pos_embed"][:, :1], source.pos_embed], 1))


@pytest.mark.parametrize("class_token", [True, False])
def test_the_position_embedding_is_resized_to_the_encoders_grid_and_reported(class_token):
    source, ours = encoder(seed=1, class_token=class_token), encoder(image_size=(24, 16), class_token=class_token)
    rows = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))  # row and column of each cell
    first = int(class_token)
    source.pos_embed.data[:, first:, :2] = rows
    coverage = load_encoder(ours, source.state_dict())
    assert coverage.reshaped == ("pos_embed",) and coverage.missing == coverage.unexpected == ()
    assert torch.equal(ours.pos_embed[:, :first], source.pos_embed[:, :first])
    row, column = ours.pos_embed[0, first:, :2].detach().view(6, 4, 2).unbind(-1)
    torch.testing.assert_close(column, torch.arange(4.0).expand(6, -1), atol=1e-5, rtol=0)
    assert (row.diff(dim=0) > 0).all() and row[0, 0] < 0.5 and row[-1, 0] > 2.5


def test_a_position_embedding_of_a_non_square_grid_cannot_be_resized():
    source, ours = encoder(seed=1, image_size=(24, 16)), encoder()
    before = copied(ours)
    with pytest.raises(ConversionError, match=r"24 patches .*\(4, 4\)"):
        load_encoder(ours, source.state_dict())
    assert same(ours.state_dict(), before)


def test_an_encoder_without_positions_ignores_those_in_the_file():
    source, ours = encoder(seed=1), encoder(position="none")
    assert load_encoder(ours, source.state_dict()).unexpected == ("pos_embed",)


# ---- what is refused


def test_a_missing_tensor_is_refused_by_name_and_nothing_is_loaded():
    state, ours = copied(encoder(seed=1)), encoder()
    del state["blocks.1.attn.qkv.weight"], state["norm.bias"]
    before = copied(ours)
    with pytest.raises(ConversionError, match=r"2 missing.*missing: blocks.1.attn.qkv.weight, norm.bias"):
        load_encoder(ours, state)
    with pytest.raises(ConversionError, match="missing: blocks.1"):
        load_encoder(ours, state, allow_missing=["norm.bias"])
    assert same(ours.state_dict(), before)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("image_size", [16, 32])
def test_another_width_is_refused_and_nothing_is_loaded(class_token, image_size):
    source, ours = encoder(seed=1, width=32, image_size=image_size, class_token=class_token), encoder()
    before = copied(ours)
    with pytest.raises(ConversionError, match="another architecture: .*32.* in the file, .*16.* here"):
        load_encoder(ours, source.state_dict(), allow_missing=["cls_token"])
    assert same(ours.state_dict(), before)


def test_a_method_with_a_missing_or_unexpected_tensor_is_refused():
    official, ours = rename(droppos(seed=1).state_dict(), TO_OFFICIAL), droppos()
    before = copied(ours)
    with pytest.raises(ConversionError, match="missing: decoder.head.bias"):
        load_method(ours, {name: tensor for name, tensor in official.items() if name != "decoder_pred.bias"}, OFFICIAL_NAMES)
    with pytest.raises(ConversionError, match="unexpected: encoder.surprise"):
        load_method(ours, official | {"surprise": torch.zeros(1)}, OFFICIAL_NAMES)
    assert same(ours.state_dict(), before)


def test_a_method_of_another_width_is_refused_and_nothing_is_loaded():
    official, ours = rename(droppos(seed=1, decoder_width=16).state_dict(), TO_OFFICIAL), droppos()
    before = copied(ours)
    with pytest.raises(ConversionError, match="decoder"):
        load_method(ours, official, OFFICIAL_NAMES)
    assert same(ours.state_dict(), before)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
def test_a_truncated_file_is_refused_with_its_path(suffix, kept, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    save_file(copied(encoder()), path) if suffix == "safetensors" else torch.save(copied(encoder()), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ConversionError, match=re.escape(str(path)) + ".*truncated"):
        read_checkpoint(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    for name in ("gone.pth", "gone.safetensors"):
        with pytest.raises(ConversionError, match=f"no checkpoint at .*{name}"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, torch.zeros(3), [torch.zeros(3)], 7], ids=["no tensors", "a tensor", "a list", "a number"]
)
def test_a_file_without_named_tensors_is_refused_with_its_path(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ConversionError, match=r"odd\.pth"):
        read_checkpoint(tmp_path / "odd.pth")


def test_a_text_file_is_refused_with_its_path(tmp_path):
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(ConversionError, match=r"page\.pth"):
        read_checkpoint(tmp_path / "page.pth")


def test_code_in_a_file_is_refused_and_not_executed(tmp_path):
    victim = tmp_path / "made by the pickle"
    torch.save({"model": copied(encoder()), "args": Harmful(victim)}, tmp_path / "harmful.pth")
    with pytest.raises(ConversionError, match=r"harmful\.pth"):
        read_checkpoint(tmp_path / "harmful.pth")
    assert not victim.exists()
    torch.load(tmp_path / "harmful.pth", weights_only=False)
    assert victim.exists()  # without restrictions the code runs


# ---- parts of the file's encoder that ours does not have


def timm_vit(**options) -> dict[str, Tensor]:
    """Return the tensors of timm's ViT with the sizes of `encoder`; `options` are timm's."""
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    return copied(VisionTransformer(**sizes | options))


def refusal(ours: ViT, state: dict[str, Tensor], **options) -> str:
    """Return the error message for a refused state; check that nothing is loaded."""
    before = copied(ours)
    with pytest.raises(ConversionError) as error:
        load_encoder(ours, state, **options)
    assert same(ours.state_dict(), before)
    return str(error.value)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda: timm_vit(reg_tokens=4), "reg_token"),
        (lambda: timm_vit(qk_norm=True), "blocks.0.attn.k_norm.bias"),
        (lambda: timm_vit(pre_norm=True), "norm_pre.bias, norm_pre.weight"),
        (lambda: timm_vit(mlp_layer=timm.layers.SwiGLU), "blocks.0.mlp.fc1_g.bias"),
        (lambda: timm_vit() | {"register_tokens": torch.zeros(1, 4, 16)}, "register_tokens"),
        (lambda: timm_vit() | {"dist_token": torch.zeros(1, 1, 16)}, "dist_token"),
        (lambda: timm_vit() | {"patch_embed.norm.weight": torch.ones(16)}, "patch_embed.norm.weight"),
        (
            lambda: timm_vit() | {"rel_pos_bias.relative_position_bias_table": torch.ones(52, 2)},
            "rel_pos_bias.relative_position_bias_table",
        ),
        (lambda: timm_vit() | {"rope.freqs": torch.ones(4)}, "rope.freqs"),
        (
            lambda: timm_vit() | {"blocks.1.attn.relative_position_bias_table": torch.ones(52, 2)},
            "blocks.1.attn.relative_position_bias_table",
        ),
        (lambda: timm_vit() | {"surprise": torch.ones(1)}, "surprise"),
        (
            lambda: {f"encoder.{name}": tensor for name, tensor in timm_vit().items()} | {"norm_pre.weight": torch.ones(16)},
            "norm_pre.weight",
        ),
        (lambda: {f"a.encoder.{name}": tensor for name, tensor in timm_vit().items()} | {"a.pos_embed": torch.ones(1)}, "a.pos_embed"),
    ],
)
def test_encoder_tensors_that_only_the_file_has_are_refused_and_named(state, named):
    text = refusal(encoder(), state())
    assert f"in the file but not here: {named}" in text and len(text) < 300


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ({"depth": 12}, "encoder.depth=12"),
        ({"layer_scale": 0.1}, "encoder.layer_scale=0.1"),
        ({"depth": 12, "layer_scale": 0.1}, "encoder.depth=12 --set encoder.layer_scale=0.1"),
        ({"class_token": False}, "encoder.class_token=false"),
        ({"position": "none"}, "encoder.position=none"),
        ({"position": "relative"}, "encoder.position=relative"),
        ({"mlp_ratio": 2.0}, "encoder.mlp_ratio=2"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"width": 192, "depth": 12}, "size=tiny"),
        ({"width": 384, "depth": 12, "heads": 6, "patch_size": 3, "image_size": 15}, "size=small --set patch_size=3 --set image_size=15"),
        ({"width": 192, "depth": 3}, "size=tiny --set encoder.depth=3"),
    ],
)
def test_another_encoder_is_refused_with_the_set_option_that_builds_it(source, setting):
    recipe = Recipe(
        size="micro",
        image_size=16,
        patch_size=4,
        pretrain=TrainConfig(epochs=1, batch_size=1, base_lr=1.0),
        protocols=(),
        encoder={"position": "learned"},
    )
    state = ViT(**{"image_size": 16, "patch_size": 4, "width": 96, "depth": 6, "heads": 3, "position": "learned", **source}).state_dict()
    text = refusal(recipe.build_encoder(3), state)
    assert text.startswith("the checkpoint has another architecture: ") and f"; --set {setting} would fit" in text and len(text) < 300
    built = override(recipe, setting.split(" --set ")).build_encoder(3)
    coverage = load_encoder(built, state)
    assert not coverage.missing and not coverage.unexpected and same(built.state_dict(), state)


def test_an_encoder_with_layer_scale_refuses_a_file_without():
    assert "no LayerScale in the file, but here; --set encoder.layer_scale=null would fit" in refusal(encoder(layer_scale=0.1), timm_vit())


def test_layer_scale_is_loaded_under_either_name():
    state, ours = timm_vit(init_values=0.3), encoder(layer_scale=0.1)
    official = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in state.items()}  # DeiT III's and BEiT's
    assert "blocks.0.gamma_1" in official
    load_encoder(ours, official)
    assert same(ours.state_dict(), state)


def test_a_class_token_without_a_position_gives_timms_tokens():
    torch.manual_seed(1)
    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, no_embed_class=True).eval()
    ours, images = encoder().eval(), torch.randn(2, 3, 16, 16)
    load_encoder(ours, theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-5, rtol=0)


def test_a_classifier_with_a_norm_after_pooling_is_refused_with_the_reason():
    text = refusal(encoder(), timm_vit(global_pool="avg", num_classes=3))
    assert "norm after pooling (fc_norm) in the file" in text and "missing: norm.bias, norm.weight" in text


def test_positions_that_may_not_be_ignored_are_refused_with_the_option_that_keeps_them():
    for position in ("none", "relative"):
        text = refusal(encoder(position=position), timm_vit(), allow_unused=("cls_token",))
        assert "a position embedding in the file, none here; --set encoder.position=learned would fit" in text
    assert "in the file but not here: cls_token" in refusal(encoder(class_token=False), timm_vit(), allow_unused=())


def test_tensors_ignored_on_purpose_are_reported():
    assert "class token is ignored" in str(load_encoder(encoder(class_token=False), timm_vit()))
    assert "position embedding is ignored" in str(load_encoder(encoder(position="none"), timm_vit()))
    assert load_encoder(encoder(), timm_vit() | {"extra.weight": torch.ones(1)}, allow_unused=["extra.weight"]).unexpected == (
        "extra.weight",
    )


@pytest.mark.parametrize(
    "name",
    """head.weight head_dist.bias fc_norm.weight fc.weight lm_head.weight logit_scale decoder.weight decoder_blocks.0.norm1.weight
    aux_decoder_pos_embed mask_token masked_embed predictor.blocks.0.norm1.weight projector.0.weight""".split(),
)
def test_tensors_outside_the_encoder_are_reported_as_unexpected(name):
    assert load_encoder(encoder(), timm_vit() | {name: torch.ones(1)}).unexpected == (name,)


def test_error_messages_name_three_tensors_and_count_the_others():
    names = [f"decoder.{number}" for number in range(9)] + ["blocks.3.weight", "surprise"]
    assert str(Coverage((), (), tuple(names))).endswith("unexpected: blocks.3.weight, decoder.0, surprise and 8 more")
    method, text = droppos(), refusal(encoder(), {f"{number}.{name}": torch.ones(1) for number in range(500) for name in ("a", "b")})
    assert text == "the file has none of the encoder's 30 names, but 1000 others: 0.a, 1.a, 10.a and 997 more"
    with pytest.raises(ConversionError) as error:
        load_method(method, {f"x.{number}.y": torch.ones(1) for number in range(5000)}, OFFICIAL_NAMES)
    assert "missing" in str(error.value) and len(str(error.value)) < 500


def test_a_method_of_another_depth_is_refused_with_both_depths():
    official = rename(droppos(seed=1, decoder_depth=3).state_dict(), TO_OFFICIAL)
    with pytest.raises(ConversionError, match=r"configuration \(3 decoder.blocks in the file, 1 here; "):
        load_method(droppos(), official, OFFICIAL_NAMES)


# ---- prefixes, and several encoders in a file


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod._orig_mod.", "model.", "backbone.", "student."]
PREFIXES += [
    "teacher.",
    "encoder.",
    "model.encoder.",
    "module.model._orig_mod.backbone.",
    "_forward_module.",
    "base_encoder.",
    "any.thing.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", [(), ("model",), ("state_dict",), ("model", "state_dict"), ("state_dict", "model"), ("teacher",)])
def test_a_common_prefix_of_all_names_is_removed_and_reported(prefix, container, tmp_path):
    source, ours = encoder(seed=1), encoder()
    content = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    assert load_encoder(encoder(), content).notes
    for key in reversed(container):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    coverage = load_encoder(ours, read_checkpoint(tmp_path / "a.pth"))
    assert same(ours.state_dict(), source.state_dict()) and not coverage.unexpected
    assert all(f"{part}." in str(coverage) for part in prefix.split(".")[:-1]) and "removed" in str(coverage)


def test_names_of_separately_compiled_blocks_are_recognised():
    source, ours = encoder(seed=1), encoder()
    load_encoder(ours, {re.sub(r"(blocks\.\d)", r"\1._orig_mod", name): tensor for name, tensor in source.state_dict().items()})
    assert same(ours.state_dict(), source.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "network."])
def test_a_whole_method_is_loaded_with_any_common_prefix(prefix, tmp_path):
    source, ours = droppos(seed=1), droppos(seed=2)
    official = {f"{prefix}{name}": tensor for name, tensor in rename(source.state_dict(), TO_OFFICIAL).items()}
    assert load_method(droppos(), official, OFFICIAL_NAMES).notes
    torch.save({"model": official}, tmp_path / "a.pth")
    coverage = load_method(ours, read_checkpoint(tmp_path / "a.pth"), OFFICIAL_NAMES)
    assert same(ours.state_dict(), source.state_dict()) and "removed" in str(coverage)


def test_two_tensors_cannot_get_the_same_name():
    state = copied(encoder())
    with pytest.raises(ConversionError, match=r"two tensors would be called cls_token, module\.cls_token is one of them"):
        load_encoder(encoder(), state | {f"module.{name}": tensor for name, tensor in state.items()})


def run_suggested_command(text: str) -> None:
    """Run the command at the end of an error message in this process, since a new process would take seconds."""
    program, option, code = shlex.split(text[text.index("python -c") :])
    assert (program, option) == ("python", "-c")
    exec(code, {})


def two_encoders() -> dict[str, dict]:
    first, second = copied(encoder(seed=1)), copied(encoder(seed=2))
    head = {"head.mlp.0.weight": torch.ones(1)}

    def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in state.items()}

    return {
        "student teacher": {"student": under("module.backbone.", first) | head, "teacher": under("backbone.", second) | head, "epoch": 1},
        "model model_ema": {"model": first, "model_ema": under("module.", second), "optimizer": {"state": {}, "param_groups": []}},
        "model ema": {"model": first, "ema": {"state_dict": second}},
        "state_dict ema_state_dict": {"state_dict": first, "ema_state_dict": second},
        "base_encoder momentum_encoder": {
            "state_dict": under("module.base_encoder.", first) | under("module.momentum_encoder.", second) | {"module.queue": torch.ones(2)}
        },
        "encoder target_encoder": {"encoder": first, "target_encoder": second},
        "model teacher": under("model.", first) | under("teacher.", second),
    }


@pytest.mark.parametrize("case", two_encoders())
def test_two_encoders_in_a_file_are_refused_with_a_command_that_extracts_one(case, tmp_path):
    torch.save(two_encoders()[case], tmp_path / "both.pth")
    with pytest.raises(ConversionError) as error:
        load_encoder(encoder(), read_checkpoint(tmp_path / "both.pth"))
    text, ours = str(error.value), encoder()
    first, second = case.split()
    assert f"both.pth has 2 encoders, '{first}" in text and f" and '{second}" in text and "choose one and" in text and len(text) < 600
    run_suggested_command(text)
    (taken,) = set(tmp_path.iterdir()) - {tmp_path / "both.pth"}
    load_encoder(ours, read_checkpoint(taken))
    assert same(ours.state_dict(), copied(encoder(seed=2)))
    load_encoder(ours, read_checkpoint(tmp_path / "both.pth", first))
    assert same(ours.state_dict(), copied(encoder(seed=1)))
    with pytest.raises(ConversionError, match="has 0 networks below 'neither'"):
        read_checkpoint(tmp_path / "both.pth", "neither")


def test_timms_ema_weights_are_ignored_and_this_is_reported(tmp_path):
    source, ours = encoder(seed=1), encoder()
    torch.save({"state_dict": source.state_dict(), "state_dict_ema": encoder(seed=2).state_dict()}, tmp_path / "a.pth")
    coverage = load_encoder(ours, read_checkpoint(tmp_path / "a.pth"))
    assert same(ours.state_dict(), source.state_dict()) and "state_dict read, state_dict_ema ignored" in str(coverage)


# ---- other objects in a file


OBJECTS = {
    "numpy scalars": lambda: [numpy.float64(81.2), numpy.float32(1), numpy.int64(3), numpy.bool_(True), numpy.str_("a")],
    "numpy arrays": lambda: [numpy.arange(5.0), numpy.array([{"a": 1}], dtype=object), numpy.random.get_state()],
    "paths": lambda: [Path("/a/b"), pathlib.PureWindowsPath("c:/b")],
    "namespaces": lambda: [argparse.Namespace(out=Path("a"), rate=numpy.float64(1)), types.SimpleNamespace(a=1)],
    "dates": lambda: [datetime.datetime(2024, 5, 6), datetime.date(2024, 5, 6), datetime.timedelta(3)],
    "dicts": lambda: [collections.defaultdict(list, {"a": [1]}), collections.Counter("aab"), collections.OrderedDict(a=1), {1, 2}],
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_harmless_objects_is_read_completely(kind, zipped, tmp_path):
    source, ours = encoder(seed=1), encoder()
    torch.save({"args": OBJECTS[kind](), "model": source.state_dict()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    coverage = load_encoder(ours, read_checkpoint(tmp_path / "a.pth"))
    assert same(ours.state_dict(), source.state_dict()) and not coverage.unexpected
    with pytest.raises(Exception, match="Weights only load failed") if kind != "dicts" else pytest.raises(Exception, match="."):
        torch.load(tmp_path / "a.pth", weights_only=True)  # reading one does not allow its classes permanently


class Settings:
    """A user-defined class."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("holder", [lambda state: {"model": state, "args": Settings()}, lambda state: {"model": whole(state)}])
def test_a_file_with_other_objects_is_refused_with_a_command_that_keeps_its_tensors(holder, zipped, tmp_path):
    source, ours = encoder(seed=1), encoder()
    torch.save(holder(copied(source)), tmp_path / "own.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError) as error:
        read_checkpoint(tmp_path / "own.pth")
    text = str(error.value)
    assert re.search(r"own\.pth contains (tests\.test_convert\.Settings|common\.vit\.\w+|.*torch\.nn)", text) and "truncated" not in text
    assert "if you trust the source of the file" in text and len(text) < 900
    run_suggested_command(text)
    load_encoder(ours, read_checkpoint(tmp_path / "own-tensors.pth"))
    assert same(ours.state_dict(), source.state_dict())


def whole(state: dict[str, Tensor]) -> nn.Module:
    model = encoder()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("function", [eval, exec, print, subprocess.run, getattr])
def test_functions_in_a_file_are_refused_and_named(function, tmp_path):
    torch.save({"model": copied(encoder()), "hook": function}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=rf"a\.pth contains \w+\.{function.__name__} besides plain tensors"):
        read_checkpoint(tmp_path / "a.pth")


def test_numpy_arrays_instead_of_tensors_are_refused_with_the_reason(tmp_path):
    torch.save({"model": {name: tensor.numpy() for name, tensor in copied(encoder()).items()}}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="has numpy arrays instead of tensors"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\n<!DOCTYPE html><title>Quota exceeded</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"\x1f\x8b\x08", "compressed by gzip"),
        (b'{"weight_map": {}}', "JSON"),
        (b"\x93NUMPY", "a numpy array"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_another_file_type_is_refused_and_named(content, kind, suffix, tmp_path):
    path = tmp_path / f"odd.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=re.escape(f"{path} is {kind}")):
        read_checkpoint(path)


def test_archives_and_folders_are_refused_with_their_type(tmp_path):
    numpy.savez(tmp_path / "a.npz", kernel=numpy.ones(2))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images/a.txt", "x")
    for name, kind in (("a.npz", "numpy arrays"), ("a.zip", r"a zip archive \(images/a.txt\)"), ("", "is a folder")):
        with pytest.raises(ConversionError, match=kind):
            read_checkpoint(tmp_path / name)


def test_the_file_format_is_detected_by_content_and_not_by_suffix(tmp_path):
    state = copied(encoder(seed=1))
    save_file(state, tmp_path / "a.bin")
    torch.save(state, tmp_path / "a.safetensors")
    assert same(read_checkpoint(tmp_path / "a.bin"), state) and same(read_checkpoint(tmp_path / "a.safetensors"), state)


# ---- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(value):
    state = timm_vit() | {"head.weight": torch.tensor([value])}
    load_encoder(encoder(), state)  # a head is not loaded
    state["blocks.1.mlp.fc2.weight"][3, 5], state["norm.bias"][0] = value, value
    assert refusal(encoder(), state).startswith("2 of 30 tensors are not finite: blocks.1.mlp.fc2.weight, norm.bias;")
    official = rename(droppos(seed=1).state_dict(), TO_OFFICIAL)
    official["decoder_pred.bias"][1] = value
    ours = droppos()
    before = copied(ours)
    with pytest.raises(ConversionError, match="1 of .* tensors are not finite: decoder.head.bias;"):
        load_method(ours, official, OFFICIAL_NAMES)
    assert same(ours.state_dict(), before)


def test_a_float64_value_too_large_for_float32_is_refused_as_not_finite():
    assert "are not finite: norm.bias" in refusal(encoder(), timm_vit() | {"norm.bias": torch.full((16,), 1e300, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda weight: weight.int(), "int32"),
        (lambda weight: weight.bool(), "bool"),
        (lambda weight: weight * 1j, "complex64"),
        (lambda weight: torch.empty(weight.shape, device="meta"), "without values"),
        (lambda weight: weight.to_sparse(), "sparse"),
    ],
)
def test_tensors_that_are_not_dense_floats_are_refused_with_name_and_kind(change, kind):
    state = timm_vit()
    text = refusal(encoder(), state | {"blocks.0.mlp.fc1.weight": change(state["blocks.0.mlp.fc1.weight"])})
    assert text.startswith("blocks.0.mlp.fc1.weight is ") and kind in text and "float32 here" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded_as_float32_also_with_resized_positions(dtype):
    state = {name: tensor.to(dtype) for name, tensor in timm_vit(img_size=32).items()}
    ours, same_numbers = encoder(), encoder()
    load_encoder(ours, state)
    load_encoder(same_numbers, {name: tensor.float() for name, tensor in state.items()})
    assert all(tensor.dtype == torch.float32 for tensor in ours.state_dict().values())
    assert same(ours.state_dict(), same_numbers.state_dict())


# ---- buffers determined by the architecture


def released(**options) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a narrow released Swin at full depth for 224 pixels, and its tensors under the official names."""
    torch.manual_seed(0)
    sizes = {"img_size": 224, "embed_dim": 8, "depths": (2, 2, 6, 2), "num_heads": (1, 1, 2, 2), "num_classes": 3}
    method = nn.Module()
    method.encoder = SwinTransformer(**sizes | options)
    release_swin(method.encoder, keep_grid=False)
    ours = {
        ours: official for official, ours in OFFICIAL_SWIN_NAMES.items() if "FinalLayer" not in official and "downsample" not in official
    }
    ours |= {f"encoder.layers.{stage + 1}.downsample.": f"layers.{stage}.downsample." for stage in range(3)}
    return method, rename(copied(method), ours)


def official_mask(side: int, window: int) -> Tensor:
    """Return (windows, T, T) of a grid rolled by half a window: 0 where two cells were less than a window apart before, else -100."""
    place = torch.arange(side).roll(-(window // 2))
    cell = torch.cartesian_prod(place, place).view(side // window, window, side // window, window, 2)
    cell = cell.permute(0, 2, 1, 3, 4).reshape(-1, window**2, 2)
    torn = (cell[:, :, None] - cell[:, None]).abs().amax(-1) >= window
    return torch.where(torn, -100.0, 0.0)


MASKS = {f"layers.{stage}.blocks.{block}.attn_mask": 56 >> stage for stage, block in ((0, 1), (1, 1), (2, 1), (2, 3), (2, 5))}


def test_an_official_swin_of_full_depth_is_loaded_with_its_window_masks():
    method, official = released()
    masks = {name: official_mask(side, 7) for name, side in MASKS.items()}
    assert [int((mask == 0).sum()) for mask in masks.values()] == [135424, 29584, 5476, 5476, 5476]  # as in the official files
    coverage = load_method(method, official | masks, OFFICIAL_SWIN_NAMES)
    assert coverage.missing == coverage.unexpected == () and len(coverage.loaded) == len(method.state_dict())
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    load_method(method, {f"module.{name}": tensor for name, tensor in (official | masks).items()}, OFFICIAL_SWIN_NAMES)
    assert same(method.state_dict(), released()[0].state_dict())


@pytest.mark.parametrize("change", [lambda mask: mask.flip(0), lambda mask: mask.mT + mask, lambda mask: mask[:1], torch.zeros_like])
def test_masks_of_other_windows_are_refused_and_named(change):
    method, official = released()
    masks = {name: official_mask(side, 7) for name, side in MASKS.items()}
    masks["layers.2.blocks.3.attn_mask"] = change(masks["layers.2.blocks.3.attn_mask"])
    with pytest.raises(ConversionError, match=r"1 unexpected; unexpected: encoder\.layers\.2\.blocks\.3\.attn_mask"):
        load_method(method, official | masks, OFFICIAL_SWIN_NAMES)


def test_relative_position_indices_in_a_file_are_accepted_only_if_equal():
    source, ours = encoder(seed=1, position="relative"), encoder(position="relative")
    index = {
        f"blocks.{block}.attn.rel_pos.relative_position_index": source.blocks[block].attn.rel_pos.relative_position_index
        for block in (0, 1)
    }
    coverage = load_encoder(ours, source.state_dict() | index)
    assert coverage.unexpected == () and same(ours.state_dict(), source.state_dict())
    assert "relative_position_index" in refusal(ours, source.state_dict() | {name: tensor + 1 for name, tensor in index.items()})


def test_batch_norm_counters_may_be_missing_but_running_means_may_not():
    source, ours = (timm.create_model("test_resnet", num_classes=3) for _ in range(2))
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(state) < len(source.state_dict()) and load_method(ours, state, {}).missing == ()
    with pytest.raises(ConversionError, match="missing: bn1.running_mean"):
        load_method(ours, {name: tensor for name, tensor in state.items() if name != "bn1.running_mean"}, {})


# ---- export


@pytest.mark.parametrize("options", [{}, {"position": "learned"}])
def test_an_exported_encoder_loads_strictly_into_timms_model(options, tmp_path):
    ours = vit("tiny", image_size=32, **options).eval()
    export_encoder(ours, tmp_path / "encoder.safetensors")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, weight_init="skip").eval()
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs.forward_features(images), ours(images), atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]
    again = vit("tiny", image_size=32, **options)
    load_encoder(again, read_checkpoint(tmp_path / "encoder.safetensors"))
    assert same(again.state_dict(), ours.state_dict())


def test_an_exported_encoder_has_the_permissions_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        export_encoder(vit("micro", image_size=8, patch_size=2), tmp_path / "encoder.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "encoder.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_encoder_that_cannot_be_written_leaves_the_previous_one_and_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path, encoder = tmp_path / "encoder.safetensors", vit("micro", image_size=8, patch_size=2)
    export_encoder(encoder, path)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="encoder.safetensors could not be written .*No space left.*the previous one is intact"):
        export_encoder(encoder, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
