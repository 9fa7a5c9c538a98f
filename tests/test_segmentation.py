"""Tests of segmentation: images and masks stay together, windows cover an image, scores are right, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import jaccard_score
from torch import nn

from benchmarks.downstream import run_command
from benchmarks.ledger.rows import load
from benchmarks.ledger.verify import verify
from benchmarks.pretrained import find_pretrained
from benchmarks.segmentation import crops as module
from benchmarks.segmentation.__main__ import Options, default_size, main, segment
from benchmarks.segmentation.crops import MOST, Crops
from benchmarks.segmentation.data import IGNORED, open_scenes
from benchmarks.segmentation.linear import Retrieval, Segmenter, shares
from benchmarks.segmentation.score import View, predict, score, windows
from benchmarks.segmentation.upernet import UPerNet, pixel_loss
from common.data import DataError
from common.method import Output
from common.recipe import RecipeError
from common.run import RunError
from common.train import make_fabric
from common.vit import vit

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VIEW = View((32, 48), MEAN, STD, None)


@pytest.fixture
def folder(tmp_path):
    """Six training and three test images of 48 x 64 pixels, of blocks: the red of a pixel is 80 times its class; class 3 is ignored."""
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for index in range(count):
            blocks = numpy.random.default_rng([index, count]).integers(0, 4, (3, 4)).astype(numpy.uint8)
            class_HW = blocks.repeat(16, 0).repeat(16, 1)
            pixels = numpy.stack([80 * class_HW, 0 * class_HW, 0 * class_HW + 9], -1)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}.png")
            Image.fromarray(class_HW).save(tmp_path / "masks" / split / f"{index}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["a", "b", "c", "ignored"], "ignore_index": 3}))
    return tmp_path


def crops(folder, **options) -> Crops:
    given = {"size": (32, 48), "mean": MEAN, "std": STD, "batch_size": 2, "seed": 0, "device": torch.device("cpu"), "workers": 0}
    return Crops(open_scenes(folder), **given | options)


def test_a_crop_and_its_mask_show_the_same_place(folder, monkeypatch):
    monkeypatch.setattr(module, "RandomPhotometricDistort", lambda **_: nn.Identity())
    seen = set()
    for epoch in range(4):
        for images, classes in crops(folder).epoch(epoch):
            assert images.shape[1:] == (3, 32, 48) and classes.shape[1:] == (32, 48)
            red = (images[:, 0] * STD[0] + MEAN[0]) * 255
            outside = (images[:, 2] * STD[2] + MEAN[2]) * 255 > 100  # the mean colour
            assert (classes[outside] == IGNORED).all()
            true = (red / 80).round().where(red < 200, IGNORED)
            sure = ~outside & ((red / 80 - (red / 80).round()).abs() < 0.02)  # not at the border of two blocks
            assert sure.float().mean() > 0.2 and (true[sure] == classes[sure]).float().mean() > 0.99
            seen |= {*classes.unique().tolist()}
    assert seen == {0, 1, 2, IGNORED}


def test_crops_depend_only_on_seed_epoch_and_image(folder):
    whole = list(crops(folder).epoch(3))
    assert len(whole) == 3
    for options in ({"workers": 2}, {"batch_size": 1, "accumulate": 2}):
        found = list(crops(folder, **options).epoch(3))
        for part in (0, 1):
            assert torch.equal(torch.cat([batch[part] for batch in found]), torch.cat([batch[part] for batch in whole]))
    (late,) = crops(folder).epoch(3, start=2)
    assert torch.equal(late[0], whole[2][0])
    assert not torch.equal(next(crops(folder, seed=1).epoch(3))[0], whole[0][0])


def test_the_classes_of_two_processes_are_those_of_one(folder):
    whole = torch.cat([classes for _, classes in crops(folder).epoch(0)])
    ranks = [list(crops(folder, batch_size=1, rank=rank, world_size=2).epoch(0)) for rank in (0, 1)]
    assert torch.equal(torch.cat([classes for pair in zip(*ranks, strict=True) for _, classes in pair]), whole)


def test_a_crop_of_nearly_one_class_is_drawn_again(tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
            class_HW = numpy.zeros((200, 200), numpy.uint8)
            class_HW[:, 100:] = 1
            Image.fromarray(class_HW).save(tmp_path / kind / split / "0.png")
    (tmp_path / "classes.json").write_text('{"names": ["left", "right"]}')
    lone = 0
    for epoch in range(40):
        ((_, classes),) = crops(tmp_path, batch_size=1, size=(32, 32)).epoch(epoch)
        count = torch.bincount(classes.flatten().long(), minlength=2)[:2]
        lone += int(count.max() > MOST * count.sum() + 64)  # up to a row or column at the border
    assert lone < 20  # a box of 32 px in 200 has both in three of four parts in 1 of 9 draws: not in ten tries in 3 of 10 crops


@pytest.mark.parametrize("size", [(32, 48), (16, 16), (40, 70), (200, 30)])
def test_windows_cover_every_pixel_and_none_lies_outside(size):
    image = tuple(max(side, own) for side, own in zip((90, 131), size, strict=True))
    seen = torch.zeros(image)
    for rows, columns in windows(image, size):
        assert seen[rows, columns].shape == size
        seen[rows, columns] += 1
    assert seen.min() == 1


class Colours(nn.Module):
    """The class of a patch of 4 pixels is 0, 1 or 2 by its red: a model without any context."""

    def forward(self, images: torch.Tensor) -> Output:
        red = nn.functional.avg_pool2d((images[:, :1] * STD[0] + MEAN[0]) * 255 / 80, 4)
        return Output(red.new_zeros(()), named={"logits": -(red - torch.arange(3).view(1, 3, 1, 1)).abs()})


@pytest.mark.parametrize("view", [VIEW, View((16, 16), MEAN, STD, None), View((96, 96), MEAN, STD, None), View((32, 48), MEAN, STD, 96)])
def test_a_model_without_context_predicts_the_same_with_any_window(folder, view):
    scenes, fabric = open_scenes(folder), make_fabric("cpu", "32-true")
    for index in range(3):
        image, class_HW = scenes.pair(scenes.val, index)
        found = predict(fabric, Colours(), image, view, class_HW.shape).numpy()
        right = (found == class_HW)[class_HW != IGNORED]
        assert found.shape == class_HW.shape and right.mean() > 0.85  # interpolation is wrong at borders only
        inner = numpy.zeros_like(class_HW, dtype=bool)
        inner[6::16, 6::16] = True
        assert (found == class_HW)[inner & (class_HW != IGNORED)].all()


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    true, found = torch.randint(0, 4, (1000,), generator=generator), torch.randint(0, 5, (1000,), generator=generator)
    scores = score(torch.bincount(6 * true + found, minlength=36).view(6, 6))
    wanted = jaccard_score(true, found, labels=range(5), average=None, zero_division=0)
    numpy.testing.assert_allclose(scores.iou[:5], 100 * wanted)
    assert numpy.isnan(scores.iou[5]) and scores.miou == pytest.approx(100 * wanted.mean())
    assert scores.pixel_accuracy == pytest.approx(100 * (true == found).float().mean().item())
    recall = numpy.mean([(found[true == k] == k).float().mean().item() for k in range(4)])
    assert scores.mean_accuracy == pytest.approx(100 * recall)


def test_the_loss_is_the_mean_over_pixels_with_a_class():
    torch.manual_seed(0)
    model = Segmenter(vit("micro", image_size=(16, 24), patch_size=8, depth=1), 3).train()
    images, classes = torch.randn(2, 3, 16, 24), torch.randint(0, 3, (2, 16, 24)).to(torch.uint8)
    classes[0, :7] = IGNORED
    output = model(images, classes)
    logits = nn.functional.interpolate(output.named["logits"], size=(16, 24), mode="bilinear")
    chance = logits.log_softmax(1).gather(1, classes.long().clamp(max=2)[:, None])[:, 0]
    assert output.loss.item() == pytest.approx(-chance[classes != IGNORED].mean().item(), rel=1e-5)
    assert output.weight == (classes != IGNORED).sum()
    assert model(images, torch.full_like(classes, IGNORED)).loss == 0


def test_a_frozen_encoder_does_not_change_and_has_no_stochastic_depth():
    model = Segmenter(vit("micro", image_size=16, patch_size=8, depth=2, drop_path=0.9), 3, frozen=True).train()
    images, classes = torch.randn(4, 3, 16, 16), torch.randint(0, 3, (4, 16, 16)).to(torch.uint8)
    first, second = model(images, classes), model(images, classes)
    assert torch.equal(first.loss, second.loss)
    first.loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["head.weight", "head.bias"]


def test_the_tokens_of_levels_are_those_between_the_blocks():
    torch.manual_seed(0)
    encoder = vit("micro", image_size=16, patch_size=8, depth=4).eval()
    images = torch.randn(2, 3, 16, 16)
    first, last = encoder.levels(images, (1, 3))
    torch.testing.assert_close(encoder.norm(last), encoder(images))
    torch.testing.assert_close(encoder.norm(first), encoder.last_blocks(images, 3)[0])


def test_upernet_has_the_pyramid_of_mmsegmentation_and_its_loss():
    pytest.importorskip("mmseg", reason="the extra seg is not installed")
    from mmseg.models.losses import CrossEntropyLoss

    torch.manual_seed(0)
    model = UPerNet(vit("micro", image_size=(32, 64), patch_size=16, depth=6), 5)
    assert model.blocks == (1, 2, 3, 5) and UPerNet(vit("micro", image_size=16, depth=12), 5).blocks == (3, 5, 7, 11)
    images, classes = torch.randn(2, 3, 32, 64), torch.randint(0, 5, (2, 32, 64)).to(torch.uint8)
    classes[0, :7] = IGNORED
    output = model(images, classes)
    assert output.named["logits"].shape == (2, 5, 8, 16) and output.weight is None
    pixels = nn.functional.interpolate(output.named["logits"], size=(32, 64), mode="bilinear")
    wanted = CrossEntropyLoss()(pixels, classes.long(), ignore_index=IGNORED)  # over all pixels, as in the published runs
    assert pixel_loss(output.named["logits"], classes).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert output.loss > wanted  # with the auxiliary head


def test_windows_are_those_of_mmsegmentation():
    segmentors = pytest.importorskip("mmseg.models.segmentors", reason="the extra seg is not installed")
    head = {"type": "FCNHead", "in_channels": 3, "channels": 3, "num_convs": 0, "num_classes": 3, "concat_input": False}
    cut = pytest.importorskip("mmengine").ConfigDict(mode="slide", crop_size=(16, 24), stride=(10, 16))
    whole = segmentors.EncoderDecoder(backbone={"type": "ResNet", "depth": 18}, decode_head=head, train_cfg={}, test_cfg=cut)
    seen = []
    whole.encode_decode = lambda crop, _: seen.append(tuple(crop[0, 0, 0, :1].int().tolist())) or crop
    corners = torch.arange(50 * 70).view(1, 1, 50, 70).expand(1, 3, 50, 70).float()
    whole.slide_inference(corners, [{"img_shape": (50, 70)}])
    assert seen == [(rows.start * 70 + columns.start,) for rows, columns in windows((50, 70), (16, 24))]


def test_without_mmsegmentation_its_engine_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg.models.decode_heads", None)
    given = ["--data", str(folder), "--paper", "mae", "--recipe", "cifar10", "--batch", "2", "--device", "cpu", "--epochs", "1"]
    assert main([*given, "--set", "size=micro", "--engine", "mmseg", "--out", str(folder / "runs")]) == 2
    assert "ENGINE=mmseg needs mmsegmentation" in capsys.readouterr().out


def test_patches_find_themselves_in_memory():
    torch.manual_seed(0)
    model = Retrieval(vit("micro", image_size=(16, 24), patch_size=8, depth=1), 5, neighbours=2, temperature=1e-4).eval()
    images = torch.randn(3, 3, 16, 24)
    share_RK = torch.rand(18, 5)
    model.remember(model.tokens(images), share_RK)
    found = model(images).named["logits"]
    assert found.shape == (3, 5, 2, 3)
    torch.testing.assert_close(found.flatten(2).mT.reshape(18, 5), share_RK, atol=1e-4, rtol=0)


def test_shares_of_a_patch_are_those_of_its_pixels_and_none_without_half_of_them():
    classes = torch.full((1, 4, 8), IGNORED, dtype=torch.uint8)
    classes[0, :, :4] = 1
    classes[0, 0, :2] = 0
    classes[0, 0, 4:6] = 0
    torch.testing.assert_close(shares(classes, (1, 2), 3), torch.tensor([[[[2 / 16, 14 / 16, 0], [0, 0, 0]]]]))


@pytest.mark.parametrize(("patch", "side"), [(None, 512), (16, 512), (14, 518)])
def test_the_default_size_of_ade20k_is_whole_patches(patch, side, folder):
    assert default_size(replace(open_scenes(folder), short_side=512), patch) == (side, side)


def test_ade20k_and_pascal_voc_are_read_in_their_layouts(tmp_path):
    image, mask = Image.new("RGB", (20, 10)), Image.fromarray(numpy.array([[0, 1, 150, 7]], numpy.uint8).repeat(10, 0).repeat(5, 1))
    for split in ("training", "validation"):
        for kind, picture in (("images", image), ("annotations", mask)):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
            picture.save(tmp_path / "ade" / kind / split / f"a{'.jpg' if kind == 'images' else '.png'}")
    ade = open_scenes(tmp_path / "ade")
    assert ade.name == "ade20k" and len(ade.classes) == 150 and len(ade.train) == len(ade.val) == 1
    assert ade.mask(ade.val.masks[0])[0, ::5].tolist() == [IGNORED, 0, 149, 6]
    voc = tmp_path / "voc"
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / kind).mkdir(parents=True)
    for split, name in (("train", "x"), ("val", "y")):
        (voc / "ImageSets/Segmentation" / f"{split}.txt").write_text(f"{name}\n")
        image.save(voc / "JPEGImages" / f"{name}.jpg")
        palette = Image.fromarray(numpy.array([[0, 20, 255, 15]], numpy.uint8).repeat(10, 0).repeat(5, 1), mode="P")
        palette.putpalette([9] * 768)
        palette.save(voc / "SegmentationClass" / f"{name}.png")
    scenes = open_scenes(voc)
    assert scenes.name == "voc2012" and len(scenes.classes) == 21 and scenes.val.images == (str(voc / "JPEGImages" / "y.jpg"),)
    assert scenes.mask(scenes.val.masks[0])[0, ::5].tolist() == [0, 20, IGNORED, 15]


def _spoil_mask(folder):
    class_HW = numpy.asarray(Image.open(folder / "masks/val/1.png")).copy()
    class_HW[0, :5] = 7
    Image.fromarray(class_HW).save(folder / "masks/val/1.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_mask, r"masks/val/1.png has the value 7 at 5 pixels, but classes are 0 to 2, and 3 is ignored"),
        (
            lambda folder: (folder / "masks/val/1.png").unlink(),
            r"1 of 3 files have no mask in .*, the first is .*images/val/1.png",
        ),
        (lambda folder: (folder / "images/val/1.png").unlink(), r"1 of 3 files have no image in .*, the first is .*masks/val/1.png"),
        (lambda folder: Image.new("L", (5, 4)).save(folder / "masks/train/0.png"), r"0.png has 48 x 64 pixels, but its mask .* has 4 x 5"),
        (lambda folder: Image.new("RGB", (64, 48)).save(folder / "masks/train/0.png"), r"has colours \(RGB\), not a class index"),
        (lambda folder: (folder / "classes.json").unlink(), r"neither ADE20K nor Pascal VOC and has no classes.json"),
        (lambda folder: (folder / "classes.json").write_text("{}"), r"classes.json is not .*names"),
        (lambda folder: (folder / "masks/train/0.png").write_bytes(b"no"), r"masks/train/0.png cannot be read as a mask"),
    ],
)
def test_wrong_data_is_refused_before_the_training(spoil, message, folder):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        segment(Options(data=folder, paper="mae", recipe="cifar10", device="cpu", out=folder / "runs"))
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "DATA=nowhere is not a folder"),
        (["--paper", "dropos"], "PAPER='dropos' is not known; did you mean droppos or drloc?"),
        (["--checkpoint", "nowhere.pth"], "CKPT=nowhere.pth does not exist"),
        (["--size", "30", "48"], "30 x 48 pixels are not a multiple of the encoder's patch size 4"),
        (["--set", "patch_size=64"], "0.png has 48 x 64 pixels, less than a patch of 64 x 64"),
        (["--recipe", "cifar1"], "RECIPE='cifar1' is not known"),
        (["--engine", "mmseg", "--batch", "1"], "ENGINE=mmseg normalises over a batch, and BATCH=1 leaves 1 crop for a forward pass"),
        (["--engine", "mmseg", "--batch", "2", "--device-batch", "1"], "on each device: raise BATCH or --device-batch"),
        (["--batch", "7"], "6 training images are fewer than a batch of 7: lower BATCH"),
    ],
)
def test_bad_options_are_refused(arguments, message, folder, capsys, tmp_path):
    given = ["--data", str(folder), "--paper", "mae", "--recipe", "cifar10", "--device", "cpu", "--out", str(tmp_path / "runs"), *arguments]
    assert main(given) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_part_of_the_images_is_not_recorded(folder):
    with pytest.raises(RecipeError, match="--record with --limit 2: a result of a part of the images is not recorded"):
        Options(data=folder, record=True, limit=2)


def test_an_encoder_is_found_in_a_run_and_in_a_file_or_refused(tmp_path):
    run = tmp_path / "run" / "pretrain"
    run.mkdir(parents=True)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    save_file(model.state_dict(), run / "encoder.safetensors")
    sizes = {"size": "tiny", "image_size": 224, "patch_size": 16, "encoder": {"depth": 2, "position": "learned"}, "pretrain": {"epochs": 7}}
    (run / "recipe.json").write_text(json.dumps({"paper": "mae", "recipe": sizes}))
    card = {"recipe": "mine", "arm": "", "overrides": [], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    (run / "card.json").write_text(json.dumps(card))
    images = torch.randn(1, 3, 224, 224)
    changed = ["size=tiny", "encoder.depth=2", "encoder.position=learned"]
    of_file = find_pretrained(run / "encoder.safetensors", None)
    (tmp_path / "timm.safetensors").write_bytes((run / "encoder.safetensors").read_bytes())
    for found in (find_pretrained(tmp_path / "run", "mae"), of_file, find_pretrained(tmp_path / "timm.safetensors", "mae", None, changed)):
        encoder, _ = found.encoder((224, 224))
        torch.testing.assert_close(encoder.eval()(images), model.eval().forward_features(images), atol=2e-5, rtol=1e-4)
    assert of_file.given == "run/encoder.safetensors" and of_file.label == "mae-run"
    assert of_file.epochs == 7 and of_file.mean == (0.1, 0.2, 0.3)
    wide, _ = of_file.encoder((32, 64))
    assert wide.grid == (2, 4) and torch.isfinite(wide(torch.randn(1, 3, 32, 64))).all()
    with pytest.raises(RecipeError, match="is of mae, not of PAPER=droppos"):
        find_pretrained(tmp_path / "run", "droppos")
    with pytest.raises(RunError, match=r"has no pretrain/encoder.safetensors"):
        find_pretrained(tmp_path, None)
    for more in ({"recipe": "mine"}, {"changes": ["size=base"]}):
        with pytest.raises(RecipeError, match="is a run and knows its recipe: leave RECIPE= and --set out"):
            find_pretrained(tmp_path / "run", None, **more)
    with pytest.raises(RecipeError, match="PAPER= is missing"):
        find_pretrained(tmp_path / "timm.safetensors", None)
    with pytest.raises(ValueError, match="width 192 in the file, 768 here"):
        find_pretrained(tmp_path / "timm.safetensors", "mae").encoder((32, 32))


SMALL = ["--paper", "mp3", "--recipe", "digits", "--set", "patch_size=8", "--set", "encoder.depth=2", "--batch", "2", "--device", "cpu"]


@pytest.mark.parametrize("options", [[], ["--frozen"], ["--engine", "knn"]])
def test_each_protocol_runs_to_its_end_and_is_not_run_again(options, folder, tmp_path, capsys):
    given = ["--data", str(folder), *SMALL, "--epochs", "2", "--workers", "0", "--out", str(tmp_path / "runs"), *options]
    assert main(given) == 0
    (result,) = (tmp_path / "runs").glob("segmentation/*/*/result.json")
    found, when = json.loads(result.read_text()), result.stat().st_mtime_ns
    assert found["hours"] > 0
    assert 0 <= found["miou"] <= 100 and len(found["iou"]) == 3 and (result.parent / "pictures.png").stat().st_size > 10_000
    capsys.readouterr()
    assert main(given) == 0
    assert f"{found['miou']:.2f}" in capsys.readouterr().out and result.stat().st_mtime_ns == when


def test_recorded_rows_are_found_in_the_log_and_those_of_other_options_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.segmentation.__main__.ROOT", tmp_path)
    (tmp_path / "benchmarks" / "segmentation").mkdir(parents=True)
    given = ["--data", str(folder), *SMALL, "--workers", "0", "--record"]
    for number, options in enumerate((["--epochs", "1"], ["--epochs", "1", "--size", "32", "32", "--lr", "0.01"], ["--engine", "knn"])):
        assert main([*given, *options, "--out", str(tmp_path / str(number))]) == 0
    assert verify(tmp_path)[1] == []
    rows = load(tmp_path / "benchmarks" / "segmentation" / "results.csv")
    shared = "patch_size=8 encoder.depth=2"
    options = ["--epochs 1 --batch 2", "--size 32 32 --epochs 1 --batch 2 --lr 0.01", "--batch 2"]
    assert [*rows["overrides"]] == [f"{shared} {own}" for own in options for _ in range(3)]


def test_a_run_with_another_stochastic_depth_is_not_taken_for_the_same(folder, tmp_path, capsys):
    given = ["--data", str(folder), *SMALL, "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "runs")]
    assert main(given) == 0 and main([*given, "--drop-path", "0.3"]) == 2
    assert "encoder.drop_path: 0.1 there, 0.3 requested" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(folder, tmp_path):
    given = [sys.executable, "-m", "benchmarks.segmentation", "--data", str(folder), *SMALL, "--epochs", "60", "--checkpoint-seconds", "0"]
    for out in ("whole", "stopped"):
        command = [*given, "--out", str(tmp_path / out)]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if out == "stopped":
            end = time.monotonic() + 60
            while not list((tmp_path / out).glob("segmentation/*/*/checkpoint.pt")):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
            process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.wait(120) == 0
    found = [next((tmp_path / out).glob("segmentation/*/*/result.json")) for out in ("whole", "stopped")]
    one, other = (json.loads(path.read_text()) for path in found)
    assert one["iou"] == other["iou"] and "resuming from step" in (found[1].parent / "log.txt").read_text()
    assert (found[0].parent / "metrics.jsonl").read_text() == (found[1].parent / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"{CAMVID} is not there")
def test_street_scenes_are_learned_from_a_few_images(tmp_path):
    options = Options(data=CAMVID, paper="mae", recipe="cifar10", set=["patch_size=16", "size=micro"], device="cpu", limit=24, batch=4)
    options.size, options.epochs, options.out, options.lr, options.workers = (176, 240), 40, tmp_path, 1e-3, 1
    rows = {row.metric: row.value for row in segment(options)}
    assert rows["pixel_accuracy"] > 50 and rows["miou"] > 10  # the largest class alone: a third of the pixels, and 3


def test_too_little_memory_says_which_setting_to_lower(capsys):
    assert run_command(lambda: torch.empty(10**15), "lower --device-batch") == 2
    assert re.search("the memory is too small .*: lower --device-batch", " ".join(capsys.readouterr().out.split()))
    with pytest.raises(RuntimeError, match="size mismatch|shape"):  # another error is a fault of the program
        run_command(lambda: torch.zeros(2) @ torch.zeros(3, 3), "")
