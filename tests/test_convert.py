"""Claims about checkpoints: whose are read, what is covered, what is refused, and what comes out for timm."""

import argparse
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint import export_encoder
from common.convert import ConversionError, fuse_qkv, load_encoder, load_method, read_checkpoint, rename
from common.vit import ViT, vit
from droppos.method import OFFICIAL_NAMES, DropPos

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
    """What a pickle of this does when it is loaded without care: it makes a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


# ---- whose files are read


def test_an_official_droppos_file_fills_the_encoder_and_leaves_exactly_its_decoder(tmp_path):
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


def test_the_official_names_of_base_are_the_checkpoint_sheets():
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
def test_a_whole_method_goes_to_official_names_and_back(options):
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
    with pytest.raises(Exception, match="argparse.Namespace"):  # and reading one has not made Namespace safe for good
        torch.load(tmp_path / "mae.pth", weights_only=True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timms_names_are_ours_in_either_file_format(suffix, tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=4, depth=2)
    path = tmp_path / f"timm.{suffix}"
    save_file(theirs.state_dict(), path) if suffix == "safetensors" else torch.save(theirs.state_dict(), path)
    ours = encoder(width=192, heads=3)
    coverage = load_encoder(ours, read_checkpoint(path))
    assert coverage.unexpected == ("head.bias", "head.weight") and coverage.missing == ()
    assert same(ours.state_dict(), {name: t for name, t in theirs.state_dict().items() if not name.startswith("head")})


def test_a_checkpoint_of_a_method_of_this_project_fills_an_encoder():
    source, ours = droppos(seed=1), encoder(position="sincos")
    coverage = load_encoder(ours, source.state_dict())
    assert same(ours.state_dict(), source.encoder.state_dict())
    assert all(name.startswith(("decoder.", "dropped_position")) for name in coverage.unexpected)


# ---- queries apart from keys and values


def parted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As MaPeT's official code has it: of each qkv the first third as q, the others as kv."""
    found = {}
    for name, tensor in state.items():
        q, k, v = tensor.chunk(3) if ".attn.qkv." in name else (None, None, None)
        found |= {name: tensor} if q is None else {name.replace("qkv", "q"): q, name.replace("qkv", "kv"): torch.cat([k, v])}
    return found


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_an_encoder_with_queries_apart_from_keys_and_values_is_loaded_whole(prefix):
    source, ours = encoder(seed=1), encoder()
    official = {f"{prefix}{name}": tensor for name, tensor in parted(source.state_dict()).items()}
    assert len(official) == len(ours.state_dict()) + 2 * 2  # blocks, weights and biases
    coverage = load_encoder(ours, official)
    assert same(ours.state_dict(), source.state_dict())
    assert set(coverage.loaded) == set(ours.state_dict()) and coverage.missing == coverage.unexpected == coverage.reshaped == ()


def test_a_method_with_queries_apart_from_keys_and_values_is_loaded_whole():
    source, ours = droppos(seed=1), droppos(seed=2)
    official = parted(rename(source.state_dict(), TO_OFFICIAL))
    assert "decoder_blocks.0.attn.kv.weight" in official
    coverage = load_method(ours, official, OFFICIAL_NAMES)
    assert same(ours.state_dict(), source.state_dict()) and set(coverage.loaded) == set(ours.state_dict())


def test_fused_rows_are_queries_keys_values_whatever_the_order_in_the_file():
    q, kv = torch.zeros(2, 2), torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]])
    for state in ({"attn.q.weight": q, "attn.kv.weight": kv}, {"attn.kv.weight": kv, "attn.q.weight": q}):
        assert fuse_qkv(state)["attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_other_tensors_pass_as_they_are():
    names = ["blocks.0.attn.qkv.weight", "attn_pool.q.weight", "attn_pool.kv.weight", "cross_attn.q.bias", "attn.q_norm.weight", "q.weight"]
    state = {name: torch.zeros(1) for name in names}
    fused = fuse_qkv(state)
    assert list(fused) == names and all(fused[name] is state[name] for name in names)


@pytest.mark.parametrize(("lost", "left"), [("q", "kv"), ("kv", "q")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_queries_without_keys_and_values_are_refused_by_name(lost, left, kind):
    state, ours = parted(copied(encoder(seed=1))), encoder()
    before, lost, left = copied(ours), f"blocks.1.attn.{lost}.{kind}", f"blocks.1.attn.{left}.{kind}"
    whole = state.pop(lost)
    with pytest.raises(ConversionError, match=rf"^{left} .* goes with {lost}, which is missing"):
        load_encoder(ours, state)
    with pytest.raises(ConversionError, match=rf"{lost}.* is \((15|31)"):
        load_encoder(ours, {left: state.pop(left), lost: whole[1:], **state})
    assert same(ours.state_dict(), before)


# ---- class token and grid


def test_a_class_token_that_the_encoder_lacks_is_left_out_with_its_position():
    source, ours = encoder(seed=1), encoder(class_token=False)
    coverage = load_encoder(ours, source.state_dict())
    assert torch.equal(ours.pos_embed, source.pos_embed[:, 1:])
    assert coverage.unexpected == ("cls_token",) and coverage.reshaped == ("pos_embed",)


def test_a_missing_class_token_is_refused_unless_it_is_named():
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
    rows = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))  # of each cell, its row and its column
    first = int(class_token)
    source.pos_embed.data[:, first:, :2] = rows
    coverage = load_encoder(ours, source.state_dict())
    assert coverage.reshaped == ("pos_embed",) and coverage.missing == coverage.unexpected == ()
    assert torch.equal(ours.pos_embed[:, :first], source.pos_embed[:, :first])
    row, column = ours.pos_embed[0, first:, :2].detach().view(6, 4, 2).unbind(-1)
    torch.testing.assert_close(column, torch.arange(4.0).expand(6, -1), atol=1e-5, rtol=0)
    assert (row.diff(dim=0) > 0).all() and row[0, 0] < 0.5 and row[-1, 0] > 2.5


def test_a_position_embedding_that_is_no_square_cannot_be_resized():
    source, ours = encoder(seed=1, image_size=(24, 16)), encoder()
    before = copied(ours)
    with pytest.raises(ConversionError, match=r"24 patches .*\(4, 4\)"):
        load_encoder(ours, source.state_dict())
    assert same(ours.state_dict(), before)


def test_an_encoder_without_positions_leaves_them_in_the_file():
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


def test_a_method_that_is_not_covered_to_the_last_tensor_is_refused():
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
def test_a_truncated_file_is_refused_by_path(suffix, kept, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    save_file(copied(encoder()), path) if suffix == "safetensors" else torch.save(copied(encoder()), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ConversionError, match=re.escape(str(path)) + ".*truncated"):
        read_checkpoint(path)


def test_a_file_that_is_absent_is_refused_by_path(tmp_path):
    for name in ("gone.pth", "gone.safetensors"):
        with pytest.raises(ConversionError, match=f"no checkpoint at .*{name}"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, torch.zeros(3), [torch.zeros(3)], 7], ids=["no tensors", "a tensor", "a list", "a number"]
)
def test_a_file_without_named_tensors_is_refused_by_path(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ConversionError, match=r"odd\.pth"):
        read_checkpoint(tmp_path / "odd.pth")


def test_a_text_file_is_refused_by_path(tmp_path):
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
    assert victim.exists()  # the file would have done harm


# ---- export


@pytest.mark.parametrize("options", [{}, {"position": "learned"}])
def test_an_exported_encoder_is_timms_model_with_nothing_missing(options, tmp_path):
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
