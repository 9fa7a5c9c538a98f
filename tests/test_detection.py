"""benchmarks/detection: data, operators, training and scores. The backbone is tested in test_vitdet.py."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("pycocotools", reason='pycocotools is not installed: pip install -e ".[det]"')

# ruff: noqa: E402
from pycocotools import mask as coco_mask

from benchmarks.detection.__main__ import Options, main
from benchmarks.detection.crops import Crops, jitter
from benchmarks.detection.data import detectron2_mask, encoded, open_detections, trained
from benchmarks.detection.operators import nms, roi_align
from benchmarks.detection.torchvision_engine import Detector, score
from benchmarks.detection.vitdet import SimpleFeaturePyramid, WindowedViT
from benchmarks.ledger.rows import load
from benchmarks.ledger.verify import verify
from common.data import DataError
from common.optim import make_optimizer
from common.recipe import RecipeError
from common.train import EXIT_STOPPED
from common.vit import vit

ROOT = Path(__file__).resolve().parents[1]
COCO = ROOT.parent / "shared" / "data" / "coco"
GREY = torch.full((3,), 128, dtype=torch.uint8)
SMALL = ["--paper", "droppos", "--set", "size=micro", "--image-size", "128", "--window", "4", "--channels", "16", "--precision", "32-true"]
SMALL += ["--device", "cpu", "--workers", "0", "--batch", "2"]


def annotation(number: int, image: int, box: list[float], category: int = 10, **more) -> dict:
    x, y, width, height = box
    shape = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "segmentation": shape, "iscrowd": 0} | more


def write(folder: Path, annotations: list[dict] | None = None, split: str = "train") -> Path:
    """A data set of four images of 100 x 80 pixels with red (10) and blue (20) rectangles; `annotations` replace those of a split."""
    boxes = {1: [10, 20, 40, 30], 2: [50, 10, 45, 60], 3: [0, 0, 30, 30], 4: [20, 40, 30, 30]}
    usual = [annotation(image, image, box, 10 * (1 + image % 2)) for image, box in boxes.items()]
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for image, (x, y, width, height) in boxes.items():
        pixels = numpy.zeros((80, 100, 3), numpy.uint8)
        pixels[y : y + height, x : x + width] = (30, 30, 255) if image % 2 else (255, 30, 30)
        Image.fromarray(pixels).save(folder / "images" / f"{image}.png")
    for name in ("train", "val"):
        content = {
            "images": [{"id": image, "file_name": f"{image}.png", "height": 80, "width": 100} for image in boxes],
            "annotations": annotations if annotations is not None and name == split else usual,
            "categories": [{"id": 20, "name": "blue"}, {"id": 10, "name": "red"}],
        }
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return folder


def change(folder: Path, edit) -> None:
    """Change the annotation file of the training images."""
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# operators


def overlap(a: list[float], b: list[float]) -> float:
    sides = [max(0.0, min(a[end + 2], b[end + 2]) - max(a[end], b[end])) for end in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def test_nms_keeps_a_box_unless_a_kept_one_with_a_higher_score_overlaps_it():
    torch.manual_seed(0)
    corner = torch.rand(60, 2) * 50
    boxes, scores = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 30], 1), torch.rand(60)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[index].tolist(), boxes[other].tolist()) <= 0.5 for other in kept):
            kept.append(index)
    assert nms(boxes, scores, 0.5).tolist() == kept
    assert 5 < len(kept) < 60
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []


def sample(map_HW: torch.Tensor, y: float, x: float) -> float:
    """Bilinear interpolation, with the rule of RoIAlign at the border: 0 more than a cell outside."""
    H, W = map_HW.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return 0.0
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    top, left = int(y), int(x)
    total = 0.0
    for row, share in ((top, 1 - y + top), (min(top + 1, H - 1), y - top)):
        for column, part in ((left, 1 - x + left), (min(left + 1, W - 1), x - left)):
            total += share * part * float(map_HW[row, column])
    return total


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
def test_roi_align_is_the_mean_of_interpolated_samples(ratio, aligned):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 6, 7)
    regions = torch.tensor([[0, 1.0, 2, 9, 11], [1, -6, -4, 8, 8], [1, 0, 0, 14, 12], [0, 5, 5, 5.5, 5.2]])
    found = roi_align(maps, regions, (2, 3), 0.5, ratio, aligned)
    for number, (image, *corners) in enumerate(regions.tolist()):
        left, top, right, bottom = (0.5 * value - 0.5 * aligned for value in corners)
        sides = [end - start if aligned else max(1.0, end - start) for start, end in ((top, bottom), (left, right))]
        counts = [ratio if ratio > 0 else max(1, math.ceil(side / bins)) for side, bins in zip(sides, (2, 3), strict=True)]
        for channel in range(3):
            for p in range(2):
                for q in range(3):
                    values = [
                        sample(
                            maps[int(image), channel],
                            top + sides[0] / 2 * (p + (i + 0.5) / counts[0]),
                            left + sides[1] / 3 * (q + (j + 0.5) / counts[1]),
                        )
                        for i in range(counts[0])
                        for j in range(counts[1])
                    ]
                    assert found[number, channel, p, q].item() == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_roi_align_has_the_gradient_of_its_weights_and_no_region_gives_an_empty_result():
    torch.manual_seed(0)
    maps = torch.randn(1, 2, 5, 5, requires_grad=True)
    regions = torch.tensor([[0, 0.7, 1.1, 6.3, 7.9]])
    gradient = torch.randn(1, 2, 2, 2)
    roi_align(maps, regions, 2, 0.5, 2).backward(gradient)
    # the operator is linear in the maps: a change of one cell changes the result by its weights
    for cell in ((0, 0, 1, 1), (0, 1, 2, 3)):
        changed = maps.detach().clone()
        changed[cell] += 1
        difference = roi_align(changed, regions, 2, 0.5, 2) - roi_align(maps.detach(), regions, 2, 0.5, 2)
        assert maps.grad[cell].item() == pytest.approx((difference * gradient).sum().item(), abs=1e-5)
    assert roi_align(maps, [torch.zeros(0, 4)], 2).shape == (0, 2, 2, 2)


# data


def test_boxes_and_masks_follow_the_image_under_large_scale_jitter():
    pixels = numpy.zeros((80, 100, 3), numpy.uint8)
    pixels[20:60, 30:80] = 255
    mask = (pixels[:, :, 0] > 0).astype(numpy.uint8)[None]
    sizes, cut = set(), 0
    for seed in range(40):
        torch.manual_seed(seed)
        square, target = jitter(Image.fromarray(pixels), mask, numpy.array([3]), 64, GREY)
        height, width = target["size"]
        sizes.add((height, width))
        assert (square[:, height:] == 128).all() and (square[:, :, width:] == 128).all()
        if not len(target["boxes"]):
            assert not (square[0, :height, :width] > 200).any()
            continue
        assert target["labels"].tolist() == [4]
        seen = square[0] > 127
        seen[height:], seen[:, width:] = False, False
        cut += bool(seen[0].any() or seen[height - 1].any() or seen[:, 0].any() or seen[:, width - 1].any())
        rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
        if len(rows) and height > 12:  # very small images are blurred
            expected = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (target["boxes"][0] - expected).abs().max() <= 1
            assert (target["masks"][0].bool() != seen).float().mean() < 0.03
    assert len(sizes) > 10 and cut > 3


def crops(folder: Path, batch: int, workers: int = 0, seed: int = 0) -> Crops:
    data = open_detections(folder)
    view = {"size": 64, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return Crops(data, **view, batch_size=batch, seed=seed, device=torch.device("cpu"), workers=workers)


def test_draws_depend_only_on_seed_epoch_and_image(tmp_path):
    folder = write(tmp_path / "data")
    whole = [(image, target) for images, targets in crops(folder, 4).epoch(3) for image, target in zip(images, targets, strict=True)]
    again = crops(folder, 2, workers=1)
    parts = [(image, target) for images, targets in again.epoch(3, start=1) for image, target in zip(images, targets, strict=True)]
    for (image, target), (other, same) in zip(whole[2:], parts, strict=True):
        torch.testing.assert_close(image, other, rtol=0, atol=0)
        assert (
            target["size"] == same["size"] and torch.equal(target["masks"], same["masks"]) and torch.equal(target["boxes"], same["boxes"])
        )
    first = next(crops(folder, 4).epoch(4))[0]
    assert not torch.equal(torch.stack([image for image, _ in whole]), first)


def test_crowds_and_what_is_outside_the_image_are_not_trained_and_their_number_is_said(tmp_path):
    runs = {"counts": [0, 800, 7200], "size": [80, 100]}
    odd = [
        annotation(1, 1, [10, 20, 40, 30]),
        annotation(2, 1, [0, 0, 20, 20], segmentation=runs, iscrowd=1),
        annotation(3, 2, [200, 10, 20, 20]),
        annotation(4, 3, [10, 10, 0, 20]),
        annotation(5, 1, [80, 60, 40, 40]),
    ]
    data = open_detections(write(tmp_path / "data", odd))
    assert [photo.number for photo in data.train] == [1]
    assert data.left_out == "3 images without an object, 1 crowds, 2 boxes without area inside their image"
    masks, classes = data.target(data.train[0])
    assert classes.tolist() == [0, 0] and masks[1].sum() == 20 * 20  # only the part inside the image


def test_both_layouts_of_folders_give_the_same(tmp_path):
    folder = write(tmp_path / "coco")
    (folder / "images").rename(folder / "train2017")
    (folder / "val2017").symlink_to(folder / "train2017")
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").rename(folder / "annotations" / f"instances_{split}2017.json")
    one, other = open_detections(folder), open_detections(write(tmp_path / "own"))
    assert (one.name, other.name) == ("coco2017", "own")
    assert (one.classes, one.categories, one.identity) == (other.classes, other.categories, other.identity)
    assert [photo.objects for photo in one.train] == [photo.objects for photo in other.train]


def test_another_content_of_an_image_is_other_data(tmp_path):
    before = open_detections(write(tmp_path / "data"))
    path = Path(before.val[0].path)
    path.write_bytes(path.read_bytes() + b"\0")
    assert open_detections(tmp_path / "data").identity["val"] != before.identity["val"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["annotations"].clear(), "has no object in any image: nothing can be learned"),
        (lambda content: content["annotations"][0].update(category_id=30), "category_id 30, which does not exist.* are 10, 20"),
        (lambda content: content["annotations"][0].update(image_id=9), "is of image 9, which is not in the list"),
        (lambda content: content["annotations"][0].update(bbox=[0, 0, float("nan"), 1]), "annotation 1 .* has the box"),
        (lambda content: content["annotations"][1].update(segmentation=[[0, 0, 1, 1]]), "annotation 2 .* no usable mask"),
        (lambda content: content["annotations"][1].pop("segmentation"), "annotation 2 .* no usable mask"),
        (lambda content: content["annotations"][0].pop("bbox"), "'bbox' is missing"),
        (lambda content: content["images"][2].update(file_name="lost.png"), "names 4 images, and 1 .* absent, .*lost.png"),
        (lambda content: content["images"][2].update(id=1), "image id 1 is there more than once"),
        (lambda content: content["categories"].pop(), "have different categories"),
        (lambda content: content.pop("images"), "has no list of images"),
    ],
)
def test_a_wrong_annotation_file_is_refused_with_the_number_and_the_fix(edit, message, tmp_path):
    folder = write(tmp_path / "data")
    change(folder, edit)
    with pytest.raises(DataError, match=message):
        open_detections(folder)


def test_an_image_of_another_size_and_one_smaller_than_a_patch_are_refused(tmp_path):
    folder = write(tmp_path / "data")
    Image.new("RGB", (90, 80)).save(folder / "images" / "2.png")
    data = open_detections(folder)
    with pytest.raises(DataError, match="80 x 90 pixels, but the annotation file says 80 x 100"):
        data.read(data.train[1])
    with pytest.raises(DataError, match="1.png has 80 x 100 pixels, less than a patch of 90"):
        data.check(90)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: Image.new("RGB", (90, 80)).save(path), "2.png has 80 x 90 pixels, but the annotation file says 80 x 100"),
        (lambda path: path.write_bytes(b"no image"), "2.png"),
    ],
)
def test_a_wrong_image_is_refused_before_the_training(spoil, message, tmp_path, capsys):
    folder = write(tmp_path / "data")
    spoil(folder / "images" / "2.png")
    assert main([*SMALL, "--data", str(folder), "--out", str(tmp_path / "runs")]) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_detectron2_gets_polygons_as_they_are_and_run_lengths_encoded():
    polygons = annotation(1, 1, [10, 20, 40, 30])
    assert detectron2_mask(polygons, 80, 100) is polygons["segmentation"]
    runs = {"segmentation": {"counts": [0, 800, 7200], "size": [80, 100]}}  # the first ten columns
    found = detectron2_mask(runs, 80, 100)
    assert isinstance(found["counts"], bytes) and detectron2_mask({"segmentation": found}, 80, 100) is found
    assert coco_mask.decode(found)[:, :10].all() and not coco_mask.decode(found)[:, 10:].any()


def test_no_folder_no_annotations_and_a_file_that_is_no_json_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        open_detections(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"instances_train.json is missing: a COCO folder has"):
        open_detections(tmp_path)
    folder = write(tmp_path / "data")
    (folder / "annotations" / "instances_val.json").write_text("{")
    with pytest.raises(DataError, match="is not a COCO annotation file"):
        open_detections(folder)


# scores and training


def test_the_truth_as_a_result_has_all_percents_and_nothing_has_none(tmp_path):
    data = open_detections(write(tmp_path / "data"))
    results = []
    for photo in data.val:
        for own in photo.objects:
            runs = encoded(own, photo.height, photo.width)
            shape = {"size": runs["size"], "counts": runs["counts"].decode()}
            place = {"image_id": photo.number, "category_id": own["category_id"], "score": 0.9}
            results.append({**place, "bbox": own["bbox"], "segmentation": shape})
    assert score(data.truth(), copy.deepcopy(results)) == pytest.approx(dict.fromkeys(("ap_box", "ap50_box", "ap_mask", "ap50_mask"), 100))
    for own in results:  # half of the width: an overlap of 0.5 with the box, while the mask stays right
        own["bbox"] = [own["bbox"][0], own["bbox"][1], own["bbox"][2] * 0.55, own["bbox"][3]]
    found = score(data.truth(), results)
    assert found["ap50_box"] == pytest.approx(100) and found["ap_box"] == pytest.approx(20) and found["ap_mask"] == pytest.approx(100)
    assert set(score(data.truth(), []).values()) == {0.0}


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(SimpleFeaturePyramid(WindowedViT(vit("micro", image_size=64), window=4), channels=8), 2)


def test_every_weight_learns_and_an_image_without_an_object_too(tmp_path):
    model = detector()
    images, targets = next(crops(write(tmp_path / "data"), 4).epoch(0))
    output = model(images, targets)
    output.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert len(output.metrics) == 5 and output.loss.item() == pytest.approx(sum(output.metrics.values()).item(), rel=1e-5)
    blank = {"boxes": torch.zeros(0, 4, dtype=torch.int64), "labels": torch.zeros(0, dtype=torch.int64), "size": (64, 64)}
    blank["masks"] = torch.zeros(0, 64, 64, dtype=torch.uint8)
    assert model(images[:1], [blank]).loss.isfinite()


def test_layer_decay_falls_from_the_heads_to_the_patches():
    model = detector()
    stage = Options(Path("x"), batch=2, epochs=2).stage("base", 4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[own]: group["lr_scale"] for group in make_optimizer(model, stage).param_groups for own in group["params"]}
    assert len(rates) == len(names)
    expected = {"backbone.levels.0.0.weight": 7, "backbone.net.blocks.5.attn.qkv.weight": 6, "backbone.net.relative.5.rows": 6}
    expected |= {"backbone.net.blocks.0.attn.qkv.weight": 1, "backbone.net.pos_embed": 0, "rpn.head.cls_logits.weight": 7}
    for name, layer in expected.items():
        assert rates[name] == pytest.approx(0.7 ** (7 - layer)), name


def test_the_schedule_is_that_of_vitdet_for_base_and_large():
    for size, decay in (("base", 0.7), ("large", 0.8)):
        stage = Options(Path("x")).stage(size, 117_266)
        assert (stage.epochs, stage.batch_size, stage.lr, stage.weight_decay, stage.layer_decay) == (100, 64, 1e-4, 0.1, decay)
        assert stage.milestones == (89, 96) and int(stage.warmup_epochs * (117_266 // 64)) == 250


@pytest.mark.parametrize(("epochs", "milestones"), [(1, (1,)), (4, (4,)), (5, (4, 5)), (13, (12, 13)), (14, (12, 13))])
def test_a_milestone_of_few_epochs_is_at_the_end_where_it_has_no_effect(epochs, milestones):
    assert Options(Path("x"), epochs=epochs).stage("base", 117_266).milestones == milestones


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "patch_size=8"], "has patches of 8 pixels: detection needs 16"),
        (["--recipe", "digits"], "was trained on grey images|patches of"),
        (["--batch", "5"], "BATCH=5, but there are 4 training images"),
        (["--checkpoint", "lost.pt"], "CKPT=lost.pt does not exist"),
        (["--data", "/lost"], "DATA=/lost is not a folder"),
        (["--engine", "detectron2", "--precision", "bf16-mixed", "--device", "cpu"], "--precision bf16-mixed: the loop of detectron2"),
    ],
)
def test_a_wrong_command_says_what_to_change(options, message, tmp_path, capsys):
    folder = write(tmp_path / "data")
    assert main([*SMALL, "--data", str(folder), "--out", str(tmp_path / "runs"), *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "runs").exists()


def test_an_engine_that_is_not_installed_is_named_with_the_fix(tmp_path, capsys):
    try:
        import detectron2  # noqa: F401
    except ImportError:
        folder = write(tmp_path / "data")
        assert main([*SMALL, "--data", str(folder), "--out", str(tmp_path / "runs"), "--engine", "detectron2"]) == 2
        assert "benchmarks/detection/README.md has the two lines" in " ".join(capsys.readouterr().out.split())
    else:
        pytest.skip("detectron2 is installed")


def test_an_interrupted_run_of_detectron2_refuses_other_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.detection.detectron2_engine", None)
    arguments = [*SMALL, "--data", str(write(tmp_path / "data")), "--out", str(tmp_path / "runs"), "--engine", "detectron2"]
    assert main(arguments) == 2
    (run,) = (tmp_path / "runs").glob("detection/*/detectron2-scratch")
    (run / "detectron2").mkdir()
    (run / "detectron2" / "last_checkpoint").write_text("last.pth")  # as detectron2 marks its progress
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "holds a run with other settings (stage.epochs: 100 there, 3 requested" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_without_pycocotools_the_command_says_what_to_install(tmp_path):
    (tmp_path / "pycocotools.py").write_text("raise ModuleNotFoundError(\"No module named 'pycocotools'\", name='pycocotools')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "benchmarks.detection", "--help"]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode != 0 and 'pip install -e ".[det]"' in ended.stderr and "Traceback" not in ended.stderr


def test_a_file_must_cover_the_encoder(tmp_path, capsys):
    weights = vit("micro", image_size=224).state_dict()
    del weights["blocks.3.attn.qkv.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    folder = write(tmp_path / "data")
    arguments = [*SMALL, "--data", str(folder), "--out", str(tmp_path / "runs"), "--checkpoint", str(tmp_path / "part.safetensors")]
    assert main(arguments) == 2
    assert "blocks.3.attn.qkv.weight" in " ".join(capsys.readouterr().out.split())


def test_a_file_is_loaded_at_another_image_size_and_starts_the_training(tmp_path, capsys):
    save_file(vit("micro", image_size=224).state_dict(), tmp_path / "whole.safetensors")
    folder = write(tmp_path / "data")
    arguments = [*SMALL, "--data", str(folder), "--out", str(tmp_path / "runs"), "--checkpoint", str(tmp_path / "whole.safetensors")]
    assert main([*arguments, "--image-size", "64", "--epochs", "1"]) == 0
    (result,) = (tmp_path / "runs" / "detection" / "droppos-whole-data-seed0").glob("torchvision-pretrained/result.json")
    assert json.loads(result.read_text())["ap_box"] >= 0
    assert "whole.safetensors" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "file"), [("torchvision", "checkpoint.pt"), ("detectron2", "detectron2/last.pth")])
def test_a_run_that_is_stopped_and_resumed_is_bit_identical(engine, file, tmp_path):
    pytest.importorskip(engine, reason=f"{engine} is not installed: benchmarks/detection/README.md")
    folder = write(tmp_path / "data")
    runs = {name: tmp_path / name for name in ("whole", "stopped")}
    command = [sys.executable, "-m", "benchmarks.detection", *SMALL, "--data", str(folder), "--engine", engine, "--image-size", "64"]
    command += ["--epochs", "8", "--checkpoint-seconds", "0", "--workers", "1"]
    options: dict = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run([*command, "--out", str(runs["whole"])], **options).returncode == 0
    process = subprocess.Popen([*command, "--out", str(runs["stopped"])], **options, start_new_session=True)
    until = time.monotonic() + 60
    while not list(runs["stopped"].glob(f"detection/*/*/{file}")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # to the workers too, as a terminal or Slurm does
    assert process.wait(60) == EXIT_STOPPED
    assert not list(runs["stopped"].glob("detection/*/*/result.json"))
    assert subprocess.run([*command, "--out", str(runs["stopped"])], **options).returncode == 0
    weights = [torch.load(next(run.glob(f"detection/*/*/{file}")), weights_only=False)["model"] for run in runs.values()]
    assert all(torch.equal(torch.as_tensor(weights[0][name]), torch.as_tensor(weights[1][name])) for name in weights[0])
    metrics = [next(run.glob("detection/*/*/metrics.jsonl")).read_text() for run in runs.values()]
    assert metrics[0] == metrics[1]


def test_recorded_rows_are_found_in_the_log_and_those_of_other_options_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.detection.__main__.ROOT", tmp_path)
    (tmp_path / "benchmarks" / "detection").mkdir(parents=True)
    arguments = [*SMALL, "--data", str(write(tmp_path / "data")), "--image-size", "64", "--record"]
    assert main([*arguments, "--epochs", "1", "--out", str(tmp_path / "one")]) == 0
    assert main([*arguments, "--epochs", "2", "--no-relative-positions", "--out", str(tmp_path / "two")]) == 0
    assert verify(tmp_path)[1] == []
    rows = load(tmp_path / "benchmarks" / "detection" / "results.csv")
    assert len(rows) == 8 and set(rows["metric"]) == {"ap_box", "ap50_box", "ap_mask", "ap50_mask"}
    assert set(rows["protocol"]) == {"torchvision"}  # the numbers of two engines are not compared
    assert "engine=torchvision image_size=64 iterations=2 window=4" in rows["settings"][0]
    given = "size=micro --image-size 64 --window 4{} --channels 16 --epochs {} --batch 2"
    assert [*dict.fromkeys(rows["overrides"])] == [given.format("", 1), given.format(" --no-relative-positions", 2)]


@pytest.mark.slow
@pytest.mark.skipif(not COCO.is_dir(), reason="needs the photos of shared/data/coco beside the repository")
def test_photos_of_coco_are_trained_scored_and_drawn(tmp_path, capsys):
    data = open_detections(COCO)
    assert len(data.classes) == 80 and sum(not trained(own, photo) for photo in data.train for own in photo.objects) == 9
    arguments = [*SMALL, "--data", str(COCO), "--epochs", "2", "--limit", "6", "--out", str(tmp_path / "runs")]
    assert main(arguments) == 0
    (picture,) = (tmp_path / "runs").glob("detection/*/*/pictures.png")
    assert Image.open(picture).size[0] == 1000
    assert "AP50" in capsys.readouterr().out


@pytest.mark.slow
def test_detectron2_trains_and_scores_with_the_same_rates(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed: benchmarks/detection/README.md")
    from benchmarks.detection.detectron2_engine import rate_factor

    names = {"net.blocks.5.attn.qkv.weight": 6, "net.relative.0.rows": 1, "net.pos_embed": 0, "levels.0.0.weight": 7}
    for name, layer in names.items():
        assert rate_factor(f"backbone.pyramid.{name}", 6, 0.7) == pytest.approx(0.7 ** (7 - layer)), name
    folder = write(tmp_path / "data")
    arguments = [*SMALL, "--data", str(folder), "--out", str(tmp_path), "--engine", "detectron2", "--image-size", "64", "--epochs", "2"]
    assert main(arguments) == 0
    (run,) = tmp_path.glob("detection/*/detectron2-scratch")
    assert json.loads((run / "result.json").read_text())["ap_mask"] >= 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    assert (run / "pictures.png").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"window": 0}, "WINDOW=0 is less than 1"),
        ({"epochs": 0}, "EPOCHS=0 is less than 1"),
        ({"limit": 2, "record": True}, "--record with --limit 2: a result of a part of the images is not recorded"),
        ({"image_size": 100}, "IMAGE_SIZE=100 is not a multiple of 64, the stride of the last map: use 128"),
    ],
)
def test_an_option_out_of_range_is_refused(option, message):
    with pytest.raises(RecipeError, match=message):
        Options(Path("x"), **option)
