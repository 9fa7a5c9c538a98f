"""Tests of MaPeT's checkpoints with official names: the inferred model, the same predictions as timm, and refused files.

The names and shapes come from running the official code; the released files could not be downloaded.
"""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

import mapet.validate
from common.convert import load_encoder, read_checkpoint
from common.evaluate import Classifier, accuracy
from common.recipe import Protocol, TrainConfig
from common.vit import SIZES, vit
from mapet.validate import build_classifier, load_classifier, main

CLASSES = 7
# After resizing, the long side has a fraction below half a pixel: torchvision truncates it, common.data rounds it.
SHAPES = [(200, 230), (230, 200), (200, 280), (280, 200), (250, 250)]


def official_state(size: str = "tiny", pool: str = "mean", *, scaled=True, side=14, patch=16, classes=CLASSES, device="cpu"):
    """The tensors of vit_standard_{size}; if `pool` is empty, those of mapet_{size}, the pre-training checkpoint."""
    (width, depth, _), g = SIZES[size], torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width)}
    layers = {"patch_embed.proj": (width, 3, patch, patch)}
    for block in (f"blocks.{number}." for number in range(depth)):
        layers |= {f"{block}norm1": (width,), f"{block}attn.q": (width, width), f"{block}attn.kv": (2 * width, width)}
        layers |= {f"{block}attn.proj": (width, width), f"{block}norm2": (width,)}
        layers |= {f"{block}mlp.fc1": (4 * width, width), f"{block}mlp.fc2": (width, 4 * width)}
        shapes |= {f"{block}ls{branch}.gamma": (width,) for branch in (1, 2) if scaled}
    layers |= {"fc_norm" if pool == "mean" else "norm": (width,), "head" if pool else "decoder": (classes, width)}
    shapes |= {} if pool else {"mask_positional_token": (1, 1, width)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if device == "meta":
        return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    # 0.02 is the official std; all values are random, so that no zero hides an error
    state = {name: 0.02 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {name: tensor + ("norm" in name and name.endswith("weight")) for name, tensor in state.items()}


def saved(path: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    """Write a file as timm's CheckpointSaver does."""
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    moments = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 5e-4, "params": [0]}]}
    options = argparse.Namespace(model="vit_standard_tiny_patch16_224", lr=5e-4, opt_betas=None, aa="rand-m9-mstd0.5", mean=[0.5])
    content = {"epoch": 99, "arch": options.model, "state_dict": state, "optimizer": moments, "version": 2, "args": options}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(content | {"state_dict_ema": zeros, "metric": 83.6}, path)
    return path


def timm_model(state: dict[str, Tensor], pool: str, side: int, patch: int) -> nn.Module:
    """timm's model with these tensors, converted independently of our code."""
    fused = {name: tensor for name, tensor in state.items() if ".attn.q." not in name and ".attn.kv." not in name}
    for number in range(12):
        for kind in ("weight", "bias"):
            q, kv = (state[f"blocks.{number}.attn.{part}.{kind}"] for part in ("q", "kv"))
            fused[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([q, kv], 0)
    scale = 0.1 if "blocks.0.ls1.gamma" in state else None
    options = {"global_pool": "avg" if pool == "mean" else "token", "init_values": scale, "num_classes": CLASSES}
    model = timm.create_model("vit_tiny_patch16_224", img_size=side * patch, patch_size=patch, **options)
    model.load_state_dict(fused, strict=True)
    return model.eval()


def save_image(path: Path, number: int) -> Path:
    """Save an image of a few large color areas, different for each number."""
    blots = torch.randint(256, (4, 5, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    height, width = SHAPES[number % len(SHAPES)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blots.numpy()).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def as_timm_sees(paths: list[Path | str], size: int) -> Tensor:
    """Images (B, 3, H, W) by timm's own evaluation transform, as the official validate.py sets it."""
    transform = create_transform(size, crop_pct=0.9, interpolation="bicubic", is_training=False)
    if size == 224:
        assert re.search(r"Resize\(size=248, interpolation=bicubic.*CenterCrop\(size=\(224, 224\)\)", str(transform), re.DOTALL)
        assert "mean=tensor([0.4850, 0.4560, 0.4060]), std=tensor([0.2290, 0.2240, 0.2250])" in str(transform)
    return torch.stack([transform(Image.open(path)) for path in paths])


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint of a small network, for the tests of refused input."""
    return saved(tmp_path_factory.mktemp("released") / "vit_standard_tiny.tar", official_state(side=2, patch=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two validation images of each class, no training images."""
    root = tmp_path_factory.mktemp("images")
    for number in range(2 * CLASSES):
        save_image(root / "val" / f"class{number % CLASSES}" / f"{number}.png", number)
    return root


def run(capsys, folder: Path, checkpoint: Path, *more: object) -> tuple[int, str]:
    """Return the exit code and the printed text."""
    common = ("--checkpoint", checkpoint, "--workers", 0, "--device", "cpu")
    code = main([str(word) for word in (folder, *common, *more)])
    return code, capsys.readouterr().out


def refused(capsys, folder: Path, checkpoint: Path, *more: object) -> str:
    code, said = run(capsys, folder, checkpoint, *more)
    said, _, error = said.rpartition("error: ")
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in said
    return error


# ---- the model inferred from a classifier


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 5_722_024), ("small", 22_059_880), ("base", 86_586_088)])
def test_a_classifier_of_200_tensors_gives_a_model_with_as_many_parameters(size, parameters):
    with torch.device("meta"):
        state = official_state(size, classes=1000, device="meta")
        model = build_classifier(state)
    assert len(state) == 200 and sum(tensor.numel() for tensor in state.values()) == parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.pool, model.head.out_features, model.encoder.blocks[0].attn.heads) == ("mean", 1000, SIZES[size][2])
    assert (model.encoder.image_size, model.encoder.patch_size, model.encoder.prefix_tokens) == ((224, 224), 16, 1)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("scaled", [True, False])
def test_pooling_layer_scale_and_sizes_are_inferred_from_the_tensors(pool, scaled, tmp_path):
    state = official_state(pool=pool, scaled=scaled, side=3, patch=8, classes=5)
    model, coverage, held = load_classifier(saved(tmp_path / "some.tar", state))
    assert (model.pool, model.head.out_features, model.encoder.image_size, model.encoder.patch_size) == (pool, 5, (24, 24), 8)
    assert hasattr(model.encoder.blocks[0].ls1, "gamma") == scaled
    assert held == len(state) and len(coverage.loaded) == held - 24 and coverage.missing == coverage.unexpected == coverage.reshaped == ()


# ---- predictions


@pytest.mark.parametrize(
    ("pool", "scaled", "side", "patch", "prefix", "part"), [("mean", True, 14, 16, "", "val"), ("class", False, 4, 8, "module.", ".")]
)
def test_the_printed_accuracies_equal_timms_on_the_same_images(pool, scaled, side, patch, prefix, part, tmp_path, capsys, monkeypatch):
    state = official_state(pool=pool, scaled=scaled, side=side, patch=patch)
    checkpoint, theirs = saved(tmp_path / "vit_standard_tiny_KCLIP.tar", state, prefix), timm_model(state, pool, side, patch)
    with torch.inference_mode():
        drawn = [save_image(tmp_path / "drawn" / f"{number}.png", number) for number in range(20)]
        logits_BK = theirs(as_timm_sees(drawn, side * patch))
    # Each goes into the folder of its best, second best, sixth best or worst class; empty folders get image 0.
    ranked_BK = logits_BK.argsort(descending=True)
    labels = [ranked_BK[number, (0, 0, 1, 5, 6)[number % 5]].item() for number in range(20)]
    chosen = [*enumerate(labels), *((0, label) for label in range(CLASSES) if label not in labels)]
    for number, label in chosen:
        save_image(tmp_path / "images" / part / f"class{label}" / f"{number}.png", number)
    right = torch.tensor([(ranked_BK[number] == label).nonzero().item() for number, label in chosen])
    top1, top5 = (100 * (right < k).double().mean().item() for k in (1, 5))
    assert 25 < top1 < 50 < top5 < 75  # not at chance level: 14 and 71

    shown = []
    monkeypatch.setattr("common.evaluate.protocols.accuracy", lambda *given: shown.append(given) or accuracy(*given))
    code, said = run(capsys, tmp_path / "images", checkpoint, "--batch-size", 8)
    assert code == 0
    first, last = said.splitlines()
    held = len(state)
    assert f"vit_standard_tiny_KCLIP.tar: {held - 24} tensors loaded, 0 missing, 0 unexpected (of {held} in the file" in first
    assert f"ViT-tiny/{patch} {'with' if scaled else 'without'} LayerScale, {pool} pooling, {CLASSES} classes" in first
    assert f"short side to {int(side * patch / 0.9)} px (bicubic), center crop {side * patch} px" in first
    assert last.startswith(f"{len(chosen)} images of images: top-1 {top1:.3f} %, top-5 {top5:.3f} %, ") and "32-true" in last

    ((_, model, loader),) = shown
    images_BCHW = torch.cat([images for images, _ in loader.epoch(0)])
    expected_BCHW = as_timm_sees(loader.split.paths, side * patch)
    assert torch.equal(images_BCHW, expected_BCHW)
    with torch.inference_mode():
        torch.testing.assert_close(model(images_BCHW).named["logits"], theirs(expected_BCHW), atol=1e-6, rtol=0)


def test_only_a_long_run_prints_its_progress(folder, released, capsys, monkeypatch):
    assert len(run(capsys, folder, released, "--batch-size", 4)[1].splitlines()) == 2
    monkeypatch.setattr(mapet.validate, "PROGRESS_SECONDS", -1.0)
    lines = run(capsys, folder, released, "--batch-size", 4)[1].splitlines()[1:-1]
    assert [line.split(", ")[0] for line in lines] == ["4 of 14 images", "8 of 14 images", "12 of 14 images"]
    assert all(re.search(r", \d+\.\d images/s, \d+ s left$", line) for line in lines)


def test_an_unreadable_image_stops_validation_unless_skip_corrupt_is_set(released, tmp_path, capsys):
    for number in range(CLASSES):
        save_image(tmp_path / f"class{number}" / "a.png", number)
    (tmp_path / "class3" / "b.png").write_text("<html>")
    assert "b.png cannot be read as an image" in refused(capsys, tmp_path, released)
    assert "8 images" in run(capsys, tmp_path, released, "--skip-corrupt")[1]


# ---- refused input


def test_a_missing_or_truncated_file_is_refused_with_its_path(folder, released, tmp_path, capsys):
    assert f"there is no checkpoint at {tmp_path / 'gone.tar'}" in refused(capsys, folder, tmp_path / "gone.tar")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(released.read_bytes()[:100_000])
    assert f"{cut} cannot be read as a checkpoint (truncated" in refused(capsys, folder, cut)


def test_a_pre_training_checkpoint_is_refused(folder, tmp_path, capsys):
    path = saved(tmp_path / "mapet_tiny.tar", official_state(pool="", side=2, patch=4))
    assert f"{path}: this is a pre-training checkpoint" in refused(capsys, folder, path)


def without(state: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(ends)}


NORM = {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "head.weight", "pos_embed"), "as it lacks pos_embed, head.weight; use one of the released"),
        (lambda state: state | {"pos_embed": state["pos_embed"][0]}, "as it lacks pos_embed;"),
        (lambda state: timm_model(state, "mean", 2, 4).state_dict(), "as it lacks blocks.0.attn.q.weight;"),
        (lambda state: state | NORM, "as it has both of fc_norm and norm;"),
        (lambda state: without(state, "fc_norm.weight"), "as it has neither of fc_norm and norm;"),
        (lambda state: state | {"patch_embed.proj.weight": torch.zeros(192, 1, 4, 4)}, "has width 192, 1 channels and 4 patches;"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 7, 192)}, "has width 192, 3 channels and 6 patches;"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 0, 192)}, "has width 192, 3 channels and -1 patches;"),
        (lambda state: without(state, "blocks.11.attn.kv.bias"), "blocks.11.attn.kv.bias, which is missing"),
        (lambda state: without(state, "fc_norm.bias", "ls2.gamma"), "13 missing, 0 unexpected; missing: encoder.blocks.0.ls2.gamma"),
        (lambda state: state | {"surprise": torch.zeros(1)}, "unexpected: encoder.surprise"),
        (lambda state: state | {"head.bias": torch.zeros(8)}, "other shapes: head.bias"),
    ],
)
def test_tensors_of_another_network_are_refused_with_the_reason(change, message, folder, tmp_path, capsys):
    path = saved(tmp_path / "odd.tar", change(official_state(side=2, patch=4)))
    said = refused(capsys, folder, path)
    assert said.startswith(f"{path}: ") and message in said


def test_another_width_is_refused_with_the_known_ones(folder, tmp_path, capsys):
    path = saved(tmp_path / "micro.tar", official_state("micro", side=2, patch=4))
    expected = "has width 96, 3 channels and 4 patches; the released ones have width 192 (tiny), 384 (small) or 768 (base)"
    assert expected in refused(capsys, folder, path)


def test_a_wrong_number_of_class_folders_is_refused_with_both_numbers(released, tmp_path, capsys):
    for number in range(3):
        save_image(tmp_path / "val" / f"class{number}" / "a.png", number)
    expected = f"{tmp_path / 'val'} has 3 class folders, the first is class0, and the classifier has 7 classes"
    assert expected in refused(capsys, tmp_path, released)
    assert "val/class0 has no class folders" in refused(capsys, tmp_path / "val" / "class0", released)
    assert f"{tmp_path / 'gone'} is not a folder" in refused(capsys, tmp_path / "gone", released)


def test_a_missing_device_and_an_empty_batch_are_refused(folder, released, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA GPU" in refused(capsys, folder, released, "--device", "cuda")
    assert "batch_size=0: it must be at least 1" in refused(capsys, folder, released, "--batch-size", 0)


# ---- from pre-training to fine-tuning


@pytest.mark.parametrize(
    ("pool", "fresh"),
    [("mean", {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}), ("class", {"head.weight", "head.bias"})],
)
def test_fine_tuning_loads_all_pre_trained_tensors_except_the_head(pool, fresh, tmp_path):
    """As in the official code: 196 of the 200 tensors with mean pooling (its norm is new), 198 with class pooling."""
    state = official_state(pool="", side=2, patch=4)
    encoder = vit("tiny", image_size=8, patch_size=4, position="learned", layer_scale=0.1)
    coverage = load_encoder(encoder, read_checkpoint(saved(tmp_path / "mapet_tiny.tar", state)))
    assert coverage.missing == () and coverage.unexpected == ("decoder.bias", "decoder.weight", "mask_positional_token")
    ours = Classifier(
        encoder, CLASSES, Protocol(name="finetune", kind="finetune", stage=TrainConfig(epochs=1, batch_size=2, base_lr=1e-3), pool=pool)
    ).state_dict()
    found = {}
    for name, tensor in ours.items():
        name = name.removeprefix("encoder.")
        q, kv = tensor.split([192, 384]) if ".qkv." in name else (tensor, None)
        found |= {name: tensor} if kv is None else {name.replace("qkv", "q"): q, name.replace("qkv", "kv"): kv}
    assert found.keys() == official_state(pool=pool, side=2, patch=4, device="meta").keys() and len(found) == 200
    from_file = {name for name in found if name in state and torch.equal(found[name], state[name])}
    assert found.keys() - from_file == fresh and len(from_file) == 200 - len(fresh)
